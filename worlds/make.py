"""The command that makes a small world: texts, a tokenizer, and a tiny language model that can be taught.

    python -m worlds.make --out runs/town           # two minutes on two cores

It writes `runs/town/model` (an ordinary checkpoint folder), `runs/town/data` (ordinary jsonl files) and `runs/town/tasks`
(the held-out files as evaluation tasks). The method sees nothing else of a world.

The model is a Llama-architecture network of about 0.35 M parameters, warmed up as a language model on the world's chats:
first with good answers, then with worse ones. So the policy that GRACE starts from could do better, but does not.
"""

import argparse
import json
import os
import random
import time
from itertools import islice

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from worlds import EVENTS, WORLDS

INSTRUCTION = EVENTS.instruction  # of the world that `build_world` makes by default
SPECIAL_TOKENS = ("<pad>", "<unk>", "<system>", "<user>", "<assistant>", "<end>")
CHAT_TEMPLATE = (  # ChatML in small: one special token opens each message
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


# ---------------------------------------------------------------- the model


def build_tokenizer(words=EVENTS.words):
    """A word-level tokenizer over a world's words, with a chat template and an end token."""
    words = [*SPECIAL_TOKENS, *sorted(words)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:5]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer, seed):
    """A random Llama-architecture network. The initial scale D**-0.5 is what lets it learn to copy."""
    torch.manual_seed(seed)
    D = 96
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=D,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=256,
            initializer_range=D**-0.5,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def warm_up(model, tokenizer, world, rng, steps, B=96, lr=3e-3):
    """Language modelling on the world's chats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    meanings = world.meanings(rng)
    for step in range(steps):
        chats = []
        for meaning in islice(meanings, B):
            instruction, text, answer = world.chat(meaning, rng, progress=(step + 1) / steps)
            chats.append(f"<system> {instruction} <user> {text} <assistant> {answer} <end>")
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        ids = sorted(tokenizer(chats, add_special_tokens=False)["input_ids"], key=len)
        n, total = sum(len(row) - 1 for row in ids), 0.0
        for part in (ids[i : i + B // 3] for i in range(0, B, B // 3)):  # by length, or a third of the time goes into padding
            labels = pad_sequence([torch.tensor(row) for row in part], True, -100)  # [b, L]
            logits = model(input_ids=labels.clamp(min=0), attention_mask=(labels >= 0).long()).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / n
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"warm-up step {step:4d}  loss {total:.3f}", flush=True)


# ---------------------------------------------------------------- the files


def write_rows(path, rows):
    """Write rows as jsonl."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_tasks(folder, heldout, graded):
    """Write the held-out sets as two evaluation tasks in the hub's layout: retrieval, and graded pairs."""
    documents = dict.fromkeys([row["positive"] for row in heldout] + [row["negative"] for row in heldout])
    document_ids = {text: f"d{i}" for i, text in enumerate(documents)}
    query_ids = {text: f"q{i}" for i, text in enumerate(dict.fromkeys(row["query"] for row in heldout))}
    answers = {(query_ids[row["query"]], document_ids[row["positive"]]) for row in heldout}
    parts = {
        "corpus": [{"_id": i, "title": "", "text": text} for text, i in document_ids.items()],
        "queries": [{"_id": i, "text": text} for text, i in query_ids.items()],
        "qrels": [{"query-id": q, "corpus-id": d, "score": 1} for q, d in sorted(answers)],
    }
    for part, rows in parts.items():
        write_rows(os.path.join(folder, "ToyRetrieval", part, "test.jsonl"), rows)
    write_rows(os.path.join(folder, "ToyPairs", "test.jsonl"), graded)


def world_files(world, rng, train, heldout):
    """A world's rows by the name of their file. train, heldout: how many. `-> {name: rows}`."""
    draw = lambda n, held_out=False: islice(world.meanings(rng, held_out), n)
    return {
        "train": [world.triplet(meaning, rng) for meaning in draw(train)],
        "texts": [{"text": world.tell(meaning, rng)} for meaning in draw(train)],
        "heldout": [world.triplet(meaning, rng) for meaning in draw(heldout, True)],
        "graded": [world.graded_pair(meaning, rng) for meaning in draw(2 * heldout, True)],
    }


def build_world(out, seed=0, train=4096, heldout=256, steps=None, world=EVENTS):
    """Write a world's data and its warmed-up model under `out`. The same seed gives the same files.

    train, heldout: numbers of rows. steps: length of the warm start; None: the world's own. `-> the model's folder`.
    """
    rng = random.Random(seed)
    files = world_files(world, rng, train, heldout)
    if hasattr(world, "ladder"):
        files |= world.ladder(heldout, rng)
    for name, rows in files.items():
        write_rows(os.path.join(out, "data", f"{name}.jsonl"), rows)
    write_tasks(os.path.join(out, "tasks"), files["heldout"], files["graded"])
    tokenizer, folder = build_tokenizer(world.words), os.path.join(out, "model")
    model = build_model(tokenizer, seed)
    warm_up(model, tokenizer, world, rng, steps or world.warm_up)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reading = {k: getattr(world, k) for k in ("instruction", "max_prompt_tokens", "max_new_tokens")}
    with open(os.path.join(folder, "grace_config.json"), "w") as file:
        json.dump(reading, file, indent=2)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/town", help="folder to write model/, data/ and tasks/ into")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of the warm start")
    parser.add_argument("--world", default="town", choices=tuple(WORLDS), help="what the texts are about")
    args = parser.parse_args()
    start = time.time()
    folder = build_world(args.out, args.seed, world=WORLDS[args.world])
    print(f"wrote {folder} in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
