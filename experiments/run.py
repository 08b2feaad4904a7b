"""The paper's tables and figures in miniature, one command each; docs/results.md is written from the records.

    python experiments/run.py table1                 one table or figure: makes the runs it lacks, then writes the page
    python experiments/run.py all                    all of them: two hours on two cores
    python experiments/run.py --list                 the names, their runs, and the minutes each takes on its own
    python experiments/run.py table1 --quick         one step a run, into a temporary folder: does it work at all?

A run is made once: tables that share it share its record (experiments/results/). With a backbone and data of your own
the same names work, and write under --out:

    python experiments/run.py table1 --model DIR_OR_HUB_ID --data FILE --heldout FILE --out runs/mine --jobs 1 \\
        --set lr=1e-6 batch=64 steps=1000 dtype=bfloat16

`real` trains the toy's model and --model on --data and evaluates both on real tasks (--data-dir: a folder a task).
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from record import ROOT, Place, make, revision  # noqa: E402  (puts the repository on the path)
from tables import EXPERIMENTS, table  # noqa: E402

from config import Config  # noqa: E402
from plumbing.errors import GraceError  # noqa: E402


def one_thread():
    """Two processes of one thread each are faster than one of two, at this size."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def each(function, items, jobs):
    """Results of `function(item)` as they come, in so many processes; a failure stops everything and is raised."""
    if jobs == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, one_thread) as pool:
        pending = [pool.submit(function, item) for item in items]
        try:
            for done in concurrent.futures.as_completed(pending):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _make(job):
    return make(*job)


def _world(job):
    run, place = job
    return place.world(run)


def wanted(names, place, seeds):
    """The runs of these experiments that have no record yet, each once."""
    runs = [run for name in names for _, run in EXPERIMENTS[name].runs(seeds)]
    return list({place.key(run): run for run in runs if place.read(run) is None}.values())


def make_all(names, place, seeds, jobs):
    """Make every missing run: the worlds first, since runs share them."""
    missing = wanted(names, place, seeds)
    worlds = {(run.get("world", "events"), run["seed"]): (run, place) for run in missing if place.on_toy(run)}
    for folder in each(_world, list(worlds.values()), jobs):
        print(f"world at {folder}", flush=True)
    start = time.time()
    for done, (key, seconds) in enumerate(each(_make, [(run, place) for run in missing], jobs), 1):
        print(f"{done}/{len(missing)}  {key}  {seconds:.0f} s", flush=True)
    if missing:
        print(f"{len(missing)} runs in {(time.time() - start) / 60:.1f} minutes")


def section(name, place, seeds, picture):
    """One experiment's part of the page, and its picture where a path is given; None if a run has no record."""
    experiment = EXPERIMENTS[name]
    found = {}
    for label, run in experiment.runs(seeds):
        if (record := place.read(run)) is None:
            return None
        found.setdefault(label, []).append(record)
    records = [r for group in found.values() for r in group]
    used, configs = sorted({r["run"]["seed"] for r in records}), [r["config"] for r in records if r["run"]["trainer"] != "none"]
    lines = [f"## {experiment.title}\n", f"The paper: {experiment.paper}\n"]
    if experiment.columns:
        lines += [*table(found, experiment.columns), ""]
    if experiment.lines:
        lines += [*experiment.lines(found), ""]
    if experiment.claims:
        lines += ["| claim | verdict |", "| --- | --- |"]
        lines += [f"| {claim.text} | {claim.verdict(found)} |" for claim in experiment.claims] + [""]
    if experiment.figure:
        if picture:
            experiment.figure(found, picture)
        lines.append(f"![{experiment.title}]({name}.png)\n")
    sizes = {key: sorted({c[key] for c in configs}) for key in ("batch", "rollouts", "steps", "lr")}
    told = ", ".join(f"{key} {'/'.join(f'{x:g}' for x in values)}" for key, values in sizes.items())
    minutes = sum(r["seconds"] for r in {place.key(r["run"]): r for r in records}.values()) / 60
    revisions = sorted({r["revision"][:7] + ("+" if r["revision"].endswith("+") else "") for r in records})
    note = f"{experiment.note} " if experiment.note else ""
    foot = f"`python experiments/run.py {name}`; seeds {', '.join(map(str, used))}; {told}; {minutes:.0f} minutes of one core; "
    return "\n".join([*lines, f"{note}{foot}revision {', '.join(revisions)}.", ""])


HEAD = """# The paper in miniature

Written by `python experiments/run.py`, from the records in `experiments/results/`: no figure in a table is typed. The embedded
worlds (toy.py), a model of 0.35 M parameters, greedy rationales, 256 held-out queries among 512 texts, half of them
negatives that copy the query's words. A figure is the mean over seeds, with the lowest and highest. A claim is counted
over all its comparisons, seeds times pairs of rows: *agrees* where all hold, *disagrees* where none does, and *cannot be
seen at this size* in between. *slots rightly named*: of what a text says, the share that its rationale says too; *names
that are true*: of what the rationale says, the share that the text says. Two runs were made at a time: *seconds* are rough.
"""


def page(place, seeds=None, folder=None, drawn=()):
    """docs/results.md: every experiment whose runs are all there. Pictures of those in `drawn` go to the folder."""
    path = lambda name: os.path.join(folder, f"{name}.png") if name in drawn else None
    sections = [section(name, place, seeds, path(name)) for name in EXPERIMENTS]
    return "\n".join([HEAD, *(text for text in sections if text)])


def parse(arguments):
    """The command line, as `(names, place, args)`. Raises GraceError for what cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(EXPERIMENTS)}, or all")
    parser.add_argument("--list", action="store_true", help="say what each name runs, and stop")
    parser.add_argument("--quick", action="store_true", help="one seed, one step a run")
    parser.add_argument("--seeds", help="comma-separated (default: the experiment's, mostly 0,1,2)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each [2]")
    parser.add_argument("--out", help="folder for records, page and pictures (default: experiments/results and docs)")
    for name, text in (
        ("model", "a backbone of your own"), ("data", "its training rows"), ("heldout", "triplets to evaluate on"),
        ("graded", "graded pairs"), ("data-dir", "real tasks, a folder each"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of config.py for every run")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in (*EXPERIMENTS, "all")]:
        raise GraceError(f"unknown experiment {unknown[0]!r}: choose from {', '.join(EXPERIMENTS)}, all")
    if not args.names and not args.list:
        raise GraceError(f"name an experiment: {', '.join(EXPERIMENTS)}, or all")
    names = [name for name in EXPERIMENTS if name in args.names or "all" in args.names]
    if "real" in names and not (args.model and args.data and args.data_dir):
        if "real" in args.names:
            raise GraceError("real needs --model, --data (triplets to train on) and --data-dir (a folder a task)")
        names.remove("real")
        print("left out: real, which needs --model, --data and --data-dir")
    if (args.model or args.data) and not args.out and names != ["real"]:
        raise GraceError("with a model or data of your own give --out: the committed records are of the embedded worlds")
    if args.model and not args.data:
        raise GraceError("--model needs --data: a backbone of your own has no embedded world")
    types = {f.name: f.type for f in dataclasses.fields(Config)}
    settings = {}
    for given in args.set:
        key, _, value = given.partition("=")
        if key not in types:
            raise GraceError(f"--set {given}: config.py has no setting {key!r}")
        settings[key] = value.lower() in ("true", "1", "yes") if types[key] is bool else types[key](value)
    args.seeds = [int(s) for s in args.seeds.split(",")] if args.seeds else [0] if args.quick else None
    place = Place(settings=settings, quick=args.quick)
    for name in ("model", "data", "heldout", "graded", "data_dir"):
        setattr(place, name, getattr(args, name))
    return names, place, args


def show_list(place):
    """What each name would run, and what its runs took."""
    print(f"{'name':10} {'runs':>5} {'missing':>8} {'minutes':>8}  (two cores)")
    for name, experiment in EXPERIMENTS.items():
        keys = {place.key(run): run for _, run in experiment.runs()}
        seconds = [r["seconds"] for run in keys.values() if (r := place.read(run))]
        minutes = f"{sum(seconds) / 120:8.1f}" if len(seconds) == len(keys) else f"{'?':>8}"
        print(f"{name:10} {len(keys):5} {len(wanted([name], place, None)):8} {minutes}  {experiment.title}")


def main(arguments):
    names, place, args = parse(arguments)
    if args.list:
        return show_list(place)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or (scratch if args.quick else None)
        if out:
            place.results, place.worlds = os.path.join(out, "results"), os.path.join(out, "worlds")
        folder = out or os.path.join(ROOT, "docs")
        make_all(names, place, args.seeds, args.jobs)
        text = page(place, args.seeds, folder, names)
        with open(os.path.join(folder, "results.md"), "w") as file:
            file.write(text)
        print(text if args.quick or args.out else f"wrote {os.path.join(folder, 'results.md')} at {revision()[:7]}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except GraceError as error:
        sys.exit(f"run.py: {error}")
