"""A run's folder: what goes into --out and when, so that a run can be stopped, resumed and judged.

    OUT/model files       the trained policy, an ordinary checkpoint folder
    OUT/metrics.jsonl     one line per step
    OUT/rationales.md     the same texts' rationales along the training
    OUT/run.json          the configuration and the scores of the start
    OUT/summary.json      before, after, configuration; written last, so where it is, the run is finished

The training loop is `grace.train`; it calls `Run.record` after each step. How checkpoints are written is
checkpoint.py's matter, what stops a run guard.py's, what a reader sees report.py's.
"""

import dataclasses
import json
import os
import sys
import time

from tqdm import tqdm

from plumbing import ranks
from plumbing.checkpoint import append, digest, read_state, restore, save_checkpoint, save_model, write_atomically
from plumbing.errors import GraceError
from plumbing.guard import Signals, claim, delete_stale
from plumbing.report import show_rationales, show_skipped, show_summary, tensorboard, versions


class Run:
    """What stands around the steps of one training run. In the order of use:

        run = Run(config)                  claims --out; `run.checkpoint` is the one to resume from, or None
        run.check(rows)                    the checkpoint must be of these settings and rows
        run.begin(trainer, ...)            restores the checkpoint or clears --out, evaluates the start
        with run: run.record(metrics)      after every step; ends the process after a stop signal
        run.finish()                       saves the model, evaluates it, writes summary.json

    Raises GraceError for anything that the user can put right.
    """

    def __init__(self, config):
        for name in ("model", "data", "out"):
            if not getattr(config, name):
                raise GraceError(f"--{name} is missing")
        self.config, self.signals = config, Signals()
        self.checkpoint, self.state = claim(config), None
        self.skipped = [] if config.on_bad_row == "skip" else None  # load_rows lists unusable rows here
        self.metrics_file = self.path("metrics.jsonl")
        self.progress = {"before": None, "history": [], "seconds": 0.0}

    def path(self, name):
        """A file in --out."""
        return os.path.join(self.config.out, name)

    def check(self, rows):
        """Reads the checkpoint, if there is one; raises GraceError if it is of other settings or other training rows."""
        if self.checkpoint:
            self.state = read_state(self.checkpoint, self.config, rows)

    def begin(self, trainer, evaluate, rationales):
        """Put the trainer where the checkpoint left it, or start with a clean folder; then evaluate the start.

        evaluate    `(rationale=True) -> {name: score}` of the policy as it is now, on held-out rows
        rationales  `() -> {text: rationale}` of the texts that rationales.md shows
        """
        self.trainer, self.scores, self.rationales = trainer, evaluate, rationales
        if self.state:
            self.progress = restore(trainer, self.state, self.metrics_file)
            print(f"resumed from {self.checkpoint}")
        elif self.config.resume:
            print(f"no checkpoint under {self.config.out} to resume from: starting at step 0")
        delete_stale(self.config.out, self.checkpoint, keep_metrics=not self.config.overwrite)
        if self.skipped:
            write_atomically(self.path("skipped_rows.json"), json.dumps(self.skipped, indent=1))
            print(show_skipped(self.skipped, self.config.out))
        self.progress["rows"] = digest(trainer.rows)
        self.board = tensorboard(self.config.out, trainer.step_number) if ranks.first() else None
        self.progress["before"] = self.progress["before"] or self.evaluate()
        about = {"before": self.progress["before"], "config": dataclasses.asdict(self.config)}
        about["max_new_tokens"] = trainer.policy.reading.max_new_tokens
        write_atomically(self.path("run.json"), json.dumps(about, indent=2))

    def evaluate(self):
        """Scores of the policy as it is now; the texts' rationales are added to rationales.md."""
        scores, step, rationales = self.scores(), self.trainer.step_number, self.rationales()
        self.progress["history"].append((step, list(rationales.values())))
        write_atomically(self.path("rationales.md"), show_rationales(self.progress["history"], list(rationales)))
        tqdm.write(f"step {step:4d}  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        return scores

    def __enter__(self):
        start, hidden = self.trainer.step_number, not ranks.first()
        self.bar = tqdm(total=self.config.steps, initial=start, unit="step", dynamic_ncols=True, disable=hidden)
        self.seconds_before, self.started = self.progress["seconds"], time.time()
        self.saved, self.saved_at = self.trainer.step_number, time.time()
        self.signals.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        self.bar.close()
        # A step of one update fails before that update, so that the state is the last step's. Of several, some may be done.
        whole = self.config.minibatches * self.config.epochs == 1
        if isinstance(error, Exception) and whole and self.trainer.step_number > self.saved:
            try:
                self.save()
                print(f"step {self.trainer.step_number} was the last whole one and is saved: --resume continues from it")
            except GraceError as problem:  # a full disk stops the run and then the saving; the first error is raised
                if str(problem) != str(error):
                    print(problem)
        self.signals.__exit__(kind, error, trace)

    def save(self):
        """Write a checkpoint of the trainer as it is now."""
        save_checkpoint(self.trainer, self.config.out, **self.progress)
        self.saved, self.saved_at = self.trainer.step_number, time.time()

    def record(self, metrics):
        """Log one step; evaluate and write a checkpoint where one is due. Raises SystemExit after SIGTERM or Ctrl-C."""
        config, step = self.config, self.trainer.step_number
        self.bar.set_postfix({name: f"{metrics[name]:.2f}" for name in ("reward", "length", "distinct")})
        self.bar.update()
        if step == 1 and metrics.get("no_spread") == 1 and metrics["grad_norm"] == 0:
            tqdm.write(
                "step 1 had no gradient: all rollouts of a text got one reward, and "
                f"{metrics['truncated']:.0%} of rationales never end. Try more --max-new-tokens, another --instruction, "
                "--relative-length-penalty"
            )
        try:
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                metrics = metrics | {f"heldout_{k}": v for k, v in self.evaluate().items()}
        finally:  # a step that was made has its line, even where its evaluation fails
            append(self.metrics_file, json.dumps(metrics) + "\n")
        if self.board:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
        self.progress["seconds"] = self.seconds_before + time.time() - self.started
        # After the last step, too, unless nothing is to be saved: the evaluation that follows can be stopped, or fail.
        last = step == config.steps and (config.save_every or config.save_minutes)
        by_steps = last or (config.save_every and step % config.save_every == 0)
        by_time = config.save_minutes and time.time() - self.saved_at >= 60 * config.save_minutes
        # A signal to one rank, or one rank's clock, is enough for all.
        stop, by_time = map(max, zip(*ranks.exchange((self.signals.received, by_time))))
        if stop or by_steps or by_time:
            self.save()
        if stop:
            self.bar.close()
            print(f"stopped after step {step}, with a checkpoint: the same command with --resume continues")
            sys.exit(128 + stop)

    def finish(self):
        """Save the model, evaluate it with and without rationales, write summary.json. Returns the summary."""
        save_model(self.trainer.policy, self.config.out)  # first: the evaluation can take long, and be stopped
        summary = {"before": self.progress["before"], "after": self.evaluate()}
        summary["after_without_rationale"] = self.scores(rationale=False)  # what is the rationale worth?
        summary |= {
            "seconds": self.progress["seconds"],
            "seed": self.config.seed,
            "config": dataclasses.asdict(self.config),
            "reading": dataclasses.asdict(self.trainer.policy.reading),
            "versions": versions(),
        }
        write_atomically(self.path("summary.json"), json.dumps(summary, indent=2))
        print("\n" + show_summary(summary))
        return summary
