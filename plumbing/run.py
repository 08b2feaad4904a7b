"""A run's folder: what stands in --out and when, so that a run can be stopped, resumed and judged.

    OUT/run.json                  the configuration, the scores of the start, and what the policy made of a few texts
    OUT/metrics.jsonl             a line per step
    OUT/rationales.md             the same texts' rationales along the training
    OUT/checkpoints/00000050/     to resume from: the policy as a model folder; trainer.pt: optimizer, step, progress
    OUT/model files               the trained policy, an ordinary checkpoint folder
    OUT/summary.json              before, after, configuration: the mark of a finished run, which needs no checkpoints any more

A checkpoint or a JSON file is written beside its place, flushed to the disk, and renamed: a kill or a power cut leaves the
old one or the new one. What is written in place, metrics.jsonl and the trained policy, a resumed run writes again from its
checkpoint on. No file is ever unpickled: weights are safetensors, trainer.pt is read with `weights_only=True`. Neither data
nor sampling needs a cursor: a step's batch and what it draws are functions of seed and step.

Of several ranks the first writes; the others read the same files.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import platform
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import ranks
from plumbing.errors import GraceError, first_line

# ---------------------------------------------------------------- files


@contextlib.contextmanager
def _writing(path):
    """Whatever goes wrong in here becomes a GraceError of one sentence."""
    try:
        yield
    except Exception as error:  # safetensors, torch and tokenizers each have their own for a full disk
        why = getattr(error, "strerror", None) or first_line(error)
        raise GraceError(f"{path}: cannot be written ({why}); make room, or give the right to write there") from error


@contextlib.contextmanager
def _replacing(path):
    """Yields a name beside `path` for a file or a folder to be written, which then takes that place, flushed to the disk."""
    beside = f"{path}.tmp"
    with _writing(path):
        try:
            _delete(beside)
            yield beside
            _flush(beside)
            os.replace(beside, path)
        finally:
            _delete(beside)


def _delete(path):
    """Delete a file or a folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def _flush(path):
    """Wait until a file, or a folder with all that is in it, is on the disk and not only on its way."""
    for name in (path, *Path(path).rglob("*")):
        handle = os.open(name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_atomically(path, text):
    """A reader of `path` sees the old file or the new one, never half of one. Raises GraceError where it cannot be written."""
    if ranks.first():
        with _replacing(path) as beside, open(beside, "w", encoding="utf-8") as file:
            file.write(text)


def read_json(path):
    """What a JSON file holds; None where there is no such file. Raises GraceError where it is damaged."""
    if os.path.isfile(path):
        with open(path) as file:
            try:
                return json.load(file)
            except ValueError as error:
                raise GraceError(f"{path}: cannot be read as JSON ({first_line(error)}); --overwrite starts anew") from error


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts. A line that a kill has torn, or that is being written right now, is skipped."""
    lines = []
    if os.path.isfile(path):
        with open(path) as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
    return lines


def checkpoints(out):
    """The checkpoint folders of a run, oldest first. The newest is whole; a kill can leave half of one that was to go."""
    folder = os.path.join(out, "checkpoints")
    names = sorted(n for n in os.listdir(folder) if n.isdigit()) if os.path.isdir(folder) else []
    return [os.path.join(folder, n) for n in names]


def digest(rows):
    """A fingerprint of the training rows: a file can change under its name."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- one run

WEIGHTS = "*.safetensors*", "adapter"
RESULTS = (  # of an earlier run: what --overwrite deletes, beside the files that the new run replaces at once
    *WEIGHTS, "checkpoints", "summary.json", "report.html", "README.md", "modules.json", "grace_module.py", "not_finite_step_*",
    "run.json",
)  # fmt: skip


class Run:
    """What stands around the steps of one training run; the loop is `grace.train`.

    checkpoint   the folder to resume from, or None
    summary      of a run that --resume finds finished, or None

    Raises GraceError, before anything is loaded, if --out holds a run or somebody's files, and neither --resume nor --overwrite
    says what becomes of them, or if --resume cannot continue what it holds. Nothing is deleted before `begin`.
    """

    def __init__(self, config):
        for name in ("model", "data", "out"):
            if not getattr(config, name):
                raise GraceError(f"--{name} is missing")
        self.tracker = tracker(config.log_to) if config.log_to else None
        self.config, self.progress = config, {"history": []}
        out, model = config.out, Path(config.model)
        if model.is_dir() and model.resolve().is_relative_to(Path(out).resolve()):
            raise GraceError(f"--out {out} is where --model is: give another folder")
        with _writing(f"--out {out}"):
            os.makedirs(out, exist_ok=True)
        self.checkpoint = self.summary = None
        if config.overwrite:
            return
        checkpoint, summary = (checkpoints(out) or [None])[-1], read_json(self.path("summary.json"))
        settings = (read_json(self.path("run.json")) or {}).get("config")
        kept = WEIGHTS if settings else (*RESULTS, "*.bin", "config.json")  # what a run may not replace unasked
        found = [path.name for pattern in kept for path in Path(out).glob(pattern)]
        if found and not (settings and (checkpoint or summary)):
            raise GraceError(f"--out {out} holds {found[0]}, which is of no run: give another folder, or --overwrite it")
        if checkpoint or summary:
            if not config.resume:
                advice = "--resume continues it, --overwrite starts anew, or give another folder"
                raise GraceError(f"--out {out} holds a run: {advice}")
            config.must_match(settings)
        self.checkpoint, self.summary = checkpoint, summary
        if self.summary and config.steps > self.summary["config"]["steps"]:
            advice = f"for more steps start another run from it, with --model {out}"
            raise GraceError(f"--out {out} holds a finished run of {self.summary['config']['steps']} steps: {advice}")

    def path(self, name):
        """A file in --out."""
        return os.path.join(self.config.out, name)

    def restore(self, trainer):
        """Put the trainer where the checkpoint left it, and metrics.jsonl too. Returns whether there is one."""
        if not self.checkpoint:
            if self.config.resume:
                print(f"no checkpoint under {self.config.out} to resume from: starting at step 0")
            return False
        try:
            state = torch.load(os.path.join(self.checkpoint, "trainer.pt"), map_location="cpu", weights_only=True)
        except Exception as error:  # each kind of damage raises its own
            raise GraceError(f"{self.checkpoint}: cannot be read ({first_line(error)}): delete it, and resume again") from error
        if self.config.steps < state["step"]:
            raise GraceError(f"--steps {self.config.steps}: the run under {self.config.out} has made {state['step']} already")
        if state["progress"]["rows"] != digest(trainer.rows):
            raise GraceError(f"{self.checkpoint} is of a run on other rows than {self.config.data} has now: give those rows")
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step_number, self.progress = state["step"], state["progress"]
        self._start(trainer)
        kept = [metrics for metrics in read_metrics(self.path("metrics.jsonl")) if metrics["step"] <= state["step"]]
        write_atomically(self.path("metrics.jsonl"), "".join(json.dumps(metrics) + "\n" for metrics in kept))
        print(f"resumed from {self.checkpoint}")
        self._describe()
        return True

    def begin(self, trainer, scores):
        """Clear the folder of an earlier run, then write down the scores of the start."""
        if ranks.first():
            for pattern in RESULTS:
                for path in sorted(Path(self.config.out).glob(pattern)):
                    _delete(path)
        write_atomically(self.path("metrics.jsonl"), "")
        self.progress |= {"before": scores, "max_new_tokens": trainer.policy.reading.max_new_tokens}
        self.progress["rows"] = digest(trainer.rows)
        self._start(trainer)

    def _start(self, trainer):
        """Start the clock, which goes on where the checkpoint stopped it, and what else shows the steps."""
        self.started = time.time() - self.progress.get("seconds", 0)
        self.board = tensorboard(self.config.out, trainer.step_number) if ranks.first() else None
        self.tracker = self.tracker if ranks.first() else None
        if self.tracker:
            name, resume = os.path.basename(os.path.abspath(self.config.out)), "allow" if trainer.step_number else "never"
            self.tracker.init(project="grace", name=name, config=dataclasses.asdict(self.config), resume=resume)

    def _describe(self):
        """Write run.json, for `status` and the page, and rationales.md."""
        about = {"config": dataclasses.asdict(self.config), **self.progress}
        write_atomically(self.path("run.json"), json.dumps(about))
        write_atomically(self.path("rationales.md"), show_rationales(self.progress["history"]))

    def note(self, step, scores, rationales, found):
        """Print the scores `{name: score}` and write down what `evaluation.probe` tells of the policy. Returns the scores."""
        progress = self.progress
        progress["history"].append((step, rationales))
        progress |= {"found": found, "found_before": progress.get("found_before", found)}
        self._describe()
        tqdm.write(f"step {step:4d}  " + "  ".join(f"{name} {score:.3f}" for name, score in scores.items()))
        return scores

    def log(self, metrics):
        """Add a step's line to metrics.jsonl."""
        path = self.path("metrics.jsonl")
        if ranks.first():
            with _writing(path), open(path, "a") as file:
                file.write(json.dumps(metrics) + "\n")
        if self.board:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, metrics["step"])
        if self.tracker:
            self.tracker.log({name: x for name, x in metrics.items() if name != "step"}, step=metrics["step"])

    def save(self, trainer):
        """Write a checkpoint: all that a resumed run needs, whole or not at all. The last two stay."""
        self.progress["seconds"] = time.time() - self.started
        if ranks.first():
            state = {"step": trainer.step_number, "progress": self.progress, "optimizer": trainer.optimizer.state_dict()}
            with _replacing(self.path(f"checkpoints/{trainer.step_number:08d}")) as folder:
                os.makedirs(folder)
                trainer.policy.save(folder)
                torch.save(state, os.path.join(folder, "trainer.pt"))
                _flush(self.path("metrics.jsonl"))  # its lines up to this step belong to the checkpoint
            for old in checkpoints(self.config.out)[:-2]:
                _delete(old)
        ranks.gather(None)  # a rank that ends sooner has torchrun end the first one while it writes

    def save_model(self, policy):
        """The trained model into --out; adapters, if it has any, into --out/adapter."""
        if ranks.first():
            with _writing(self.config.out):
                policy.save_result(self.config.out)
                _flush(self.config.out)

    def finish(self, trainer, after, without):
        """Write summary.json and delete the checkpoints. after, without: scores with and without rationales."""
        self.summary = {
            "before": self.progress["before"],
            "after": after,
            "after_without_rationale": without,
            "seconds": time.time() - self.started,
            "config": dataclasses.asdict(self.config),
            "reading": dataclasses.asdict(trainer.policy.reading),
            "versions": versions(),
        }
        write_atomically(self.path("summary.json"), json.dumps(self.summary, indent=2))
        if ranks.first():
            _delete(self.path("checkpoints"))
        if self.tracker:
            self.tracker.finish()
        print("\n" + show_summary(self.summary))
        return self.summary


# ---------------------------------------------------------------- what stops a run


class Signals(contextlib.AbstractContextManager):
    """The stop signal `received` so far (SIGTERM, or SIGINT by Ctrl-C) or 0; a second one ends the process at once."""

    def __enter__(self):
        self.received = 0
        self.handlers = {n: signal.signal(n, self._receive) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        self.received = number
        for n in self.handlers:
            signal.signal(n, signal.SIG_DFL)
        if ranks.first():  # not by print: the signal may have come in the middle of one
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving. Again: end at once.\n".encode())


def save_batch(path, trainer):
    """Write a trainer's last batch as JSON for a person to read: each text, its rationales, and each one's figures."""
    batch, groups = trainer.batch, []
    texts = [(role, text) for role in trainer.config.roles for text in batch.texts[role]]
    figures = {"finished": batch.rollouts.finished, **batch.figures}  # each [N, K]
    for i, (role, text) in enumerate(texts):
        rationales = trainer.policy.tokenizer.batch_decode(batch.rollouts[i : i + 1].rationales()[0])
        rollouts = [
            {"rationale": rationale, **{name: x[i, k].item() for name, x in figures.items()}}
            for k, rationale in enumerate(rationales)
        ]
        groups.append({"role": role, "text": text, "rollouts": rollouts})
    write_atomically(path, json.dumps(groups, indent=1))


# ---------------------------------------------------------------- what a run shows


def peak_memory_gb(device):
    """Peak memory so far: the GPU's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


def versions():
    """What a result depends on besides the code: `{name: version}` of Python and of the libraries in use."""
    names = "torch", "transformers", "datasets", "numpy", "sklearn"  # sklearn defines some of the evaluation's scores
    loaded = {name: sys.modules[name].__version__ for name in names if name in sys.modules}
    return {"python": platform.python_version(), **loaded}


def show_rationales(history):
    """rationales.md: the same texts' rationales along the training (Table 6). history: `[(step, {text: rationale})]`."""
    lines = ["# Rationales along the training\n"]
    for text in history[0][1]:
        lines += [f"**{text}**\n", "| step | rationale |", "| ---: | --- |"]
        cells = ((step, " ".join(rationales[text].replace("|", " ").split())) for step, rationales in history)
        lines += [*(f"| {step} | {cell} |" for step, cell in cells), ""]
    return "\n".join(lines)


def show_summary(summary):
    """Before, after, and after without rationales, as a table for the terminal."""
    names = list(summary["after"])
    width = {name: max(12, len(name) + 2) for name in names}
    lines = [f"{'':24}" + "".join(f"{name:>{width[name]}}" for name in names)]
    for moment in ("before", "after", "after_without_rationale"):
        if scores := summary.get(moment):
            cells = (f"{scores[name]:{width[name]}.3f}" if name in scores else " " * width[name] for name in names)
            lines.append(f"{moment.replace('_', ' '):24}" + "".join(cells))
    return "\n".join(lines)


def tensorboard(out, step):
    """A TensorBoard writer where that is installed, else None: metrics.jsonl has the same figures.

    What a run that was killed later wrote for steps after `step` is dropped.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out, purge_step=step + 1)


def tracker(name):
    """trackio or wandb: what is used of them here, `init`, `log` and `finish`, is the same in both."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise GraceError(f"--log-to {name}: pip install {name} ({first_line(error)})") from error
