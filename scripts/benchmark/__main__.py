"""Speed and memory of neighborhood attention and its networks, measured side by side with their peers.

    python -m scripts.benchmark                     # op: the operator at NAT-Tiny's four levels
    python -m scripts.benchmark layer --batch 8     # the attention layer against timm's shifted-window attention
    python -m scripts.benchmark model --batch 8     # networks, images per second
    python -m scripts.benchmark step --batch 8      # training steps, with AdamW; --dtype bfloat16 is autocast
    python -m scripts.benchmark memory --batch 8    # networks, peak memory of a forward and of a step
    python -m scripts.benchmark growth              # networks, time per pixel from 224 to 1024 px
    python -m scripts.benchmark gemm                # networks against their own linear layers and convolutions alone
    python -m scripts.benchmark dtype               # networks, bfloat16 against float32
    python -m scripts.benchmark compiled            # networks, eager, fused and compiled; compiling takes minutes
    python -m scripts.benchmark runtime --batch 8   # networks in ONNX Runtime and OpenVINO, also one image at a time
    python -m scripts.benchmark field --batch 8     # networks that are chosen for CPUs, each in its fastest form
    python -m scripts.benchmark segmentation --threads 2  # UPerNet against transformers' with timm's Swin-Tiny
    python -m scripts.benchmark detection --threads 2     # Mask R-CNN against torchvision's with timm's Swin-Tiny
    python -m scripts.benchmark tiles               # which tile the blocked backend should use, forward and backward

Contestants are timed in one process, in turn; medians and ratios are printed, so that a drifting machine hurts everyone
alike. measure.py says how time and memory are measured. --json keeps the rows, --plot draws them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from nat_models.writing import write_atomically

from .measure import machine
from .plots import PLOTS, plot, print_table
from .runtime import FIELD_DTYPES
from .suites import MODELS, SUITES

RUNTIME_DTYPES = {"runtime": ("float32",), "field": FIELD_DTYPES}  # `runtime` has its forms in all dtypes beside it


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m scripts.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("suite", nargs="?", choices=SUITES, default="op")
    add("--batch", type=int, default=1)
    add("--device", default="cpu")
    add("--dtype", choices=["float32", "float16", "bfloat16", "float64"], help="float32; bfloat16 for the suite dtype")
    add("--threads", type=int, help="torch.set_num_threads; PyTorch's own default otherwise")
    add("--seconds", type=float, default=2.0, help="how long each contestant is run; it has 3 turns at least")
    add("--models", nargs="+", help=f"timm names, for {', '.join(MODELS)}")
    add("--json", type=Path, metavar="FILE", help="write the rows here too")
    add("--plot", type=Path, metavar="FILE", help="draw the rows to this PNG file")
    args = parser.parse_args(argv)
    if (args.suite, args.dtype) == ("dtype", "float32"):
        parser.error("the suite dtype compares another --dtype with float32.")
    if args.models and args.suite not in MODELS:
        parser.error(f"--models is for {', '.join(MODELS)}; {args.suite} runs no networks.")
    if args.plot and args.suite not in PLOTS:
        parser.error(f"--plot is for {', '.join(PLOTS)}; {args.suite} has none.")
    if args.suite in RUNTIME_DTYPES and args.device != "cpu":
        parser.error(f"--device must be cpu for {args.suite}, got {args.device}.")
    dtypes = RUNTIME_DTYPES.get(args.suite)
    if dtypes and args.dtype not in (None, *dtypes):
        parser.error(f"--dtype must be {' or '.join(dtypes)} for {args.suite}, got {args.dtype}.")
    for path in (args.json, args.plot):
        if path is not None and not path.parent.is_dir():  # better known now than after minutes
            parser.error(f"there is no folder {path.parent} for {path.name}.")
    args.models = args.models or MODELS.get(args.suite)
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.suite == "dtype" else "float32"))
    args.notes = []  # what a suite has to say beside its rows
    return args


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about = f"{machine(args.device)}; PyTorch {torch.__version__}, {args.dtype}, batch {args.batch}; {date.today()}"
    print(f"{args.suite}: {SUITES[args.suite].__doc__.splitlines()[0]}\n{about}")
    with torch.no_grad():
        rows = SUITES[args.suite](args)
    print_table(rows)
    for note in args.notes:
        print(f"note: {note}.")
    if args.json is not None:
        content = {"suite": args.suite, "about": about, "arguments": argv, "notes": args.notes, "rows": rows}
        write_atomically(args.json, json.dumps(content, indent=2))
    if args.plot is not None:
        write_atomically(args.plot, plot(args.suite, rows, about))


if __name__ == "__main__":
    main()
