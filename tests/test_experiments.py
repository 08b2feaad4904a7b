"""The experiment's smoke run: every rung trains, and the page and picture come out."""

import runpy
import sys

import pytest


def test_repairs_quick(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the pictures need the extra `plot`")
    monkeypatch.setattr(sys, "argv", ["repairs.py", "--quick", "--out", str(tmp_path)])
    runpy.run_path("experiments/repairs.py", run_name="__main__")
    page = (tmp_path / "quick" / "repairs.md").read_text()
    assert page.count("| + ") == 3 and "| paper (constant rate, as published) |" in page and "nan" not in page
    assert (tmp_path / "quick" / "repairs.png").stat().st_size > 10_000
