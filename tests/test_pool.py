"""Pooling against plain loops in float64, and the properties that masks must have: what a student's `pool.py` is graded by."""

import torch

from course.tests.test_task1 import *  # noqa: F403
from pool import unit, with_rationale


def test_halves_without_a_rationale_are_the_prompt():
    """Its gradient, too, in float32: the difference of two equal sums has no direction."""
    torch.manual_seed(0)
    prompt, g = (30 * torch.randn(4, 64)).requires_grad_(), torch.randn(4, 64)
    alone, both = unit(prompt), with_rationale(prompt, prompt, "halves")
    torch.testing.assert_close(both, alone)
    (expected,), (given,) = (torch.autograd.grad((g * h).sum(), prompt) for h in (alone, both))
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-7)
