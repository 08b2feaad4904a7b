"""What a checkpoint has to be for the policy to use it: each refusal in a sentence, before any text is read."""

import contextlib
import os
import warnings

import torch

from plumbing.errors import GraceError, first_line

ADVICE = "Give a folder written by save_pretrained, or, with a network, a hub id."


def pick_device(name=None):
    """The device of that name; by default cuda, mps (a Mac's GPU) or cpu, the first that there is. Raises GraceError."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the second where torch comes without CUDA
        raise GraceError(f"--device {name}: torch cannot use it here; give cpu, mps, cuda or cuda:N") from error
    return name


@contextlib.contextmanager
def opening(source):
    """Whatever goes wrong in here becomes a GraceError that says what to give instead of this folder or hub id."""
    looks_local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if looks_local and not os.path.isdir(source):
        raise GraceError(f"{source}: no such folder. {ADVICE}")
    try:
        yield
    except GraceError:
        raise
    except Exception as error:  # each kind of damage raises its own; to a user they mean the same
        advice = ADVICE
        if "trust_remote_code" in str(error):
            advice = "Code that comes with a model is not run here: give a model that transformers knows by itself."
        elif "no file named model.safetensors" in str(error):
            advice = (
                "Other formats are pickles, which can run code, and are not read. If you trust this one, convert it once: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        raise GraceError(f"{source}: cannot be loaded as a causal language model ({first_line(error)}). {advice}") from error


def end_ids(model, tokenizer):
    """Every configured end token, sorted. Raises GraceError if there is none, because no rationale could end."""
    found = set()
    from_config = getattr(model.config, "eos_token_id", None)  # not every configuration has one
    for ids in (model.generation_config.eos_token_id, from_config, tokenizer.eos_token_id):
        found |= set(ids if isinstance(ids, (list, tuple)) else [ids])
    found -= {None}
    if not found:
        raise GraceError("no end token in the tokenizer, config or generation config: set tokenizer.eos_token")
    return sorted(found)


def room_for_prompts(config, max_prompt_tokens, max_new_tokens):
    """The prompt limit, lowered, with a warning, to what the model's context leaves beside a rationale."""
    context = getattr(config, "max_position_embeddings", None) or float("inf")
    room = context - max_new_tokens
    if room < 1:
        raise GraceError(f"max_new_tokens = {max_new_tokens} fills the model's context of {context} tokens: lower it")
    if max_prompt_tokens > room:
        warnings.warn(f"prompts are limited to {room} tokens: the model's context is {context}", stacklevel=4)
    return min(max_prompt_tokens, room)


def near(x, y):
    """Whether two tensors are equal but for rounding."""
    return torch.allclose(x.float(), y.float(), rtol=1e-2, atol=1e-2 * float(y.abs().max()))


@torch.no_grad()
def check_network(policy):
    """Refuse a model whose numbers the policy would get wrong. Returns whether padding may follow the instruction.

    Its logits must be `policy.logits`, its cache must be one that can be repeated K times, and padding on the left must not
    matter. In models with sliding windows, or with positions counted in the mask, padding between tokens does matter: there
    the instruction is read with every prompt. Raises GraceError.
    """
    name = type(policy.model).__name__
    if policy.base is policy.model or policy.head is None:
        raise GraceError(f"{name}: its body and output head cannot be told apart; not supported")
    a, b, c = (torch.arange(3) % policy.head.weight.shape[0]).tolist()

    def read(ids, mask):
        ids, mask = (torch.tensor([x], device=policy.device) for x in (ids, mask))
        hidden, _, cache = policy.prefill(ids, mask, 0)
        return policy.model(input_ids=ids).logits, hidden, cache

    expected, hidden, cache = read([a, b, c], [1, 1, 1])
    if not torch.isfinite(expected).all():
        raise GraceError(f"{name}: its logits are not finite, so its weights are damaged; give another checkpoint")
    if not near(policy.logits(hidden), expected):
        raise GraceError(f"{name}: its logits are not its output head over its last hidden state; not supported")
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in getattr(cache, "layers", [None])):
        raise GraceError(f"{name}: its cache cannot be repeated for K rollouts; use an attention-only model")
    # The same two tokens without padding, with padding on the left, and with padding between them.
    cases = ([b, c], [1, 1]), ([a, b, c], [0, 1, 1]), ([b, a, c], [1, 0, 1])
    plain, left, middle = (read(*case)[1][:, -1] for case in cases)
    if not near(left, plain):
        raise GraceError(f"{name}: padding on the left changes what it computes; not supported")
    about = policy.model.config.get_text_config()
    layers = getattr(about, "layer_types", None) or ["sliding" if getattr(about, "sliding_window", None) else "full"]
    windows = any("sliding" in layer or "chunked" in layer for layer in layers)  # a window counts positions, padding too
    return near(middle, plain) and not windows
