"""Speed of neighborhood attention against its peers, measured side by side.

    python scripts/benchmark.py                # the operator at NAT-Tiny's four levels
    python scripts/benchmark.py --batch 8 --device cuda --dtype float16
    python scripts/benchmark.py tiles          # which tile the blocked backend should use, forward and backward

All contestants of a row run in one process, in turn, round after round; medians and ratios are printed, so that a
drifting machine hurts everyone alike.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from nat_models.ops import blocked

# height, width, num_heads of NAT-Tiny's levels at 224 px; head_dim 32, kernel 7.
LEVELS = [(56, 56, 2), (28, 28, 4), (14, 14, 8), (7, 7, 16)]
HEAD_DIM, KERNEL = 32, (7, 7)
DENSE, MASKED = "dense SDPA", "masked SDPA"


def interleaved(contestants: dict[str, Callable[[], object]], seconds: float, device: str) -> dict[str, float]:
    """Median milliseconds of each contestant; they take turns until `seconds` have passed, at least 5 rounds."""

    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.accelerator.synchronize()
        return 1e3 * (time.perf_counter() - start)

    for run in contestants.values():
        timed(run), timed(run)
    times = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, run in contestants.items():
            times[name].append(timed(run))
    return {name: statistics.median(t) for name, t in times.items()}


def op(args: argparse.Namespace) -> list[dict]:
    """The operator's forward at each level, against dense attention over the whole map with and without a mask."""
    rows = []
    for height, width, num_heads in LEVELS:
        dd = dict(device=args.device, dtype=args.dtype)
        q, k, v = torch.randn(args.batch, height, width, 3, num_heads, HEAD_DIM, **dd).unbind(3)
        rpb = torch.randn(num_heads, 13, 13, **dd)
        mask = torch.randn(1, num_heads, height * width, height * width, **dd)

        def dense(attn_mask=None, q=q, k=k, v=v):
            heads_first = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*heads_first, attn_mask=attn_mask)

        contestants = {
            "blocked": lambda q=q, k=k, v=v, rpb=rpb: blocked.na2d(q, k, v, rpb, KERNEL, (1, 1), HEAD_DIM**-0.5),
            DENSE: dense,
            MASKED: lambda dense=dense, mask=mask: dense(mask),
        }
        medians = interleaved(contestants, args.seconds, args.device)
        rows.append(
            {
                "map": f"[{args.batch}, {height}, {width}, {num_heads}, {HEAD_DIM}]",
                **{f"{name} ms": ms for name, ms in medians.items()},
                **{f"blocked / {name}": medians["blocked"] / medians[name] for name in (DENSE, MASKED)},
            }
        )
    return rows


@contextmanager
def _tiling(tile: int, whole_map_queries: int):
    previous = blocked._TILE, blocked._WHOLE_MAP_QUERIES
    blocked._TILE, blocked._WHOLE_MAP_QUERIES = tile, whole_map_queries
    try:
        yield
    finally:
        blocked._TILE, blocked._WHOLE_MAP_QUERIES = previous


def tiles(args: argparse.Namespace) -> list[dict]:
    """Forward and backward of the blocked backend for several tiles; behind its constants."""
    rows = []
    for height, width, num_heads in LEVELS:
        dd = dict(device=args.device, dtype=args.dtype)
        q, k, v, grad = torch.randn(args.batch, height, width, 4, num_heads, HEAD_DIM, **dd).unbind(3)
        rpb = torch.randn(num_heads, 13, 13, **dd)
        fixed = (q, k, v, rpb, KERNEL, (1, 1), HEAD_DIM**-0.5)
        choices = {f"{tile} x {tile}": (tile, 0) for tile in (4, 7, 8, 14) if tile < height}
        if height <= 28:
            choices["whole map"] = (max(height, width), 10**9)
        for direction, run in (("forward", blocked.na2d), ("backward", blocked.na2d_backward)):

            def contestant(choice, run=run, inputs=(fixed if direction == "forward" else (grad, *fixed))):
                with _tiling(*choice):
                    return run(*inputs)

            contestants = {name: lambda c=choice, f=contestant: f(c) for name, choice in choices.items()}
            medians = interleaved(contestants, args.seconds, args.device)
            name = f"{direction} [{args.batch}, {height}, {width}, {num_heads}, {HEAD_DIM}]"
            rows.append({"map": name, **{f"{c} ms": ms for c, ms in medians.items()}})
    return rows


SUITES = {"op": op, "tiles": tiles}


def machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name() if device.startswith("cuda") else device
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"


def print_table(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    show = lambda x: x if isinstance(x, str) else "" if x is None else f"{x:.3g}"  # noqa: E731
    cells = [[show(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, ["-" * w for w in widths], *cells):
        print("| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", choices=SUITES, default="op")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16", "float64"])
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; PyTorch's own default otherwise")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of each row")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    about = f"{machine(args.device)}; PyTorch {torch.__version__}, {args.dtype}, batch {args.batch}; {date.today()}"
    print(f"{args.suite}: medians of interleaved runs. {about}")
    with torch.no_grad():
        rows = SUITES[args.suite](args)
    print_table(rows)
    if args.json is not None:
        with tempfile.NamedTemporaryFile("w", dir=args.json.parent, delete=False) as file:
            json.dump({"suite": args.suite, "about": about, "command": sys.argv, "rows": rows}, file, indent=2)
        os.replace(file.name, args.json)


if __name__ == "__main__":
    main()
