"""Tiny models and tokenizers, built in place: no test needs a network, a GPU or a download."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import toy  # noqa: E402
from policy import Policy, Reading  # noqa: E402

COMMON = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=128, bos_token_id=None, pad_token_id=0,
    eos_token_id=list(range(5, 150, 5)),  # many end tokens, so that random networks end at unequal lengths
)  # fmt: skip
SMALL = {  # architecture: what its configuration needs beyond COMMON
    "Qwen2": {},
    "Qwen3": {},
    "Llama": {},
    "Gemma": {},
    "Gemma2": dict(final_logit_softcapping=2.0, attn_logit_softcapping=5.0, sliding_window=8),
    "Granite": dict(logits_scaling=3.0, embedding_multiplier=2.0),
    "Cohere": dict(logit_scale=0.3),
    "GPT2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=128),
}
ARCHITECTURES = ["Qwen2", "Qwen3", "Llama", "Gemma", "GPT2"]


def build(architecture, vocab_size, seed=0, **overrides):
    """A random network of a named architecture, with weights large enough for distinct predictions."""
    settings = dict(COMMON) if architecture != "GPT2" else {k: v for k, v in COMMON.items() if "token_id" in k}
    config = getattr(transformers, architecture + "Config")(
        vocab_size=vocab_size, initializer_range=0.3, **{**settings, **SMALL[architecture], **overrides}
    )
    torch.manual_seed(seed)
    suffix = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    return getattr(transformers, architecture + suffix)(config)


@pytest.fixture(scope="session")
def tokenizer():
    return toy.build_tokenizer()


@pytest.fixture
def make_policy(tokenizer):
    """A policy over a random network: `make_policy("Qwen2", pooling="max", double=True)`."""

    def make(architecture="Llama", seed=0, double=False, max_new_tokens=6, pooling="mean", **overrides):
        model = build(architecture, len(tokenizer), seed, **overrides)
        reading = Reading(toy.INSTRUCTION, max_prompt_tokens=64, max_new_tokens=max_new_tokens, pooling=pooling)
        return Policy(model.double() if double else model, tokenizer, reading)

    return make


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """The embedded default after a warm start of a few steps: a real folder, a poor policy."""
    folder = tmp_path_factory.mktemp("world")
    toy.build(str(folder), seed=0, train=64, heldout=16, steps=30)
    return folder


TEXTS = [
    "the angry doctor bought the lamp near the forest around noon .",
    "somebody sold the boat",
    "around winter , near the street , the tall child found the sofa .",
]
