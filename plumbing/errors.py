"""The errors of this repository, and the check for numbers that are not finite. Everything else may import this file."""

import torch


class GraceError(ValueError):
    """Something the user can put right: the message says what and how. Shown without a traceback."""


class NotFinite(GraceError):
    """A number that no update may be made of."""


def require_finite(what, *tensors):
    """Raises NotFinite, naming it, unless every number in the tensors is finite."""
    if not all(bool(torch.isfinite(x).all()) for x in tensors):
        raise NotFinite(f"{what} is not finite")


def first_line(error):
    """What a library says went wrong, without its advice to developers."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
