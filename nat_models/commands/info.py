"""Prints versions, models, and what na2d runs on here and why."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import timm
import torch

from .. import __version__
from ..ops import explain
from ..ops.backends import native


def add_flags(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    try:
        natten = version("natten")
    except PackageNotFoundError:
        natten = "not installed"
    print(f"nat_models {__version__}, torch {torch.__version__}, timm {timm.__version__}, natten {natten}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    models = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("nat_models.")]
    print(f"models: {', '.join(models)}\n")
    print(explain())
    if torch.accelerator.is_available():
        for rpb in (True, False):
            print(explain(torch.accelerator.current_accelerator(), rpb=rpb))
    built, why_not = native.available()
    if not built:
        print(f"\nThe C++ kernel is not in use: {why_not}.")
        if "NAT_MODELS_CPU_ISA" not in os.environ:  # else that is why
            print("Everything works without it, on a CPU several times slower. To have it, install a C++17 compiler")
            print(
                "(GCC or clang) and then this package again, from its source: pip install --force-reinstall --no-deps ."
            )
