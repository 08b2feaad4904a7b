"""What the tests of all tasks share: random inputs from a seed, points, and unit vectors.

    pytest -k task3                       one task
    pytest --hidden-seed 7                other random inputs

A task's tests use no other task's functions: where the code under test needs one, a plain stand-in is put in its place.
"""

import collections
import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--hidden-seed", type=int, default=0, help="seed of the tests' random inputs")


def pytest_configure(config):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the bonus runs on a CPU
    config.addinivalue_line("markers", "points(n): what this test is worth")


def pytest_collection_modifyitems(items):
    """A test's points are shared evenly by its cases."""
    cases = collections.Counter((item.path, item.originalname) for item in items)
    for item in items:
        points = item.get_closest_marker("points").args[0] / cases[item.path, item.originalname]
        item.user_properties.append((item.path.stem.removeprefix("test_"), points))


def pytest_terminal_summary(terminalreporter):
    """One line per task: its points, and of how many."""
    points, of = collections.Counter(), collections.Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            for task, worth in getattr(report, "user_properties", ()):  # a file that cannot be imported has none
                of[task] += worth
                points[task] += worth * (outcome == "passed")
    for task in sorted(of, key=lambda task: (task == "bonus", task)):
        terminalreporter.write_line(f"{task:6}{points[task]:6.1f} of {of[task]:g}")
    tasks = [task for task in of if task != "bonus"]
    terminalreporter.write_line(f"{'sum':6}{sum(points[t] for t in tasks):6.1f} of {sum(of[t] for t in tasks):g}, bonus aside")


@pytest.fixture
def generator(request):
    return torch.Generator().manual_seed(request.config.getoption("--hidden-seed", 0))


@pytest.fixture
def rand(generator):
    """Random float64 numbers of a shape."""
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture
def units(rand):
    """Random float64 unit vectors of a shape."""
    return lambda *shape: torch.nn.functional.normalize(rand(*shape), dim=-1)
