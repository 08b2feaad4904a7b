"""What all tasks' tests share: random inputs by seed, points, and plain stand-ins for the other tasks' functions.

    pytest -m task3                       one task
    pytest --hidden-seed 7                other random inputs
    pytest --junitxml=points.xml          points and task of each test as properties

A task's tests use no other task's functions: where the code under test needs one, a plain stand-in is put there.
"""

import collections
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # the bonus runs on a CPU
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest  # noqa: E402
import torch  # noqa: E402

NAMES = [*(f"task{i}" for i in range(1, 7)), "bonus"]


def pytest_addoption(parser):
    parser.addoption("--hidden-seed", type=int, default=0, help="seed of the tests' random inputs")


def pytest_configure(config):
    for name in NAMES:
        config.addinivalue_line("markers", f"{name}: what this test belongs to")
    config.addinivalue_line("markers", "points(n): what this test is worth")


def pytest_collection_modifyitems(items):
    """A test's points are shared evenly by its cases."""
    cases = collections.Counter((item.path, item.originalname) for item in items)
    for item in items:
        if points := item.get_closest_marker("points"):
            task = next(name for name in NAMES if item.get_closest_marker(name))
            item.user_properties += [("task", task), ("points", points.args[0] / cases[item.path, item.originalname])]


def pytest_terminal_summary(terminalreporter):
    """A line a task: points got, of how many."""
    got, of = collections.Counter(), collections.Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            about = dict(report.user_properties)
            if "points" in about and (report.when == "call" or outcome != "passed"):
                of[about["task"]] += about["points"]
                got[about["task"]] += about["points"] * (outcome == "passed")
    for task in filter(of.get, NAMES):
        terminalreporter.write_line(f"{task:6}{got[task]:6.1f} of {of[task]:g}")
    tasks = [task for task in of if task != "bonus"]
    terminalreporter.write_line(f"{'sum':6}{sum(got[t] for t in tasks):6.1f} of {sum(of[t] for t in tasks):g}, bonus aside")


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
