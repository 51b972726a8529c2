"""A run's network, optimizer, loaders and schedule, prepared for its devices and processes."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..errors import UserError
from .freezing import freeze
from .images import make_loader
from .sampling import EpochSampler, ShareSampler
from .settings import Settings
from .task import Task

_FUSED = ("adam", "adamw", "sgd")  # PyTorch's own, which update a weight in one pass over its memory on request


def make_accelerator(settings: Settings, trackers: Sequence[str] = ()) -> Accelerator:
    """What knows devices, processes and precision."""
    # accelerate's state is the process's: a run before this one may have had another precision.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # without this, processes that torchrun started would not meet
        mixed_precision=settings.mixed_precision,
        dynamo_backend="inductor" if settings.compile else None,
        log_with=list(trackers) or None,
        project_dir=Path(settings.output),
    )


@dataclass
class Parts:
    """What training needs besides its settings and its task, prepared for processes and device."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    ema: ModelEmaV3 | None
    order: EpochSampler
    train_loader: DataLoader
    val_loader: DataLoader
    epochs: int
    updates_per_epoch: int


def with_global_batch(settings: Settings, accelerator: Accelerator) -> Settings:
    """Settings whose grad_accum makes up the batch that global_batch_size names."""
    if settings.global_batch_size is None:
        return settings
    step = settings.batch_size * accelerator.num_processes
    if settings.global_batch_size % step:
        raise UserError(
            f"global_batch_size must be a multiple of batch_size x processes, {step}, got {settings.global_batch_size}."
        )
    return dataclasses.replace(settings, grad_accum=settings.global_batch_size // step)


def make_network(settings: Settings, task: Task, accelerator: Accelerator, initial_weights: bool) -> nn.Module:
    """The task's network on the process's device, as the settings have it in training.

    Raises:
        UserError: A setting does not fit the network.
    """
    model = task.make_network(initial_weights).to(accelerator.device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if settings.freeze is not None:
        freeze(model, settings.freeze)
    return model


def make_optimizer(settings: Settings, model: nn.Module, lr: float) -> Optimizer:
    """What updates a network's weights, at the settings' decay."""
    decay = dict(weight_decay=settings.weight_decay, layer_decay=settings.layer_decay)
    fused = dict(fused=True) if settings.opt in _FUSED else {}
    return create_optimizer_v2(model, opt=settings.opt, lr=lr, **decay, **fused)


def prepare(settings: Settings, task: Task, accelerator: Accelerator, initial_weights: bool) -> Parts:
    """Network, optimizer, loaders and schedule of a run.

    Raises:
        UserError: The batch exceeds the data, or a setting does not fit the network.
    """
    step = settings.batch_size * accelerator.num_processes
    if step > task.sizes[0]:
        raise UserError(f"batch_size x processes, {step}, must not exceed the {task.sizes[0]} training images.")
    set_seed(settings.seed)
    model = make_network(settings, task, accelerator, initial_weights)
    train_set, val_set = task.make_datasets(model)
    order = EpochSampler(len(train_set), settings.seed, task.draws)
    share = ShareSampler(len(val_set), accelerator.process_index, accelerator.num_processes)
    common = dict(batch_size=settings.batch_size, workers=settings.workers, pin_memory=torch.cuda.is_available())
    common["persistent_workers"] = settings.persistent_workers and settings.workers > 0
    train_loader = make_loader(train_set, sampler=order, drop_last=True, **common)
    val_loader = make_loader(val_set, sampler=share, **common)
    optimizer = make_optimizer(settings, model, settings.lr)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and settings.ema_decay is not None:
        raise UserError("ema_decay averages whole weights, which no process has under FSDP: leave it out.")
    # The average of few updates would be little more than the initial weights, so its decay rises with their number.
    ema = None if settings.ema_decay is None else ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)
    accelerator.gradient_accumulation_steps = settings.grad_accum
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    updates_per_epoch = math.ceil(len(train_loader) / settings.grad_accum)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=settings.sched,
        decay_rate=0.1 if settings.sched == "multistep" else 1.0,  # of poly the power
        # timm decays at the update before a milestone: half an update more makes it the first one after.
        decay_milestones=[m + 0.5 / updates_per_epoch for m in settings.milestones],
        num_epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        cooldown_epochs=settings.cooldown_epochs,
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return Parts(model, optimizer, scheduler, ema, order, train_loader, val_loader, epochs, updates_per_epoch)
