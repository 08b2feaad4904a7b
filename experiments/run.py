"""The paper's tables and figures in miniature, one command each; the records and docs/results.md are written by it.

    python experiments/run.py                        the names, their runs, and the minutes each takes by itself
    python experiments/run.py table1                 one table or figure: makes its missing runs, then its part of the page
    python experiments/run.py all                    all of them: four hours on two cores, where no run has a record
    python experiments/run.py table4 --out runs/x    your own runs, made anew: records, pictures and page go there

A run is made once: tables that share it share its record (experiments/results.jsonl).
"""

import argparse
import multiprocessing
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from experiments import page, pictures, records
from experiments.runs import TABLES


def each(function, runs, jobs):
    """Yields `function(run)` of each run as it is ready. Two processes of one thread beat one of two threads here."""
    if jobs == 1:
        yield from map(function, runs)
    else:
        with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
            yield from pool.imap_unordered(function, runs)


def missing(names, known):
    """The runs of these tables that have no record, each once."""
    wanted = {frozenset(run.items()): run for name in names for _, run in TABLES[name].runs()}
    return [run for key, run in wanted.items() if key not in known]


def make_missing(names, path, jobs):
    """Make every missing run: the worlds first, since runs share them. `-> all records of the file`."""
    runs = missing(names, records.read(path))
    one_of_each = {(run["world"], run["seed"]): run for run in runs}
    for world in each(records.world_of, list(one_of_each.values()), jobs):
        print(f"world at {world}", flush=True)
    for number, record in enumerate(each(records.make, runs, jobs), 1):
        records.keep(record, path)
        settings = " ".join(f"{name}={value}" for name, value in record["run"].items())
        print(f"{number}/{len(runs)}  {record['seconds']:.0f} s  {settings}", flush=True)
    return records.read(path)


def rows_of(name, known):
    """A table's records by row, `{label: [a record per seed]}`."""
    rows = {}
    for label, run in TABLES[name].runs():
        rows.setdefault(label, []).append(known[frozenset(run.items())])
    return rows


def show_names():
    """What each name runs, how much of it is missing, and the minutes it takes."""
    known = records.read(records.RESULTS)
    print(f"{'name':12} {'runs':>5} {'missing':>8} {'minutes of one core':>20}")
    for name in TABLES:
        runs = {frozenset(run.items()) for _, run in TABLES[name].runs()}
        minutes = sum(known[run]["seconds"] for run in runs if run in known) / 60
        print(f"{name:12} {len(runs):5} {len(missing([name], known)):8} {minutes:20.0f}")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(TABLES)}, or all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each [2]")
    parser.add_argument("--out", help="folder for records, page and pictures (default: experiments and docs)")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in (*TABLES, "all")]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(TABLES)}, all")
    if not args.names:
        return show_names()
    names = [name for name in TABLES if name in args.names or "all" in args.names]
    results, folder = records.RESULTS, os.path.join(records.ROOT, "docs")
    if args.out:
        results, folder = os.path.join(args.out, "results.jsonl"), args.out
        os.makedirs(folder, exist_ok=True)
    known = make_missing(names, results, args.jobs)
    tables = {name: rows_of(name, known) for name in names}
    for name in pictures.PICTURES.keys() & tables.keys():
        pictures.PICTURES[name](tables[name]).savefig(os.path.join(folder, f"{name}.png"))
    blocks = {name: text for name, rows in tables.items() if (text := page.block(name, TABLES[name], rows))}
    path = os.path.join(folder, "results.md")
    if args.out:  # the words of docs/results.md are about the committed records
        text = "\n\n".join(blocks.values()) + "\n"
        print(text)
    else:
        with open(path) as file:
            text = page.replaced(file.read(), blocks)
    with open(path, "w") as file:
        file.write(text)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
