"""What the tests of all tasks share: random inputs from a seed, points, a time limit, and unit vectors.

    pytest -m task3                       one task
    pytest --hidden-seed 7                other random inputs
    pytest --time-limit 20                seconds for the tests of one task together
    pytest --junitxml=points.xml          points and task of each test as properties

A task's tests use no other task's functions: where the code under test needs one, a plain stand-in is put in its place.
"""

import collections
import json
import os
import signal
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # the bonus runs on a CPU

import pytest  # noqa: E402
import torch  # noqa: E402

TASKS = [*(f"task{i}" for i in range(1, 7)), "bonus"]
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "given.json")) as file:
    TO_DO = json.load(file)["tasks"]  # a task that was given solved has no points
seconds = collections.Counter()  # that each task's tests have taken
stopped = {}  # task: why its tests were stopped


def pytest_addoption(parser):
    parser.addoption("--hidden-seed", type=int, default=0, help="seed of the tests' random inputs")
    parser.addoption("--time-limit", type=float, default=120.0, help="seconds for the tests of one task together")


def pytest_configure(config):
    for name in TASKS:
        config.addinivalue_line("markers", f"{name}: the task that this test belongs to")
    config.addinivalue_line("markers", "points(n): what this test is worth")


def task_of(item):
    """The task that a test belongs to, or None."""
    return next((name for name in TASKS if item.get_closest_marker(name)), None)


def pytest_collection_modifyitems(items):
    """A test's points are shared evenly by its cases."""
    cases = collections.Counter((item.path, item.originalname) for item in items)
    for item in items:
        points, task = item.get_closest_marker("points"), task_of(item)
        if points and task in TO_DO:
            item.user_properties += [("task", task), ("points", points.args[0] / cases[item.path, item.originalname])]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Stop a test when its task's time is over, so that an endless loop costs its own task alone."""
    task, limit = task_of(item), item.config.getoption("--time-limit")
    if task is None or not hasattr(signal, "setitimer"):  # Windows has none
        return (yield)

    def stop(*_):
        stopped[task] = f"{task} has used up its {limit:g} seconds. Is there an endless loop?"
        pytest.fail(stopped[task], pytrace=False)

    if seconds[task] >= limit:
        stop()
    start, before = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit - seconds[task], 1)  # every second from then on: code may catch the first
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        seconds[task] += time.monotonic() - start


def pytest_terminal_summary(terminalreporter):
    """One line per task: its points, and of how many. Before them, which tasks were stopped."""
    points, of = collections.Counter(), collections.Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            about = dict(report.user_properties)
            if "points" in about and (report.when == "call" or outcome != "passed"):
                of[about["task"]] += about["points"]
                points[about["task"]] += about["points"] * (outcome == "passed")
    for line in stopped.values():
        terminalreporter.write_line(line)
    for task in filter(of.get, TASKS):
        terminalreporter.write_line(f"{task:6}{points[task]:6.1f} of {of[task]:g}")
    tasks = [task for task in of if task != "bonus"]
    terminalreporter.write_line(f"{'sum':6}{sum(points[t] for t in tasks):6.1f} of {sum(of[t] for t in tasks):g}, bonus aside")


@pytest.fixture
def generator(request):
    return torch.Generator().manual_seed(request.config.getoption("--hidden-seed"))


@pytest.fixture
def rand(generator):
    """Random float64 numbers of a shape."""
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture
def units(rand):
    """Random float64 unit vectors of a shape."""
    return lambda *shape: torch.nn.functional.normalize(rand(*shape), dim=-1)
