"""`python -m nat_models` prints what na2d runs on here and why."""

from .ops import explain

print(explain())
