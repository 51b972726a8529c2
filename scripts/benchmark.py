"""Speed of neighborhood attention against its peers, measured side by side.

    python scripts/benchmark.py                     # the operator at NAT-Tiny's four levels
    python scripts/benchmark.py layer --batch 8     # the attention layer against timm's shifted-window attention
    python scripts/benchmark.py model --batch 8     # networks, images per second
    python scripts/benchmark.py step --batch 8      # training steps: forward, backward, AdamW
    python scripts/benchmark.py tiles               # which tile the blocked backend should use, forward and backward

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
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock

from nat_models import NeighborhoodAttention2d
from nat_models.ops import blocked, cpu

# height, width, num_heads of NAT-Tiny's levels at 224 px; head_dim 32, kernel 7.
LEVELS = [(56, 56, 2), (28, 28, 4), (14, 14, 8), (7, 7, 16)]
HEAD_DIM, KERNEL = 32, (7, 7)
MODELS = ["swin_tiny_patch4_window7_224", "nat_tiny", "nat_mini", "convnext_tiny"]
DENSE, MASKED = "dense SDPA", "masked SDPA"


def interleaved(contestants: dict[str, Callable[[], object]], seconds: float, device: str) -> dict[str, float]:
    """Median milliseconds of each contestant; they take turns until `seconds` have passed, at least 5 rounds.

    A turn is a run of calls of some 10 ms, whose mean counts: what is short is timed warm, as in a network, and not
    in the wake of the contestant before it.
    """

    def turn(run: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device != "cpu":
            torch.accelerator.synchronize()
        return 1e3 * (time.perf_counter() - start) / calls

    calls = {}
    for name, run in contestants.items():
        turn(run, 2)
        calls[name] = max(1, round(10 / turn(run, 2)))
    times = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, run in contestants.items():
            times[name].append(turn(run, calls[name]))
    return {name: statistics.median(t) for name, t in times.items()}


def _inputs(args: argparse.Namespace, height: int, width: int, num_heads: int) -> tuple[torch.Tensor, ...]:
    """qkv, grad_output and rpb of one level."""
    dd = dict(device=args.device, dtype=args.dtype)
    qkv = torch.randn(args.batch, height, width, 3, num_heads, HEAD_DIM, **dd)
    return qkv, torch.randn(args.batch, height, width, num_heads, HEAD_DIM, **dd), torch.randn(num_heads, 13, 13, **dd)


def op(args: argparse.Namespace) -> list[dict]:
    """Forward and backward of the operator at each level, against dense attention over the whole map and SGEMM."""
    rows = []
    a = torch.randn(2048, 2048, device=args.device, dtype=args.dtype)
    window = (KERNEL, (1, 1), HEAD_DIM**-0.5)
    for height, width, num_heads in LEVELS:
        qkv, grad, rpb = _inputs(args, height, width, num_heads)
        q, k, v = qkv.unbind(3)
        mask = torch.randn(1, num_heads, height * width, height * width, device=args.device, dtype=args.dtype)

        def dense(attn_mask=None, q=q, k=k, v=v):
            heads_first = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*heads_first, attn_mask=attn_mask)

        contestants = {
            "blocked": partial(blocked.na2d, q, k, v, rpb, *window),
            DENSE: dense,
            MASKED: partial(dense, mask),
            "GEMM": partial(torch.mm, a, a),
        }
        if args.device == "cpu" and cpu.available()[0]:
            ops = torch.ops.nat_models
            contestants["native"] = partial(ops.na2d_packed, qkv, rpb, *window)
            contestants["native backward"] = partial(ops.na2d_packed_backward, grad, qkv, rpb, *window)
        ms = interleaved(contestants, args.seconds, args.device)
        row = {"map": f"[{args.batch}, {height}, {width}, {num_heads}, {HEAD_DIM}]"}
        row |= {f"{name} ms": t for name, t in ms.items() if name != "GEMM"}
        row |= {f"blocked / {name}": ms["blocked"] / ms[name] for name in (DENSE, MASKED)}
        if "native" in ms:
            gemm = 2 * 2048**3 / ms["GEMM"]
            flops = 2 * args.batch * height * width * num_heads * KERNEL[0] * KERNEL[1] * HEAD_DIM
            both = ms["native"] + ms["native backward"]
            row |= {f"{name} / native": ms[name] / ms["native"] for name in ("blocked", DENSE)}
            row |= {"forward, of GEMM": 2 * flops / ms["native"] / gemm, "both, of GEMM": 7 * flops / both / gemm}
        rows.append(row)
    return rows


def layer(args: argparse.Namespace) -> list[dict]:
    """Projections and attention at Swin-Tiny's shapes, against timm's shifted windows."""
    rows = []
    for dim, size in ((96, 56), (192, 28), (384, 14), (768, 7)):
        dd = dict(device=args.device, dtype=args.dtype)
        x = torch.randn(args.batch, size, size, dim, **dd)
        ours = NeighborhoodAttention2d(dim, dim // HEAD_DIM, **dd)
        swin = SwinTransformerBlock(dim, (size, size), dim // HEAD_DIM, HEAD_DIM, window_size=7, shift_size=3, **dd)
        contestants = {"NAT": partial(ours, x), "Swin": partial(swin._attn, x)}
        contestants["projections"] = lambda f=ours, x=x: f.proj(f.qkv(x)[..., : x.shape[-1]])
        ms = interleaved(contestants, args.seconds, args.device)
        row = {"input": str([*x.shape])} | {f"{name} ms": t for name, t in ms.items()}
        rows.append(row | {"Swin / NAT": ms["Swin"] / ms["NAT"]})
    return rows


def model(args: argparse.Namespace) -> list[dict]:
    """Networks in evaluation, eager, 224 px."""
    x = torch.randn(args.batch, 3, 224, 224, device=args.device, dtype=args.dtype)
    contestants = {}
    for name in args.models:
        network = timm.create_model(name, device=args.device, dtype=args.dtype).eval()
        contestants[name] = partial(network, x)
    return _per_second(args, interleaved(contestants, len(contestants) * args.seconds, args.device))


def step(args: argparse.Namespace) -> list[dict]:
    """Training steps at 224 px with stochastic depth 0.2: forward, backward, AdamW."""
    x = torch.randn(args.batch, 3, 224, 224, device=args.device, dtype=args.dtype)
    contestants = {}
    for name in args.models:
        network = timm.create_model(name, drop_path_rate=0.2, device=args.device, dtype=args.dtype).train()
        optimizer = torch.optim.AdamW(network.parameters())

        @torch.enable_grad()
        def run(network=network, optimizer=optimizer):
            network(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        contestants[name] = run
    return _per_second(args, interleaved(contestants, len(contestants) * args.seconds, args.device))


def _per_second(args: argparse.Namespace, ms: dict[str, float]) -> list[dict]:
    first = next(iter(ms))
    return [
        {"model": name, "ms": t, "images/s": 1e3 * args.batch / t, f"speed over {first}": ms[first] / t}
        for name, t in ms.items()
    ]


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
        qkv, grad, rpb = _inputs(args, height, width, num_heads)
        q, k, v = qkv.unbind(3)
        fixed = (q, k, v, rpb, KERNEL, (1, 1), HEAD_DIM**-0.5)
        choices = {f"{tile} x {tile}": (tile, 0) for tile in (4, 7, 8, 14) if tile < height}
        if height <= 28:
            choices["whole map"] = (max(height, width), 10**9)
        grads = torch.empty_like(grad), torch.empty_like(grad), torch.empty_like(grad)
        for direction, run, inputs in (
            ("forward", blocked.na2d, fixed),
            ("backward", blocked.na2d_backward, (grad, *fixed, grads)),
        ):

            def contestant(choice, run=run, inputs=inputs):
                with _tiling(*choice):
                    return run(*inputs)

            contestants = {name: lambda c=choice, f=contestant: f(c) for name, choice in choices.items()}
            medians = interleaved(contestants, args.seconds, args.device)
            name = f"{direction} [{args.batch}, {height}, {width}, {num_heads}, {HEAD_DIM}]"
            rows.append({"map": name, **{f"{c} ms": ms for c, ms in medians.items()}})
    return rows


SUITES = {"op": op, "layer": layer, "model": model, "step": step, "tiles": tiles}


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
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names, for model and step")
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
