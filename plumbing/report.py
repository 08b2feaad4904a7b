"""What a run shows: metrics read back, rationales along the training, scores before and after."""

import json
import os
import platform
import sys

import torch


def peak_memory_gb(device):
    """Peak memory so far: the GPU's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows, which has no CUDA-less path worth measuring here

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


def read_metrics(path):
    """The lines of a metrics.jsonl as `[(line, its dict)]`. Lines torn by a kill, and lines of other content, are skipped."""
    lines = []
    if os.path.isfile(path):
        with open(path, errors="replace") as file:
            for line in file:
                try:
                    metrics = json.loads(line)
                except ValueError:
                    continue
                if isinstance(metrics, dict) and "step" in metrics:
                    lines.append((line, metrics))
    return lines


def versions():
    """What a result depends on besides the code: `{name: version}` of Python and of the libraries in use."""
    names = "torch", "transformers", "datasets", "numpy", "sklearn"  # sklearn defines two of the evaluation's scores
    loaded = {name: sys.modules[name].__version__ for name in names if name in sys.modules}
    return {"python": platform.python_version(), **loaded}


def show_rationales(history, texts):
    """rationales.md: what the policy writes about the same texts along the training (Table 6)."""
    lines = ["# Rationales along the training\n"]
    for i, text in enumerate(texts):
        lines += [f"**{text}**\n", "| step | rationale |", "| ---: | --- |"]
        cells = ((step, " ".join(rationales[i].replace("|", " ").split())) for step, rationales in history)
        lines += [*(f"| {step} | {cell} |" for step, cell in cells), ""]
    return "\n".join(lines)


def show_skipped(skipped, out):
    """Rows of the data that are not used, for the terminal: a few of them."""
    lines = [f"skipped: {bad['file']}, {bad['where']}: {bad['why']}" for bad in skipped[:5]]
    lines += [f"{len(skipped)} rows skipped; {out}/skipped_rows.json lists them all"]
    return "\n".join(lines).encode("ascii", "backslashreplace").decode()  # what is wrong with a row may be its characters


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
