"""A small chat model from scratch: real words, and instructions that ask for something it can do.

    python experiments/backbone.py --minutes 60 --size 16m --texts stories.txt wiki.txt.gz \\
        --groups captions.jsonl paraphrases.jsonl --triplets entailment.jsonl --out runs/backbone

First language modelling on plain texts, then chats, with a tenth of plain texts kept in every batch. The chats are made
from groups, whose texts mean the same (a jsonl row with a list), and from triplets, whose positive follows from the query
(chats.py has the instructions); only the answers are learned. Held-out loss is measured for each kind. The folder keeps
the weights that were best on the chats, and three evaluations in a row that are worse end the run: before it memorises.
On a GPU batches are made by processes of their own while it computes; a larger --batch keeps it busy.

--out becomes an ordinary checkpoint folder, with the first instruction in grace_config.json, so that grace.py trains from
it; log.jsonl and samples.md are written beside. What a step reads is a function of seed and step: `--resume` continues
the run exactly. How many steps fit into --minutes, and whether bfloat16 is the faster compute type here, is measured
before the first step and kept.

Shapes: B rows per step, L tokens, D hidden size, V vocabulary.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import sys
import time

import torch
import torch.nn.functional as F
from chats import INSTRUCTIONS, Data  # puts the repository on the path
from torch.utils.data import DataLoader

from evaluation.encoder import encode_texts
from plumbing.checkpoint import write_atomically
from plumbing.errors import GraceError, finite
from policy import Policy
from prompt import Reading

SIZES = {  # vocabulary, D, layers, heads, width of the feed-forward layers
    "1m": (4096, 128, 4, 4, 352),
    "4m": (4096, 256, 4, 8, 672),
    "16m": (8192, 384, 7, 6, 1024),
    "60m": (16384, 640, 10, 10, 1728),
    "120m": (16384, 768, 15, 12, 2048),
}
SPECIAL = ("<pad>", "<system>", "<user>", "<assistant>", "<end>")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
READING = Reading(INSTRUCTIONS["other words"][0], max_prompt_tokens=128, max_new_tokens=32)
CHATS, KEPT = 0.6, 0.1  # the share of the steps that are chats, the last ones; the share of plain texts in their batches
PATIENCE = 3  # how many worse evaluations end the run

# ---------------------------------------------------------------- tokenizer and network


def build_tokenizer(data, vocabulary, seed=0, windows=20_000):
    """A byte-level BPE tokenizer, made from random windows and chats, with a chat template and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng, core, bytewise = random.Random(seed), Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    core.pre_tokenizer, core.decoder = bytewise(add_prefix_space=False), decoders.ByteLevel()
    options = dict(special_tokens=list(SPECIAL), initial_alphabet=bytewise.alphabet(), show_progress=False)
    sample = [text for _ in range(windows) for text in (data.window(rng), *data.chat(rng, rng.choice(data.kinds)))]
    core.train_from_iterator(sample, trainers.BpeTrainer(vocab_size=vocabulary, **options))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", additional_special_tokens=list(SPECIAL[1:4])
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(tokenizer, size, seed=0):
    """A random Llama-architecture network; the initial scale D**-0.5 is what lets a small one learn to copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    _, D, layers, heads, width = SIZES[size]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=D, intermediate_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512, initializer_range=D**-0.5,
            tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def loss_of(model, ids, labels, dtype):
    """Nats per learned token. The output head sees only the positions whose next token is learned: `[n, V]`."""
    ids, labels = ids.to(model.device), labels[:, 1:].to(model.device)
    kept = labels != -100
    with torch.autocast(model.device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext():
        # Padding stands on the right, where causal attention never reaches it: no mask is needed.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][kept]
        logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits, labels[kept])


# ---------------------------------------------------------------- the run


def plain_share(step, steps):
    """The share of plain texts in the batch of a step."""
    return 1.0 if step < (1 - CHATS) * steps else KEPT


def rate(step, steps, D):
    """Rises over the first fiftieth, falls to 0 over the second half; wider networks take smaller steps."""
    return 3e-3 * 256 / D * min(1, (step + 1) / (0.02 * steps + 1), 2 * (1 - step / steps))


def makers(device):
    """How many processes make batches beside this one: for a GPU as many as there are spare cores, at most 12."""
    if device != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(12, cores - 1)


class Batches:
    """What each step reads, by its number: a map-style dataset, so that a `DataLoader` can make them ahead."""

    def __init__(self, data, tokenizer, B, steps, seed):
        self.data, self.tokenizer, self.B, self.steps, self.seed = data, tokenizer, B, steps, seed

    def __getitem__(self, step):
        rng = random.Random(f"{self.seed} {step}")
        return self.data.batch(rng, self.tokenizer, self.B, plain_share(step, self.steps))

    def after(self, step, device):
        """The batches from a step on; for a GPU made ahead, by processes of their own."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in one of several processes it would not help
        return iter(DataLoader(self, batch_size=None, sampler=range(step, self.steps), num_workers=makers(device)))


def one_step(model, optimizer, ids, labels, dtype):
    """One update; returns the loss. Raises GraceError for a gradient that is not finite."""
    loss = loss_of(model, ids, labels, dtype)
    loss.backward()
    finite("the gradient", torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def measure(model, data, tokenizer, B, minutes):
    """Times steps in both compute types, at a rate of 0. `-> (the faster type, steps in so many minutes)`."""
    start = time.perf_counter()
    batches = [data.batch(random.Random(0), tokenizer, B, share) for share in (1.0, KEPT, KEPT)]
    making = time.perf_counter() - start
    seconds, tokens = {}, sum(ids.numel() for ids, _ in batches)
    still = torch.optim.AdamW(model.parameters(), lr=0.0)
    for dtype in ("float32", "bfloat16"):
        for _ in range(3):  # the first is slow, and so is any during which the machine did something else
            start = time.perf_counter()
            for ids, labels in batches:
                one_step(model, still, ids, labels, dtype)
            seconds[dtype] = min(seconds.get(dtype, math.inf), time.perf_counter() - start)
        print(f"{dtype}: {tokens / seconds[dtype]:,.0f} tokens per second", flush=True)
    dtype = min(seconds, key=seconds.get)
    ahead = makers(model.device.type)
    each = max(seconds[dtype], making / ahead) if ahead else seconds[dtype] + making
    return dtype, max(1, int(minutes * 60 / (each / len(batches))))


@torch.no_grad()
def heldout_losses(model, data, tokenizer, dtype, rows=128):
    """Nats per learned token on held-out texts, the same each time. `-> {kind: loss}`."""
    draw = lambda kind, plain: data.batch(random.Random(kind), tokenizer, rows, plain, None if plain else [kind], held_out=True)
    return {kind: float(loss_of(model, *draw(kind, float(kind == "plain")), dtype)) for kind in ("plain", *data.kinds)}


def samples(model, data, tokenizer, n=4):
    """What the model answers, greedy, to every kind of chat about a few held-out texts, as markdown."""
    lines = []
    for kind in data.kinds:
        texts = [data.chat(random.Random(f"{kind} {i}"), kind, held_out=True)[0] for i in range(n)]
        reading = dataclasses.replace(READING, instruction=INSTRUCTIONS[kind][0])
        answers = encode_texts(Policy(model, tokenizer, reading), texts).rationales
        lines += [f"**{reading.instruction}**\n", *(f"- {text} → {answer}" for text, answer in zip(texts, answers)), ""]
    return "\n".join(lines)


def train(data, size, out, minutes=None, steps=None, B=64, seed=0, resume=False, evaluations=20):
    """A whole run, of so many steps or minutes. Returns the best evaluation: its step, score, and `{kind: loss}`."""
    os.makedirs(out, exist_ok=True)
    path, device = os.path.join(out, "state.pt"), "cuda" if torch.cuda.is_available() else "cpu"
    if os.path.exists(path) and not resume:
        raise GraceError(f"{out} holds a run: continue it with --resume, or give another --out")
    tokenizer = build_tokenizer(data, SIZES[size][0], seed)
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    model = build_model(tokenizer, size, seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    if os.path.exists(path):
        state = torch.load(path, map_location=device, weights_only=True)
        if (was := (state["size"], state.get("B", 64), state["seed"])) != (size, B, seed):
            flags = "--size {} --batch {} --seed {}".format(*was)
            raise GraceError(f"{path} is of {flags}: give these, or another --out")
        if state.get("vocabulary") != vocabulary:
            raise GraceError(f"{path} is of other texts, groups or triplets: give the same in the same order, or another --out")
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    else:
        dtype, fitting = measure(model, data, tokenizer, B, minutes) if minutes else ("float32", steps)
        state = dict(size=size, B=B, seed=seed, vocabulary=vocabulary, dtype=dtype, steps=fitting)
        state |= dict(step=0, seconds=0.0, tokens=0, best=None, worse=0, log="")
    steps = state["steps"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {steps} steps, {state['dtype']}", flush=True)
    batches = Batches(data, tokenizer, B, steps, seed).after(state["step"], device)
    while state["step"] < steps and state["worse"] < PATIENCE:
        start, step = time.perf_counter(), state["step"]
        ids, labels = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, SIZES[size][1])
        loss = one_step(model, optimizer, ids, labels, state["dtype"])
        state |= {"step": step + 1, "tokens": state["tokens"] + ids.numel()}
        state["seconds"] += time.perf_counter() - start
        if state["step"] % max(1, steps // evaluations) == 0 or state["step"] == steps:
            evaluate(state, loss, model, data, tokenizer, out)
            torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)  # whole, or not there
    return state["best"]


def evaluate(state, loss, model, data, tokenizer, out):
    """Measure, log, and keep the weights where the chats' mean loss is the best so far; counts how often it was not."""
    losses = heldout_losses(model, data, tokenizer, state["dtype"])
    line = {"step": state["step"], "minutes": state["seconds"] / 60, "tokens": state["tokens"], "loss": loss, **losses}
    line = json.dumps({name: round(x, 3) for name, x in line.items()})
    print(line, flush=True)
    state["log"] += line + "\n"
    write_atomically(os.path.join(out, "log.jsonl"), state["log"])
    if plain_share(state["step"], state["steps"]) == 1:
        return
    score = sum(losses[kind] for kind in data.kinds) / len(data.kinds)
    state["worse"] = 0 if not state["best"] or score < state["best"]["score"] else state["worse"] + 1
    if not state["worse"]:
        state["best"] = {"step": state["step"], "score": score, **losses}
        Policy(model, tokenizer, READING).save(out)
        write_atomically(os.path.join(out, "samples.md"), samples(model, data, tokenizer))


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = dict(nargs="+", default=[], metavar="FILE")
    parser.add_argument("--texts", **several, help="plain texts, .txt or .txt.gz")
    parser.add_argument("--groups", **several, help="jsonl, a list of texts of one meaning per row")
    parser.add_argument("--triplets", **several, help="jsonl, query and positive")
    parser.add_argument("--minutes", type=float, default=60, help="how long to train [60]")
    parser.add_argument("--size", choices=tuple(SIZES), default="4m", help="parameters, about [4m]")
    parser.add_argument("--batch", type=int, default=64, help="rows per step [64]")
    parser.add_argument("--evaluations", type=int, default=20, help="how often losses are measured and the run is kept [20]")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of all that is drawn [0]")
    parser.add_argument("--resume", action="store_true", help="continue the run under --out")
    parser.add_argument("--out", required=True, help="folder to write into")
    args = parser.parse_args(arguments)
    data = Data(args.texts, args.groups, args.triplets, args.seed)
    how = dict(B=args.batch, seed=args.seed, resume=args.resume, evaluations=args.evaluations)
    print(train(data, args.size, args.out, args.minutes, **how))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (GraceError, OSError) as error:
        sys.exit(f"backbone.py: {error}")
