"""Settings that are found by trying: the batch that fits in the memory, the learning rate that learns fastest."""

import dataclasses
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from matplotlib.figure import Figure

from ..errors import UserError
from ..writing import csv_text, write_atomically, writing
from .drawing import png
from .freezing import set_training
from .images import make_loader, read_batches
from .parts import make_accelerator, make_network, make_optimizer, prepare, with_global_batch
from .report import console, track
from .sampling import seed_step
from .settings import Settings
from .task import Task

LOW, HIGH, STEPS = 1e-7, 1.0, 100
SMOOTHING = 0.9  # of the losses, which differ from batch to batch more than from rate to rate
DIVERGED = 3.0  # times the least loss


def fit_batch(settings: Settings, task: Task, accelerator: Accelerator) -> Settings:
    """Settings with the largest batch, halved from batch_size, of which a step fits in the memory; grad_accum grows by
    as much, so the whole batch stays.

    Raises:
        UserError: Not even one image fits.
    """
    size, steps = settings.batch_size, settings.grad_accum
    while True:
        try:
            _try_step(dataclasses.replace(settings, batch_size=size), task, accelerator)
            break
        except RuntimeError as e:  # an allocation that fails is one, on a CPU too
            if not should_reduce_batch_size(e):
                raise
        clear_device_cache(garbage_collection=True)
        if size == 1 or size % 2:
            raise UserError(
                f"A step of {size} images does not fit in the memory; batch_size began at {settings.batch_size}."
            )
        size, steps = size // 2, steps * 2
    # The processes must agree; the one with the least memory decides.
    size = int(accelerator.gather(torch.tensor([size], device=accelerator.device)).min())
    steps = settings.grad_accum * (settings.batch_size // size)
    if size < settings.batch_size and accelerator.is_main_process:
        console.print(f"batch_size {settings.batch_size} does not fit in the memory: {size}, and grad_accum {steps}")
    return dataclasses.replace(settings, batch_size=size, grad_accum=steps, auto_batch_size=False)


def _try_step(settings: Settings, task: Task, accelerator: Accelerator) -> None:
    # Not all of `prepare`: what joins the processes would wait for one that has no memory for this step.
    model = make_network(settings, task, accelerator, initial_weights=False)
    images, _ = task.make_datasets(model)
    order = [(1, i % len(images)) for i in range(settings.batch_size)]
    (batch,) = read_batches(make_loader(images, settings.batch_size, sampler=order))
    batch = [part.to(accelerator.device) for part in batch]
    optimizer = make_optimizer(settings, model, lr=0.0)
    set_training(model)
    with accelerator.autocast():
        loss = sum(task.losses(model, batch).values())
    loss.backward()
    optimizer.step()


def find_lr(settings: Settings, task: Task) -> float:
    """Trains with a rate that grows at each update, and draws the loss over it: lr_finder.png and .csv in the output.

    Returns the rate at which the smoothed loss falls fastest, a good peak for a schedule with warm-up.

    Raises:
        UserError: The loss never falls.

    Source: Smith, WACV 2017, arXiv:1506.01186, section 3.3.
    """
    accelerator = make_accelerator(settings)
    settings = with_global_batch(dataclasses.replace(settings, ema_decay=None), accelerator)
    parts = prepare(settings, task, accelerator, initial_weights=True)
    network, optimizer = accelerator.unwrap_model(parts.model), parts.optimizer
    set_training(network)
    rates, losses, smooth, summed, batches = [], [], 0.0, 0.0, iter(())
    for step in track(range(STEPS * settings.grad_accum), "learning rates", accelerator.is_main_process):
        if (batch := next(batches, None)) is None:
            parts.order.begin(step + 1)
            batches = read_batches(parts.train_loader)
            batch = next(batches)
        rate = LOW * (HIGH / LOW) ** (len(rates) / (STEPS - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        seed_step(settings.seed, 1, step, accelerator.process_index)
        with accelerator.accumulate(parts.model):
            loss = sum(task.losses(parts.model, batch).values())
            accelerator.backward(loss)
            if accelerator.sync_gradients and settings.clip_grad is not None:
                accelerator.clip_grad_norm_(parts.model.parameters(), settings.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        summed += accelerator.reduce(loss.detach(), reduction="mean").item() / settings.grad_accum
        if not accelerator.sync_gradients:
            continue
        smooth = SMOOTHING * smooth + (1 - SMOOTHING) * summed
        mean, summed = smooth / (1 - SMOOTHING ** (len(rates) + 1)), 0.0
        if not math.isfinite(mean) or (losses and mean > DIVERGED * min(losses)):
            break
        rates.append(rate)
        losses.append(mean)
    best = steepest(rates, losses)
    if accelerator.is_main_process:
        output = Path(settings.output)
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            table = csv_text([("lr", "loss"), *zip(rates, losses, strict=True)])
            write_atomically(output / "lr_finder.csv", table)
            write_atomically(output / "lr_finder.png", _plot(rates, losses, best))
        console.print(f"--lr {best:.2g}: there the loss falls fastest; look at {output / 'lr_finder.png'}")
    return best


def steepest(rates: list[float], losses: list[float]) -> float:
    """The rate around which the loss falls fastest over the logarithm of the rate, before its least value.

    The fall is taken over a fifth of all rates: from one rate to the next it is noise.
    """
    reach = max(1, len(losses) // 10)
    end = min(range(len(losses)), key=losses.__getitem__)
    falls = {i: losses[i - reach] - losses[i + reach] for i in range(reach, end - reach + 1)}
    if not falls or max(falls.values()) <= 0:
        raise UserError(f"The loss falls at no learning rate between {LOW} and {HIGH}.")
    return rates[max(falls, key=falls.__getitem__)]


def _plot(rates: list[float], losses: list[float], best: float) -> bytes:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(rates, losses)
    axes.axvline(best, color="red", linestyle="--", label=f"falls fastest: {best:.2g}")
    axes.set(xlabel="learning rate", ylabel="loss, smoothed")
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)
