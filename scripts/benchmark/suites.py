"""What is measured: suites, each a function of the flags that returns the rows of a table."""

import argparse
import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nat_models import NeighborhoodAttention2d, fuse
from nat_models.ops import use_backend
from nat_models.ops.backends import blocked, native

from .detection import detection
from .measure import Call, interleaved, peak_mib
from .plots import short
from .published import FIELD, TINY, TOP1, WINDOWED
from .runtime import field, runtime
from .segmentation import segmentation

# height, width, num_heads of NAT-Tiny's levels at 224 px; head_dim 32, kernel 7.
LEVELS = [(56, 56, 2), (28, 28, 4), (14, 14, 8), (7, 7, 16)]
HEAD_DIM, KERNEL = 32, (7, 7)
WINDOW = (KERNEL, (1, 1), HEAD_DIM**-0.5)  # as the backends take it: kernel_size, dilation, scale
LAYERS = [(96, 56), (192, 28), (384, 14), (768, 7)]  # channels and size of Swin-Tiny's maps
GEMM_SIZE = 2048
SIZE, SIZES = 224, [224, 384, 512, 768, 1024]  # px; SIZES of growth

MODELS = {  # what a suite of networks runs unless --models says otherwise
    "model": WINDOWED,
    "step": TINY,
    "memory": TINY,
    "growth": ["nat_tiny"],
    "gemm": ["nat_tiny"],
    "dtype": ["nat_tiny"],
    "segmentation": ["nat_tiny"],
    "detection": ["nat_tiny"],
    "compiled": [*TINY, "swin_small_patch4_window7_224"],
    "runtime": TINY,
    "field": FIELD,
}


def _inputs(args: argparse.Namespace, height: int, width: int, num_heads: int) -> tuple[Tensor, ...]:
    """qkv, grad_output and rpb of one level."""
    dd = dict(device=args.device, dtype=args.dtype)
    qkv = torch.randn(args.batch, height, width, 3, num_heads, HEAD_DIM, **dd)
    return qkv, torch.randn(args.batch, height, width, num_heads, HEAD_DIM, **dd), torch.randn(num_heads, 13, 13, **dd)


def _heads_first(*tensors: Tensor) -> Iterator[Tensor]:
    """[B, H, W, num_heads, head_dim] -> [B, num_heads, H * W, head_dim]."""
    return (x.flatten(1, 2).transpose(1, 2) for x in tensors)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(*_heads_first(q, k, v), attn_mask=mask)


def _flex(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Call:
    """Compiled flex_attention: the window as a BlockMask, rpb as score_mod, tokens row by row."""
    _, height, width, _, _ = q.shape

    def inside(query, key, length, kernel_size):
        start = (query - kernel_size // 2).clamp(0, length - kernel_size)
        return (key >= start) & (key < start + kernel_size)

    def in_window(batch, head, query, key):
        rows = inside(query // width, key // width, height, KERNEL[0])
        return rows & inside(query % width, key % width, width, KERNEL[1])

    def add_rpb(score, batch, head, query, key):
        # The block also holds pairs outside the window, whose offsets must stay in the table.
        row = (key // width - query // width + KERNEL[0] - 1).clamp(0, 2 * KERNEL[0] - 2)
        col = (key % width - query % width + KERNEL[1] - 1).clamp(0, 2 * KERNEL[1] - 2)
        return score + rpb[head, row, col]

    mask = create_block_mask(in_window, None, None, height * width, height * width, device=q.device)
    attend = torch.compile(flex_attention, dynamic=False)

    def run() -> Tensor:
        out = attend(*_heads_first(q, k, v), score_mod=add_rpb, block_mask=mask)
        return out.transpose(1, 2).unflatten(1, (height, width))

    return run


def _natten(q: Tensor, k: Tensor, v: Tensor) -> Call:
    import natten

    return partial(natten.na2d, q, k, v, kernel_size=KERNEL)


def _optional_peers(args: argparse.Namespace, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> dict[str, Call]:
    """The peers that may be missing or fail; who does is noted. Each must compute what blocked does."""
    peers = {}
    for name, make, bias in (("flex", partial(_flex, q, k, v, rpb), rpb), ("NATTEN", partial(_natten, q, k, v), None)):
        try:
            run = make()
            # Loose enough for any rounding, tight enough to tell another operator.
            tolerance = torch.finfo(args.dtype).eps ** 0.5
            torch.testing.assert_close(run(), blocked.na2d(q, k, v, bias, *WINDOW), atol=tolerance, rtol=tolerance)
        except Exception as error:  # a failing peer must not stop the suite
            lines = f"{type(error).__name__}: {error}".splitlines()
            args.notes.append(f"{name} is left out at {[*q.shape]}: {lines[0]}")
        else:
            peers[name] = run
    return peers


def op(args: argparse.Namespace) -> list[dict]:
    """The operator at each level against its peers, and as a fraction of the machine's GEMM rate.

    Masked SDPA is given its mask ready-made, dense SDPA attends to the whole map. Flex, with rpb, and NATTEN, which has
    none, take part where they run.
    """
    built, about = native.available() if args.device == "cpu" else (False, "it is for CPUs")
    ours = "native" if built else "blocked"
    if not built:
        args.notes.append(f"native is left out: {about}")
    a = torch.randn(GEMM_SIZE, GEMM_SIZE, device=args.device, dtype=args.dtype)
    ops = torch.ops.nat_models
    rows = []
    for height, width, num_heads in LEVELS:
        qkv, grad, rpb = _inputs(args, height, width, num_heads)
        q, k, v = qkv.unbind(3)
        mask = torch.randn(1, num_heads, height * width, height * width, device=args.device, dtype=args.dtype)
        forward = partial(ops.na2d_qkvpacked, qkv, rpb, *WINDOW)
        if built:  # as networks call it without gradients
            (kernel_size, dilation, scale), bias = WINDOW, native.as_rpb(rpb, args.dtype)
            forward = partial(ops.na2d_qkvpacked_inference, qkv, bias, *kernel_size, *dilation, scale)
        contestants = {
            ours: forward,
            f"{ours} backward": partial(ops.na2d_qkvpacked_backward, grad, qkv, rpb, *WINDOW),
            "GEMM": partial(torch.mm, a, a),
        }
        if built:
            contestants["blocked"] = partial(blocked.na2d, q, k, v, rpb, *WINDOW)
        peers = _optional_peers(args, q, k, v, rpb)
        contestants |= peers | {"dense SDPA": partial(_dense, q, k, v), "masked SDPA": partial(_dense, q, k, v, mask)}
        with use_backend(ours):
            ms = interleaved(contestants, args.seconds, args.device)
        gemm = 2 * GEMM_SIZE**3 / ms.pop("GEMM")
        flops = 2 * grad.numel() * KERNEL[0] * KERNEL[1]  # of one product over all query-key pairs
        alone, both = ms[ours], ms[ours] + ms[f"{ours} backward"]
        row = {"map": str([*grad.shape])} | {f"{name} ms": t for name, t in ms.items()}
        row |= {f"{name} / {ours}": t / alone for name, t in ms.items() if not name.startswith(ours)}
        row |= {"forward, of GEMM": 2 * flops / alone / gemm, "both, of GEMM": 7 * flops / both / gemm}
        rows.append(row | {"GEMM GFLOP/s": gemm / 1e6})
    if any("NATTEN ms" in row for row in rows):
        args.notes.append(f"NATTEN is {version('natten')}, without rpb")
    return rows


def _layer(kind: str, dim: int, size: int, args: argparse.Namespace, train: bool = False) -> Call:
    """A call of an attention with its projections, NAT's or Swin's, or of projections alone; `train`: also backward."""
    dd = dict(device=args.device, dtype=args.dtype)
    x = torch.randn(args.batch, size, size, dim, requires_grad=train, **dd)
    layer = forward = NeighborhoodAttention2d(dim, dim // HEAD_DIM, **dd)
    if kind == "projections":
        return lambda: layer.proj(layer.qkv(x)[..., :dim])
    if kind == "Swin":
        block = SwinTransformerBlock(dim, (size, size), dim // HEAD_DIM, HEAD_DIM, window_size=7, shift_size=3, **dd)
        layer, forward = block.attn, block._attn
    if not train:
        return partial(forward, x)
    inputs = [x, *layer.parameters()]
    return torch.enable_grad()(lambda: torch.autograd.grad(forward(x).square().mean(), inputs))


def layer(args: argparse.Namespace) -> list[dict]:
    """Projections and attention at Swin-Tiny's shapes, against timm's shifted windows: time, then peak memory."""
    rows = []
    for dim, size in LAYERS:
        contestants = {kind: _layer(kind, dim, size, args) for kind in ("NAT", "Swin", "projections")}
        ms = interleaved(contestants, args.seconds, args.device)
        row = {"input": str([args.batch, size, size, dim])} | {f"{name} ms": t for name, t in ms.items()}
        rows.append(row | {"Swin / NAT": ms["Swin"] / ms["NAT"]})
    makers = [
        partial(_layer, kind, *shape, args, train)
        for shape in LAYERS
        for train in (False, True)
        for kind in ("NAT", "Swin")
    ]
    try:
        peaks = iter(peak_mib(makers, args.device))
    except (OSError, AttributeError) as error:
        args.notes.append(f"peak memory cannot be read here: {error}")
        return rows
    for row in rows:
        for what in ("forward", "both"):
            nat, swin = next(peaks), next(peaks)
            row |= {f"NAT {what} MiB": nat, f"Swin {what} MiB": swin, f"NAT / Swin {what}": nat / swin}
    return rows


def _network(name: str, args: argparse.Namespace, size: int) -> Call:
    """A call of a network in evaluation, eager."""
    network = timm.create_model(name, device=args.device, dtype=args.dtype).eval()
    return partial(network, torch.randn(args.batch, 3, size, size, device=args.device, dtype=args.dtype))


def _step(name: str, args: argparse.Namespace, size: int) -> Call:
    """A training step of a network with stochastic depth 0.2: forward, backward, AdamW.

    In bfloat16 or float16 as people train in them: under autocast, on parameters in float32.
    """
    lowered = args.dtype in (torch.bfloat16, torch.float16)
    dd = dict(device=args.device, dtype=torch.float32 if lowered else args.dtype)
    network = timm.create_model(name, drop_path_rate=0.2, **dd).train()
    x = torch.randn(args.batch, 3, size, size, **dd)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)  # as the engine trains
    autocast = partial(torch.autocast, torch.device(args.device).type, args.dtype) if lowered else nullcontext

    @torch.enable_grad()
    def run() -> None:
        with autocast():
            loss = network(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def model(args: argparse.Namespace) -> list[dict]:
    """Networks by speed and published accuracy; how much faster than the peers that are not more accurate."""
    ms = interleaved({name: _network(name, args, SIZE) for name in args.models}, args.seconds, args.device)
    rows = []
    for name, t in ms.items():
        family, top1 = TOP1.get(name, (None, None))
        if top1 is None:
            args.notes.append(f"{name} has no published top-1 here: it is neither compared nor drawn")
        row = {"model": name, "family": family, "top-1": top1, "ms": t, "images/s": 1e3 * args.batch / t}
        for peer in ms:
            peer_family, peer_top1 = TOP1.get(peer, ("NAT", None))
            if peer_family != "NAT":
                row[f"over {short(peer)}"] = ms[peer] / t if top1 and top1 >= peer_top1 else None
        rows.append(row)
    return rows


def step(args: argparse.Namespace) -> list[dict]:
    """Training steps of networks, in a --dtype of 16 bits under autocast."""
    ms = interleaved({name: _step(name, args, SIZE) for name in args.models}, args.seconds, args.device)
    first = short(args.models[0])
    return [
        {"model": name, "ms": t, "images/s": 1e3 * args.batch / t, f"speed over {first}": ms[args.models[0]] / t}
        for name, t in ms.items()
    ]


def memory(args: argparse.Namespace) -> list[dict]:
    """Peak memory of a forward in evaluation and of a training step, beyond weights and optimizer state."""
    makers = [partial(make, name, args, SIZE) for name in args.models for make in (_network, _step)]
    try:
        peaks = peak_mib(makers, args.device)
    except (OSError, AttributeError) as error:
        raise SystemExit(f"error: peak memory cannot be read here: {error}") from error
    first = short(args.models[0])
    rows = []
    for name, forward, train in zip(args.models, peaks[::2], peaks[1::2], strict=True):
        row = {"model": name, "forward MiB": forward, "step MiB": train}
        rows.append(row | {f"forward / {first}": forward / peaks[0], f"step / {first}": train / peaks[1]})
    return rows


def growth(args: argparse.Namespace) -> list[dict]:
    """Time per pixel over image sizes; the largest `above least` of a network is its spread, max / min - 1."""
    rows = []
    for name in args.models:
        contestants = {size: _network(name, args, size) for size in SIZES}
        ms = interleaved(contestants, args.seconds, args.device)
        ns = {size: 1e6 * t / (args.batch * size**2) for size, t in ms.items()}
        for size in SIZES:
            row = {"model": name, "px": size, "ms": ms[size], "ns / pixel": ns[size]}
            rows.append(row | {"above least": ns[size] / min(ns.values()) - 1})
    return rows


def gemm(args: argparse.Namespace) -> list[dict]:
    """Networks against the sum of their linear layers and convolutions, each timed alone at its input's shape."""
    rows = []
    for name in args.models:
        network = _network(name, args, SIZE)
        counts, contestants = Counter(), {name: network}

        def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor, counts=counts, contestants=contestants):
            key = f"{module} of {[*inputs[0].shape]}"  # layers of one kind and shape are timed once, on repeated input
            counts[key] += 1
            contestants.setdefault(key, partial(module, torch.randn_like(inputs[0])))

        modules = [m for m in network.func.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        hooks = [module.register_forward_hook(record) for module in modules]
        network()
        for hook in hooks:
            hook.remove()
        ms = interleaved(contestants, args.seconds, args.device)
        layers = sum(count * ms[key] for key, count in counts.items())
        row = {"model": name, "model ms": ms[name], "layers": counts.total(), "layers ms": layers}
        rows.append(row | {"model / layers": ms[name] / layers})
    return rows


def dtype(args: argparse.Namespace) -> list[dict]:
    """Networks in a low precision (--dtype, or bfloat16) against float32 with the same weights, random as they are."""
    low = str(args.dtype).removeprefix("torch.")
    rows = []
    for name in args.models:
        network = timm.create_model(name, device=args.device).eval()
        lower = copy.deepcopy(network).to(args.dtype)
        x = torch.randn(args.batch, 3, SIZE, SIZE, device=args.device)
        logits = network(x)
        difference = (lower(x.to(args.dtype)).to(logits.dtype) - logits).abs().max().item()
        contestants = {"float32": partial(network, x), low: partial(lower, x.to(args.dtype))}
        ms = interleaved(contestants, args.seconds, args.device)
        row = {"model": name} | {f"{key} images/s": 1e3 * args.batch / t for key, t in ms.items()}
        row |= {f"{low} over float32": ms["float32"] / ms[low], "largest logit": logits.abs().max().item()}
        rows.append(row | {"largest difference": difference})
    return rows


def compiled(args: argparse.Namespace) -> list[dict]:
    """Networks eager, compiled, and compiled with Inductor's freezing, which packs weights; NAT in its fused form."""
    contestants = {}
    for name in args.models:
        network = _network(name, args, SIZE)
        modules, inputs = {"compiled": network.func, "frozen": copy.deepcopy(network.func)}, network.args
        contestants[name, "eager"] = network
        if TOP1.get(name, ("NAT", None))[0] == "NAT":
            modules = {"compiled": fuse(network.func), "frozen": fuse(network.func, freezing=True)}
            contestants[name, "fused"] = partial(modules["compiled"], *inputs)
        for form, module in modules.items():
            contestants[name, form] = partial(torch.compile(module), *inputs)
            # Read while a graph is traced: among the options of torch.compile it comes too late and does nothing.
            with torch._inductor.config.patch(freezing=form == "frozen"):
                contestants[name, form]()
    ms = interleaved(contestants, args.seconds, args.device)
    rows = []
    for (name, form), t in ms.items():
        row = {"model": name, "form": form, "ms": t, "images/s": 1e3 * args.batch / t}
        for peer in args.models:
            if TOP1.get(peer, ("NAT", None))[0] != "NAT":
                row[f"over {short(peer)}"] = ms[peer, "eager" if form == "fused" else form] / t
        rows.append(row)
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
    """Forward and backward of the blocked backend for several tile sizes; how its constants were chosen."""
    rows = []
    for height, width, num_heads in LEVELS:
        qkv, grad, rpb = _inputs(args, height, width, num_heads)
        fixed = (*qkv.unbind(3), rpb, *WINDOW)
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

            contestants = {name: partial(contestant, choice) for name, choice in choices.items()}
            medians = interleaved(contestants, args.seconds, args.device)
            rows.append({"map": f"{direction} {[*grad.shape]}", **{f"{c} ms": ms for c, ms in medians.items()}})
    return rows


SUITES = {
    f.__name__: f
    for f in (
        *(op, layer, model, step, memory, growth, gemm, dtype, compiled),
        *(runtime, field, segmentation, detection, tiles),
    )
}
