"""na2d, 2-D neighborhood attention: the operator, its backends and the choice among them."""

from . import registration  # noqa: F401  makes torch.ops.nat_models
from .backends import BACKENDS
from .functional import na1d, na2d, na2d_qkvpacked
from .selection import explain, use_backend
from .weights import na1d_av, na1d_qk, na2d_av, na2d_qk

__all__ = [
    "BACKENDS",
    "explain",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qkvpacked",
    "use_backend",
]
