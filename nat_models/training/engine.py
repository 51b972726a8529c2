"""The loop of training, for any task: processes, precision, schedule, averaged weights, and a state to continue from.

Randomness is a function of seed, epoch and process, so a run that was killed and continued takes the same course.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from ..errors import UserError
from .images import make_loader, read_batches
from .report import best_row, console, publish, track
from .run_state import Course, check_output, commit, restore_folder, write_atomically
from .settings import Settings
from .task import Task


def train(settings: Settings, task: Task, resume: bool = False) -> list[dict[str, float]]:
    """Runs or continues a training; returns what summary.csv holds.

    Raises:
        UserError: The output holds a run that cannot be continued, the data are too few for the batch, an image cannot
            be read, or the loss is not finite.
        CheckpointError: The initial weights cannot be had.
    """
    output, state, course = Path(settings.output), Path(settings.output) / "state", Course()
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.grad_accum,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed),
    )
    resuming = check_output(settings, output, resume)
    accelerator.wait_for_everyone()  # every process checks the folder before rank 0 writes to it
    parts = _prepare(settings, task, accelerator, initial_weights=not resuming)
    accelerator.register_for_checkpointing(course, *([] if parts.ema is None else [parts.ema]))
    network = accelerator.unwrap_model(parts.model) if parts.ema is None else parts.ema.module
    if accelerator.is_main_process:
        console.print(_first_line(settings, task, accelerator, network))
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "config.yaml", yaml.safe_dump(settings.plain(), sort_keys=False))
        restore_folder(state)
    accelerator.wait_for_everyone()
    if resuming:
        accelerator.load_state(str(state))
        if accelerator.is_main_process:
            publish(output, course.rows, network, task)  # the run may have been killed between its state and these
            console.print(f"{output}: continuing after epoch {len(course.rows)} of {parts.epochs}")
    for epoch in range(len(course.rows) + 1, parts.epochs + 1):
        started = time.perf_counter()
        set_seed(settings.seed + 100_003 * epoch, device_specific=True)
        loss, lr = _train_epoch(settings, task, accelerator, parts, epoch)
        images = len(parts.train_loader) * settings.batch_size * accelerator.num_processes
        speed = images / (time.perf_counter() - started)
        metrics = evaluate(task, network, parts.val_loader, accelerator, "validation")
        del metrics["images"]
        timing = dict(seconds=round(time.perf_counter() - started, 2), images_per_second=round(speed, 1))
        course.rows.append(dict(epoch=epoch, lr=lr, train_loss=loss, **metrics, **timing))
        commit(accelerator, state)
        if accelerator.is_main_process:
            publish(output, course.rows, network, task)
            row = course.rows[-1].items()
            console.print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row))
    if accelerator.is_main_process:
        best = best_row(course.rows, task)
        console.print(f"best: epoch {best['epoch']} with {task.metric} {best[task.metric]:.2f}, in {output / 'best'}")
    accelerator.wait_for_everyone()
    return course.rows


def evaluate(
    task: Task, model: nn.Module, loader: Iterable, accelerator: Accelerator, description: str = ""
) -> dict[str, float]:
    """The task's metrics, and the number of images.

    Args:
        task: Only its measure and metrics are used.
        model: Not wrapped by accelerate; put into eval mode and back.
        loader: Prepared by accelerate. What it repeats to fill the last batch of a process is not counted twice.
    """
    was_training = model.training
    model.eval()
    measured = []
    for batch in read_batches(track(loader, description, accelerator.is_main_process)):
        with torch.inference_mode(), accelerator.autocast():
            rows = task.measure(model, batch)
        measured.append(accelerator.gather_for_metrics(rows))
    model.train(was_training)
    measured = torch.cat(measured)
    return task.metrics(measured) | dict(images=len(measured))


@dataclass
class _Parts:
    """What training needs besides its settings and its task, prepared for processes and device."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    ema: ModelEmaV3 | None
    train_loader: DataLoader
    val_loader: DataLoader
    epochs: int
    updates_per_epoch: int


def _prepare(settings: Settings, task: Task, accelerator: Accelerator, initial_weights: bool) -> _Parts:
    whole = settings.batch_size * accelerator.num_processes
    if whole > task.sizes[0]:
        raise UserError(f"batch_size x processes, {whole}, must not exceed the {task.sizes[0]} training images.")
    set_seed(settings.seed)
    model = task.make_network(initial_weights).to(accelerator.device)
    train_set, val_set = task.make_datasets(model)
    common = dict(batch_size=settings.batch_size, workers=settings.workers, pin_memory=torch.cuda.is_available())
    train_loader, val_loader = (
        make_loader(train_set, shuffle=True, drop_last=True, **common),
        make_loader(val_set, **common),
    )
    decay = dict(weight_decay=settings.weight_decay, layer_decay=settings.layer_decay)
    optimizer = create_optimizer_v2(model, opt=settings.opt, lr=settings.lr, **decay)
    # The average of few updates would be little more than the initial weights, so its decay rises with their number.
    ema = None if settings.ema_decay is None else ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    updates_per_epoch = math.ceil(len(train_loader) / settings.grad_accum)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        num_epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        cooldown_epochs=settings.cooldown_epochs,
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return _Parts(model, optimizer, scheduler, ema, train_loader, val_loader, epochs, updates_per_epoch)


def _train_epoch(
    settings: Settings, task: Task, accelerator: Accelerator, parts: _Parts, epoch: int
) -> tuple[float, float]:
    """One pass over the data; returns the mean loss and the last learning rate."""
    model, optimizer, loader = parts.model, parts.optimizer, parts.train_loader
    loader.set_epoch(epoch)
    updates = (epoch - 1) * parts.updates_per_epoch
    parts.scheduler.step_update(updates)
    model.train()
    total, description = torch.zeros((), device=accelerator.device), f"epoch {epoch}/{parts.epochs}"
    for step, batch in enumerate(read_batches(track(loader, description, accelerator.is_main_process)), start=1):
        with accelerator.accumulate(model):
            loss = sum(task.losses(model, batch).values())
            accelerator.backward(loss)
            if accelerator.sync_gradients and settings.clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), settings.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach()
        # Asking the device for a number makes it wait, hence not at each step.
        if (step % 20 == 0 or step == len(loader)) and not math.isfinite(total.item()):
            raise UserError(f"The loss is {total.item()} in {description}, step {step}: lower lr or set clip_grad.")
        if accelerator.sync_gradients:
            updates += 1
            group = optimizer.param_groups[0]
            lr = group["lr"] / group.get("lr_scale", 1.0)  # before layer decay
            parts.scheduler.step_update(updates)
            if parts.ema is not None:
                parts.ema.update(accelerator.unwrap_model(model), step=updates)
    return accelerator.reduce(total / len(loader), reduction="mean").item(), lr


def _first_line(settings: Settings, task: Task, accelerator: Accelerator, network: nn.Module) -> str:
    train_size, val_size = task.sizes
    parameters = sum(p.numel() for p in network.parameters())
    processes = f" in {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return (
        f"{train_size:,} training and {val_size:,} validation images, {task.about}, "
        f"{settings.model} with {parameters:,} parameters on {accelerator.device}{processes}"
    )
