"""A run: read the data, evaluate, take steps, look now and then, save, evaluate again.

Everything around `Trainer.step` that is not the method: what goes into the folder --out and when, so that a run
that is stopped can go on (checkpoint.py, guard.py) and one that goes wrong can be seen to (report.py, look.py).
"""

import dataclasses
import json
import os
import sys
import time

import torch
import transformers
from tqdm import tqdm

from checkpoint import append, digest, read_state, restore, save_checkpoint, save_model, write_atomically
from data import GraceError, load_rows
from guard import Signals, claim, clear, finished
from policy import Policy
from report import show_rationales, show_skipped, show_summary, tensorboard
from rollout import encode, text_loss
from tasks import evaluate_triplets


def run(config, make_trainer):
    """A whole run of `make_trainer(policy, reference, rows, config)`. Returns what summary.json holds.

    Raises GraceError for anything that the user can put right; SystemExit after SIGTERM or Ctrl-C.
    """
    for name in ("model", "data", "out"):
        if not getattr(config, name):
            raise GraceError(f"--{name} is missing")
    if done := finished(config):
        print(f"{config.out}: finished, after {done['config']['steps']} steps\n\n{show_summary(done)}")
        return done
    found = claim(config)
    skipped = [] if config.on_bad_row == "skip" else None
    rows, heldout, graded = load_rows(config, skipped)
    reading = {f: getattr(config, f) for f in ("instruction", "max_prompt_tokens", "max_new_tokens", "pooling")}
    metrics_file, progress = os.path.join(config.out, "metrics.jsonl"), {"before": None, "history": [], "seconds": 0.0}
    state = read_state(found, config, rows) if found else None
    policy = Policy.load(found or config.model, config.device, config.dtype, **reading)
    reference = Policy.load(config.model, config.device, config.dtype, **reading) if config.kl else None
    trainer = make_trainer(policy, reference, rows, config)
    if found:
        progress = restore(trainer, state, metrics_file)
        print(f"resumed from {found}")
    elif config.resume:
        print(f"no checkpoint under {config.out} to resume from: starting at step 0")
    clear(config.out, found)
    if skipped:
        write_atomically(os.path.join(config.out, "skipped_rows.json"), json.dumps(skipped, indent=1))
        print(show_skipped(skipped, config.out))
    progress["rows"] = digest(rows)
    M = len(rows[0].get("negative", []))
    print(
        f"{len(rows)} training rows ({M} negatives each), {len(heldout)} held-out, "
        f"{sum(p.numel() for p in policy.model.parameters()) / 1e6:.2f} M parameters on {policy.device}"
    )
    shown = [row.get("query") or row["text"] for row in (heldout or rows)[:6]]
    board = tensorboard(config.out, trainer.step_number)

    def look():  # where the policy stands, for the terminal, rationales.md and summary.json
        progress["history"].append((trainer.step_number, encode(policy, shown).rationales))
        write_atomically(os.path.join(config.out, "rationales.md"), show_rationales(progress["history"], shown))
        result = evaluate_triplets(policy, heldout, graded) if heldout else {"text_loss": text_loss(policy, shown)}
        tqdm.write(f"step {trainer.step_number:4d}  " + "  ".join(f"{k} {v:.3f}" for k, v in result.items()))
        return result

    progress["before"] = progress["before"] or look()
    told = {"before": progress["before"], "config": dataclasses.asdict(config), "max_new_tokens": policy.reading.max_new_tokens}
    write_atomically(os.path.join(config.out, "run.json"), json.dumps(told, indent=2))
    bar = tqdm(total=config.steps, initial=trainer.step_number, unit="step", dynamic_ncols=True)
    before_now, trained_from = progress["seconds"], time.time()
    with Signals() as signals:
        while trainer.step_number < config.steps:
            metrics = trainer.step()
            step = trainer.step_number
            bar.set_postfix({name: f"{metrics[name]:.2f}" for name in ("reward", "length", "distinct")})
            bar.update()
            if step == 1 and metrics.get("no_spread") == 1 and metrics["grad_norm"] == 0:
                tqdm.write(
                    "step 1 had no gradient: all rollouts of a text got one reward, and "
                    f"{metrics['truncated']:.0%} of rationales never end. Try more --max-new-tokens, another --instruction, "
                    "--relative-length-penalty"
                )
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                metrics |= {f"heldout_{k}": v for k, v in look().items()}
            append(metrics_file, json.dumps(metrics) + "\n")
            if board:
                for name, value in metrics.items():
                    board.add_scalar(name, value, step)
            progress["seconds"], stop = before_now + time.time() - trained_from, signals.asked
            if stop or (config.save_every and (step % config.save_every == 0 or step == config.steps)):
                save_checkpoint(trainer, config.out, **progress)
            if stop:
                bar.close()
                print(f"stopped after step {step}, with a checkpoint: the same command with --resume goes on")
                sys.exit(128 + stop)
    bar.close()
    save_model(policy, config.out)  # before a long evaluation, in which a run may still be stopped
    after = look()
    summary = {"before": progress["before"], "after": after}
    if heldout:  # the same checkpoint, with nothing written
        summary["after_without_rationale"] = evaluate_triplets(policy, heldout, graded, rationale=False)
    summary |= {
        "seconds": progress["seconds"],
        "seed": config.seed,
        "config": dataclasses.asdict(trainer.config),
        "reading": dataclasses.asdict(policy.reading),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_atomically(os.path.join(config.out, "summary.json"), json.dumps(summary, indent=2))
    print("\n" + show_summary(summary))
    return summary
