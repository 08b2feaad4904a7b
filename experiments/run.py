"""The paper's tables and figures in miniature, one command each; docs/results.md is written from the records.

    python experiments/run.py table1                 one table or figure: makes its missing runs, then writes the page
    python experiments/run.py all                    all of them: about five hours on two cores
    python experiments/run.py --list                 the names, their runs, and the minutes each takes by itself
    python experiments/run.py table1 --quick         one step per run, into a temporary folder: does it work at all?

A run is made once: tables that share it share its record (experiments/results/). With a backbone and data of your own
the same names work, and write under --out:

    python experiments/run.py table1 --model DIR_OR_HUB_ID --data FILE --heldout FILE --out runs/mine --jobs 1 \\
        --set lr=1e-6 batch=64 steps=1000 dtype=bfloat16

`real` trains the toy's model and --model on --data and evaluates both on real tasks (--data-dir: a folder per task).
The committed records of real text were made with `--out experiments`.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time

from page import whole_page
from record import ROOT, Place, make, revision  # puts the repository on the path
from tables import EXPERIMENTS, REAL

from config import Config
from plumbing.errors import GraceError


def one_thread():
    """At this size two processes of one thread each are faster than one process of two threads."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def each(function, items, jobs):
    """Yields the results of `function(item)` as they are ready, from `jobs` processes; a failure stops all and is raised."""
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
    worlds = {(run.get("world"), run["seed"]): (run, place) for run in missing if place.on_toy(run)}
    for folder in each(_world, list(worlds.values()), jobs):
        print(f"world at {folder}", flush=True)
    start = time.time()
    for done, (key, seconds) in enumerate(each(_make, [(run, place) for run in missing], jobs), 1):
        print(f"{done}/{len(missing)}  {key}  {seconds:.0f} s", flush=True)
    if missing:
        print(f"{len(missing)} runs in {(time.time() - start) / 60:.1f} minutes")


def parse(arguments):
    """The command line, as `(names, place, args)`. Raises GraceError for what cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(EXPERIMENTS)}, or all")
    parser.add_argument("--list", action="store_true", help="list what each name runs, and stop")
    parser.add_argument("--quick", action="store_true", help="one seed, one step per run")
    parser.add_argument("--seeds", help="comma-separated (default: the experiment's, mostly 0,1,2)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each [2]")
    parser.add_argument("--out", help="folder for records, page and pictures (default: experiments/results and docs)")
    for name, text in (
        ("model", "a backbone of your own"), ("data", "its training rows"), ("heldout", "triplets to evaluate on"),
        ("graded", "graded pairs"), ("data-dir", "real tasks, a folder per task"),
        ("plain", "texts of another kind, a line each: how well are they still modelled?"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of config.py for every run")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in (*EXPERIMENTS, "all")]:
        raise GraceError(f"unknown experiment {unknown[0]!r}: choose from {', '.join(EXPERIMENTS)}, all")
    if not args.names and not args.list:
        raise GraceError(f"name an experiment: {', '.join(EXPERIMENTS)}, or all")
    names = [name for name in EXPERIMENTS if name in args.names or "all" in args.names]
    given = [name for name in names if name in REAL]
    if given and not (args.model and args.data and args.data_dir):
        if "all" not in args.names:
            raise GraceError(f"{given[0]} needs --model, --data (triplets to train on) and --data-dir (a folder a task)")
        names = [name for name in names if name not in REAL]
        print(f"left out: {', '.join(given)}, which need --model, --data and --data-dir")
    elif any(name.startswith("captions") for name in given) and not (args.heldout and args.plain):
        raise GraceError(f"{given[-1]} needs --heldout and --plain as well: experiments/captions.py writes both")
    if (args.model or args.data or args.plain) and not args.out:
        raise GraceError("with a model, data or texts of your own give --out: the committed records are not of these")
    if args.model and not args.data:
        raise GraceError("--model needs --data: a backbone of your own has no embedded world")
    types = {f.name: f.type for f in dataclasses.fields(Config)}
    settings = {}
    for pair in args.set:
        key, _, value = pair.partition("=")
        if key not in types:
            raise GraceError(f"--set {pair}: config.py has no setting {key!r}")
        settings[key] = value.lower() in ("true", "1", "yes") if types[key] is bool else types[key](value)
    args.seeds = [int(s) for s in args.seeds.split(",")] if args.seeds else [0] if args.quick else None
    place = Place(settings=settings, quick=args.quick)
    for name in ("model", "data", "heldout", "graded", "data_dir", "plain"):
        setattr(place, name, getattr(args, name))
    return names, place, args


def show_list(place):
    """What each name runs, how much of it is missing, and the minutes it takes."""
    print(f"{'name':20} {'runs':>5} {'missing':>8} {'minutes':>8}  (two cores)")
    for name, experiment in EXPERIMENTS.items():
        runs, missing = {place.key(run): run for _, run in experiment.runs()}, wanted([name], place, None)
        seconds = sum(record["seconds"] for run in runs.values() if (record := place.read(run)))
        minutes = f"{'?':>8}" if missing else f"{seconds / 120:8.1f}"
        print(f"{name:20} {len(runs):5} {len(missing):8} {minutes}  {experiment.title}")


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
        text = whole_page(EXPERIMENTS, place, args.seeds, {name: os.path.join(folder, f"{name}.png") for name in names})
        with open(os.path.join(folder, "results.md"), "w") as file:
            file.write(text)
        print(text if args.quick or args.out else f"wrote {os.path.join(folder, 'results.md')} at {revision()[:7]}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except GraceError as error:
        sys.exit(f"run.py: {error}")
