"""`python -m nat_models` prints what na2d runs on here and why."""

import torch

from .ops import explain

print(explain())
if torch.accelerator.is_available():
    for rpb in (True, False):
        print(explain(torch.accelerator.current_accelerator(), rpb=rpb))
