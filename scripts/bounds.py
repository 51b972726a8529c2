"""Prints the lowest versions that the installed nat_models declares for what it depends on, as pins for pip.

    pip install --no-deps --editable . && pip install $(python scripts/bounds.py) && pip check

Extras are left out. So is torchvision, which timm depends on: each of its releases takes exactly one torch, and by
that pip finds the one of the torch pinned here (0.21.0 for 2.6.0).
"""

import re
from importlib.metadata import requires

for requirement in requires("nat_models"):
    if "extra ==" in requirement:
        continue
    bound = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)
    if bound is None:
        raise SystemExit(f"error: a dependency must be declared as name>=version, got {requirement!r}")
    print("{}=={}".format(*bound.groups()))
