"""The same numbers, sooner or in less memory. Nothing here is needed to understand the method."""

import importlib.util
import warnings

import torch

from plumbing.errors import first_line


def runs(what, trial):
    """Whether a Triton kernel runs here: `trial` calls it once. If Triton is installed and it does not, a warning says why."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        trial()
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception as error:  # a compiler's, a driver's, Triton's own: torch needs none of them
        warnings.warn(f"{what} is done in torch, which is slower: Triton cannot do it here ({first_line(error)})", stacklevel=3)
        return False
    return True
