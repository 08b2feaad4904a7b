"""The paper's 16-task MTEB subset for a checkpoint, with the scores that mteb would give.

    python eval_mteb_subset.py --model DIR_OR_HUB_ID --tasks subset --out results.json

For each distinct text the encoder writes a rationale and pools text and rationale, with the same code
as training. A text is never read twice (Sprint asks for 202,000 texts, of which 8,932 differ), and
each vector is kept on disk, so an evaluation that was stopped resumes when it is started again.

Decoding is greedy unless a temperature is given. The released evaluation samples at temperature 1.0,
where the same text gets a different vector with each seed. `--no-rationale` is the paper's Base: the prompt alone.

In mteb's own harness: `mteb.evaluate(mteb_encoder(GraceEncoder("DIR")), [mteb.get_task("STSBenchmark")])`.
"""

import argparse
import json
import os
import sqlite3
import sys
import time

import numpy as np
import torch

from evaluation.encoder import GraceEncoder
from evaluation.tasks import FAMILIES, SUBSET, TASKS, choose_tasks, evaluate_tasks
from plumbing.errors import GraceError
from plumbing.run import versions, write_atomically

ALL = "all 16 tasks"


def mteb_encoder(encoder):
    """Wraps a `GraceEncoder`, with its own name and revision, for `mteb.evaluate` (mteb 2.x, which has to be installed)."""
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta
    from mteb.types import PromptType

    class MtebEncoder(AbsEncoder):
        def __init__(self):
            self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": encoder.name, "revision": encoder.revision})

        def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
            encode = encoder.encode_document if prompt_type == PromptType.document else encoder.encode
            return encode([text for batch in inputs for text in batch["text"]])

    return MtebEncoder()


def means(results):
    """Mean main score by family, and over the sixteen tasks if all of them are there."""
    families = {}
    for name, result in results.items():
        families.setdefault(TASKS[name].family, []).append(result["main_score"])
    mean = {family: float(np.mean(families[family])) for family in FAMILIES if family in families}
    if set(SUBSET) <= results.keys():
        mean[ALL] = float(np.mean([results[name]["main_score"] for name in SUBSET]))
    return mean


def table(results):
    """The results as text, scores times 100; with all sixteen tasks, the paper's mean beside ours."""
    lines = [f"{'task':30}{'family':16}{'score':>8}{'seconds':>10}"]
    for name, result in results.items():
        lines.append(f"{name:30}{TASKS[name].family:16}{100 * result['main_score']:8.2f}{result['seconds']:10.1f}")
    for name, score in means(results).items():
        paper = "  (55.89 in the paper: Qwen2.5-3B, supervised)" if name == ALL else ""
        lines.append(f"{'mean: ' + name:46}{100 * score:8.2f}{paper}")
    return "\n".join(lines)


def main(arguments):
    parser = argparse.ArgumentParser(
        "eval_mteb_subset.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--tasks", nargs="+", default=["subset"], help="task names or families, by commas or spaces, or subset [subset]")
    add("--data-dir", help="one folder per task, named as the task; without it, the hub at the pinned revisions")
    add("--out", help="JSON file of scores, settings, versions and counts")
    add("--cache", default="runs/cache", help="folder of the vectors read so far; --cache '' for none [runs/cache]")
    add("--no-rationale", action="store_true", help="embed the prompt alone")
    add("--temperature", type=float, default=0.0, help="sample rationales instead of decoding greedily [0]")
    add("--seed", type=int, default=0, help="seed of the sampling [0]")
    add("--instruction", help="the system message")
    add("--max-prompt-tokens", type=int, help="longer texts lose their end")
    add("--max-new-tokens", type=int, help="the longest rationale")
    add("--tokens-per-batch", type=int, default=8192, help="token budget of a batch; more on a large GPU [8192]")
    add("--dtype", choices=("float32", "bfloat16"), help="compute type [bfloat16 where that is faster, else float32]")
    add("--device", help="default: cuda, mps or cpu, the first that there is")
    args = parser.parse_args(arguments)
    try:
        evaluate(args)
    except (GraceError, OSError) as error:
        sys.exit(f"eval_mteb_subset.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("eval_mteb_subset.py: out of memory: the same command with a lower --tokens-per-batch goes on from here")
    except sqlite3.Error as error:
        advice = "make room, delete the file if it is damaged, or give another folder"
        sys.exit(f"eval_mteb_subset.py: a file under --cache {args.cache} cannot be used ({error}): {advice}")
    except ModuleNotFoundError as error:  # some scores are defined by scikit-learn and scipy
        sys.exit(f"eval_mteb_subset.py: {error}: pip install scikit-learn")
    except KeyboardInterrupt:  # what was read is in --cache, and what was scored in --out
        sys.exit(130)


def evaluate(args):
    """Run the chosen tasks; print each as it comes, and write `--out` anew."""
    chosen, start, results = choose_tasks(",".join(args.tasks)), time.time(), {}
    # What is missing, or cannot be written, is noticed now, not after hours.
    here = [name for name in TASKS if not args.data_dir or os.path.isdir(os.path.join(args.data_dir, name))]
    if absent := [name for name in chosen if name not in here]:
        has = ", ".join(here) or "none"
        raise GraceError(f"--data-dir {args.data_dir} has no folder {absent[0]}; of the tasks it has {has}")
    if args.out:
        if os.path.isdir(args.out):
            raise GraceError(f"--out {args.out} is a folder: give a file")
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        write_atomically(f"{args.out}.tmp", "")
        os.remove(f"{args.out}.tmp")
    encoder = GraceEncoder(
        args.model, args.cache or None, args.temperature, args.seed, not args.no_rationale, device=args.device,
        dtype=args.dtype, tokens_per_batch=args.tokens_per_batch, progress=True, instruction=args.instruction,
        max_prompt_tokens=args.max_prompt_tokens, max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    for name in chosen:
        results |= evaluate_tasks(encoder.encode, [name], args.data_dir, encoder.encode_document)
        print(f"{name}: {100 * results[name]['main_score']:.2f}  ({results[name]['seconds']:.1f} s)", flush=True)
        record = {
            "model": args.model,
            "chosen": chosen,
            "tasks": results,
            "means": means(results),
            "settings": encoder.settings,
            "data": args.data_dir or {name: [TASKS[name].path, TASKS[name].revision] for name in results},
            "texts": encoder.counts,
            "seconds": time.time() - start,
            "versions": versions(),
        }
        if args.out:
            write_atomically(args.out, json.dumps(record, indent=2))
    print("\n" + table(results))
    print(", ".join(f"{name} {count}" for name, count in record["texts"].items()) + f"; {record['seconds']:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
