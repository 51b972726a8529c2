"""How the benchmark measures: times of contestants that alternate, peak memory, and on what machine."""

import ctypes
import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

Call = Callable[[], object]


def interleaved(contestants: dict[str, Call], seconds: float, device: str) -> dict[str, float]:
    """Median milliseconds of a call of each contestant; they alternate, turn by turn.

    A turn is one call that is not timed and then some whose mean counts: as many as fill 10 ms, and of longer calls up
    to 5 within half a second. So what counts is the steady state, as of a contestant alone, and not the call that finds
    caches and heap full of what others left. The next turn is of whoever has run the shortest, until each has had
    `seconds` and 3 turns: one that takes seconds a call has few turns and holds nobody up.
    """

    def clock(run: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    calls = {}
    for name, run in contestants.items():
        clock(run, 1)
        estimate = clock(run, 2) / 2
        calls[name] = max(1, round(0.01 / estimate), min(5, round(0.5 / estimate)))
    spent, times = dict.fromkeys(contestants, 0.0), {name: [] for name in contestants}
    while waiting := [name for name in contestants if spent[name] < seconds or len(times[name]) < 3]:
        name = min(waiting, key=spent.get)
        untimed, timed = clock(contestants[name], 1), clock(contestants[name], calls[name])
        spent[name] += untimed + timed
        times[name].append(1e3 * timed / calls[name])
    return {name: statistics.median(t) for name, t in times.items()}


def peak_mib(makers: Sequence[Callable[[], Call]], device: str) -> list[float]:
    """MiB that a call of each needs at its peak, beyond what was held before it.

    On a CPU this is the growth of resident memory, in a process of its own and read from Linux: what any library
    touches is seen, also the scratch of the C++ kernel and of oneDNN, of which PyTorch's profiler knows nothing. On an
    accelerator it is what PyTorch's allocator hands out. Outputs and gradients are counted. What stays from a first
    call is not: weights, optimizer state, scratch that threads keep for the next call, loaded code.

    Args:
        makers: Each makes a call; picklable, as it does so in another process.

    Raises:
        OSError, AttributeError: The system or the device does not tell; on a CPU this needs Linux and glibc.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return list(pool.map(_peak_mib, makers, [device] * len(makers)))


@torch.no_grad()
def _peak_mib(make: Callable[[], Call], device: str) -> float:
    if device != "cpu":
        memory = torch.get_device_module(device)
        run = make()
        run()
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
        run()
        return (memory.max_memory_allocated(device) - before) / 2**20
    # Blocks from 64 KiB on become mappings of their own, gone when freed: what glibc keeps of freed blocks would count.
    # It may still fill holes of its heap and keep those, which can only add, so the least of three calls is taken.
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    run = make()
    run()
    peaks = []
    for _ in range(3):
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _peak_resident_kib()
        run()
        peaks.append(_peak_resident_kib() - before)
    return min(peaks) / 1024


def _peak_resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"
