"""The paper's tables and figures in miniature, one command each; the records and docs/results.md are written by it.

    python experiments/run.py table1                 one table or figure: makes its missing runs, then its part of the page
    python experiments/run.py all                    all of them: four to five hours on two cores, where no run has a record
    python experiments/run.py --list                 the names, their runs, and the minutes each takes by itself
    python experiments/run.py table1 --quick         one step per run, into a temporary folder: does it work at all?
    python experiments/run.py table4 --out runs/x    your own runs, made anew: records, pictures and page go there

A run is made once: tables that share it share its record (experiments/results/).
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments import page, pictures, records
from experiments.runs import TABLES


def one_thread():
    """At this size two processes of one thread each are faster than one process of two threads."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def each(function, runs, worlds, quick, jobs):
    """Yields the results of `function(run, worlds, quick)` as they are ready, from `jobs` processes; a failure stops all."""
    if jobs == 1:
        yield from (function(run, worlds, quick) for run in runs)
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), one_thread) as pool:
        pending = [pool.submit(function, run, worlds, quick) for run in runs]
        try:
            for done in concurrent.futures.as_completed(pending):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def runs_of(name, quick=False):
    """A table's runs, `[(label, run)]`; shortened ones are of seed 0."""
    runs = TABLES[name].runs()
    return list(dict((label, records.quickly(run)) for label, run in runs).items()) if quick else runs


def missing(names, known, quick=False):
    """The runs of these tables that have no record, each once."""
    wanted = {frozenset(run.items()): run for name in names for _, run in runs_of(name, quick)}
    return [run for key, run in wanted.items() if key not in known]


def make_all(names, folder, worlds, quick=False, jobs=2):
    """Make every missing run: the worlds first, since runs share them."""
    runs = missing(names, records.read_all(folder), quick)
    one_of_each = {(run["world"], run["seed"]): run for run in runs}
    for world in each(records.world_of, list(one_of_each.values()), worlds, quick, jobs):
        print(f"world at {world}", flush=True)
    for number, record in enumerate(each(records.make, runs, worlds, quick, jobs), 1):
        records.keep(record, folder)
        settings = " ".join(f"{name}={value}" for name, value in record["run"].items())
        print(f"{number}/{len(runs)}  {record['seconds']:.0f} s  {settings}", flush=True)


def rows_of(name, known, quick=False):
    """A table's records by row, `{label: [a record per seed]}`."""
    rows = {}
    for label, run in runs_of(name, quick):
        rows.setdefault(label, []).append(known[frozenset(run.items())])
    return rows


def show_list():
    """What each name runs, how much of it is missing, and the minutes it takes."""
    known = records.read_all(records.RESULTS)
    print(f"{'name':12} {'runs':>5} {'missing':>8} {'minutes of one core':>20}")
    for name in TABLES:
        runs = {frozenset(run.items()) for _, run in runs_of(name)}
        minutes = sum(known[run]["seconds"] for run in runs if run in known) / 60
        print(f"{name:12} {len(runs):5} {len(missing([name], known)):8} {minutes:20.0f}")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(TABLES)}, or all")
    parser.add_argument("--list", action="store_true", help="list what each name runs, and stop")
    parser.add_argument("--quick", action="store_true", help="one seed, one step per run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each [2]")
    parser.add_argument("--out", help="folder for records, page and pictures (default: experiments/results and docs)")
    args = parser.parse_args(arguments)
    if args.list:
        return show_list()
    if unknown := [name for name in args.names if name not in (*TABLES, "all")]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(TABLES)}, all")
    if not args.names:
        parser.error(f"name a table: {', '.join(TABLES)}, or all")
    names = [name for name in TABLES if name in args.names or "all" in args.names]
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or (scratch if args.quick else None)
        results, folder = (os.path.join(out, "results"), out) if out else (records.RESULTS, os.path.join(records.ROOT, "docs"))
        worlds = os.path.join(scratch if args.quick else records.ROOT, "runs")
        make_all(names, results, worlds, args.quick, args.jobs)
        known = records.read_all(results)
        blocks = {}
        for name in names:
            rows = rows_of(name, known, args.quick)
            if text := page.block(name, TABLES[name], rows):
                blocks[name] = text
            if name in pictures.PICTURES:
                pictures.PICTURES[name](rows).savefig(os.path.join(folder, f"{name}.png"))
        path = os.path.join(folder, "results.md")
        if out:  # the page's words are about the committed records
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
