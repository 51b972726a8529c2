"""Prints versions, how many published weights are cached, and what na2d runs on here and why."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import timm
import torch

from .. import __version__
from ..checkpoints import list_weights
from ..ops import explain


def add_flags(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    try:
        natten = version("natten")
    except PackageNotFoundError:
        natten = "not installed"
    print(f"nat_models {__version__}, torch {torch.__version__}, timm {timm.__version__}, natten {natten}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    known = list_weights()
    cached = sum(weights.cached() is not None for weights in known)
    print(f"{len(known)} published weights, {cached} of them cached (nat-models weights)\n")
    print(explain())
    if torch.accelerator.is_available():
        for rpb in (True, False):
            print(explain(torch.accelerator.current_accelerator(), rpb=rpb))
