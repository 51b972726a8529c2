"""The loop of training, for any task: processes, precision, schedule, averaged weights, and states to continue from.

Randomness is a function of seed, epoch, step and process, so a run that was killed and continued takes the same course.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.utils import send_to_device
from torch import nn

from ..errors import Stopped, UserError
from ..writing import restore_folder, write_atomically, writing
from .freezing import head_parameters, set_training
from .images import read_batches
from .interrupts import Interrupts
from .parts import make_accelerator, prepare, with_global_batch
from .report import (
    Clock,
    best_row,
    console,
    deciding_metric,
    is_published,
    keep_newest,
    publish,
    save_weights,
    track,
    tracker_names,
)
from .run_state import Course, check_resume, commit, describe, has_state, locked, saved_batch, with_extended_epochs
from .sampling import seed_step
from .settings import Resume, Settings
from .task import Task
from .tuning import fit_batch

LOOK_EVERY = 20  # updates between two looks at the loss
ADVICE = "the state stays: mend this and go on with --resume"


def train(settings: Settings, task: Task, resume: bool | Resume = False) -> list[dict[str, float]]:
    """Runs or continues a training; returns what summary.csv holds.

    Raises:
        UserError: The output holds a run that cannot be continued, or cannot be written to; the data are too few for
            the batch, an image cannot be read, or the loss is not finite.
        CheckpointError: The initial weights cannot be had.
        Stopped: A signal asked for it; the state holds the last step.
    """
    resume = resume if isinstance(resume, Resume) else Resume(resume)
    settings = with_extended_epochs(settings, resume)
    output = Path(settings.output)
    deciding_metric(settings, task)
    accelerator = make_accelerator(settings, tracker_names(settings.trackers))
    with locked(output, accelerator), Interrupts(accelerator, settings.save_every_minutes) as interrupts:
        return _Run(settings, task, accelerator, interrupts).run(resume)


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    loader: Iterable,
    accelerator: Accelerator,
    description: str = "",
    pause: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The task's metrics over all images of all processes.

    Args:
        task: Predicts and counts.
        model: Put into eval mode and back.
        loader: This process's share, in the order of a ShareSampler, if it has one.
        accelerator: Tells the device, the precision and the processes.
        description: Of the line of progress.
        pause: Called after each batch.
    """
    was_training = model.training
    model.eval()
    metrics = task.make_metrics().to(accelerator.device)
    left = getattr(loader.sampler, "real", len(loader.dataset))
    for batch in read_batches(track(loader, description, accelerator.is_main_process)):
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        with accelerator.autocast():
            predictions = task.predict(model, batch)
        if left > 0:
            metrics.update(predictions[:left], [part[:left] for part in batch])
        left -= len(predictions)
        pause()
    model.train(was_training)
    return metrics.compute()


class _Run:
    """A run from its first step or its last state to its end."""

    def __init__(self, settings: Settings, task: Task, accelerator: Accelerator, interrupts: Interrupts):
        if settings.auto_batch_size:
            settings = (
                saved_batch(settings) if has_state(Path(settings.output)) else fit_batch(settings, task, accelerator)
            )
        self.settings = with_global_batch(settings, accelerator)
        self.task, self.accelerator, self.interrupts = task, accelerator, interrupts
        self.output, self.state = Path(settings.output), Path(settings.output) / "state"
        self.identity = describe(settings, task.classes, task.digest, accelerator.num_processes)
        self.clock, self.course, self.loss = Clock(settings.profile, accelerator.device), Course(), math.nan

    def run(self, resume: Resume) -> list[dict]:
        accelerator, course = self.accelerator, self.course
        resuming = check_resume(self.identity, self.output, resume)
        self.parts = prepare(self.settings, self.task, accelerator, initial_weights=not resuming)
        self.raw = accelerator.unwrap_model(self.parts.model, keep_torch_compile=False)
        course.total = course.total.to(accelerator.device)
        accelerator.register_for_checkpointing(course, *([] if self.parts.ema is None else [self.parts.ema]))
        self._begin(resuming)
        self.interrupts.defer()
        while course.epoch <= self.parts.epochs and not self._stale():
            loss, lr, speed = self._train_epoch()
            started = time.perf_counter()
            with self.clock("evaluation"):
                metrics = evaluate(
                    self.task, self._evaluated(), self.parts.val_loader, accelerator, "validation", self._pause
                )
                seconds = round(course.seconds + time.perf_counter() - started, 2)
            timing = dict(seconds=seconds, images_per_second=speed)
            course.rows.append(dict(epoch=course.epoch, lr=lr, train_loss=loss, **metrics, **timing))
            course.start_epoch()
            with self.clock("saving"):
                self._save()
                self._publish()
            with self.clock("logging"):
                self._tell(course.rows[-1])
        self._end()
        return course.rows

    def _train_epoch(self) -> tuple[float, float, float]:
        """What is left of an epoch; gives its mean loss, its last learning rate, and images per second."""
        s, parts, course, accelerator = self.settings, self.parts, self.course, self.accelerator
        epoch, steps = course.epoch, len(parts.train_loader)
        started, before = time.perf_counter(), course.seconds
        update = (epoch - 1) * parts.updates_per_epoch + math.ceil(course.step / s.grad_accum)
        self._set_lr(update)
        set_training(self.raw)
        for batch in self._batches(epoch, steps) if course.step < steps else ():
            course.step += 1
            seed_step(s.seed, epoch, course.step, accelerator.process_index)
            with self.clock("model"), accelerator.accumulate(parts.model):
                loss = sum(self.task.losses(parts.model, batch).values())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    self._adapt_gradients(epoch)
                parts.optimizer.step()
                parts.optimizer.zero_grad()
                course.total += loss.detach()
            course.seconds = before + time.perf_counter() - started
            if not accelerator.sync_gradients:
                continue
            update += 1
            self._set_lr(update)
            if parts.ema is not None:
                parts.ema.update(self.raw, step=update)
            self._look(update, steps)
            self._pause(update)
        mean = accelerator.reduce(course.total / steps, reduction="mean").item()
        speed = steps * s.batch_size * accelerator.num_processes / course.seconds
        return mean, self._set_lr(update - 1), round(speed, 1)

    def _batches(self, epoch: int, steps: int) -> Iterable:
        parts, s = self.parts, self.settings
        parts.order.begin(epoch, self.course.step * s.batch_size * self.accelerator.num_processes)
        line = dict(done=self.course.step, total=steps, status=self._status)
        batches = track(
            self.clock.each("data", parts.train_loader),
            f"epoch {epoch}/{parts.epochs}",
            self.accelerator.is_main_process,
            **line,
        )
        return read_batches(batches)

    def _adapt_gradients(self, epoch: int) -> None:
        s, model = self.settings, self.parts.model
        if epoch <= s.head_only_epochs:
            head = {id(p) for p in head_parameters(self.raw)}
            for parameter in self.raw.parameters():
                if id(parameter) not in head:
                    parameter.grad = None
        if s.clip_grad is not None:
            self.accelerator.clip_grad_norm_(model.parameters(), s.clip_grad)

    def _set_lr(self, update: int) -> float:
        """Sets the learning rate of the update after this many; returns it as it is before layer decay."""
        self.parts.scheduler.step_update(update)
        group = self.parts.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)

    def _look(self, update: int, steps: int) -> None:
        """Asks the device for the loss. It waits for that, hence not at each step."""
        course = self.course
        if update % LOOK_EVERY and course.step < steps:
            return
        with self.clock("logging"):
            self._check_loss()
            self.loss = course.total.item() / course.step
            values = dict(train_loss=self.loss, lr=self.parts.optimizer.param_groups[-1]["lr"])
            self.accelerator.log(values, step=update)

    def _check_loss(self) -> None:
        total = self.course.total.item()
        if not math.isfinite(total):
            where = f"epoch {self.course.epoch}/{self.parts.epochs}, step {self.course.step}"
            raise UserError(f"The loss is {total} in {where}: lower lr or set clip_grad.")

    def _status(self) -> str:
        """Loss, speed and time left, for the line of progress."""
        course, steps = self.course, len(self.parts.train_loader)
        if not course.step or not course.seconds:
            return ""
        left = (steps * (self.parts.epochs - course.epoch + 1) - course.step) * course.seconds / course.step
        speed = course.step * self.settings.batch_size * self.accelerator.num_processes / course.seconds
        loss = "" if math.isnan(self.loss) else f"loss {self.loss:.4f}  "
        return f"{loss}{speed:.1f} images/s  {_duration(left)} left"

    def _pause(self, update: int | None = None) -> None:
        """Between two steps: saves where it is time to, and stops if a signal asked for it."""
        s = self.settings
        due, stop = self.interrupts.requests()
        if update is not None:
            due |= s.save_every_steps is not None and update % s.save_every_steps == 0
            if s.keep_every_steps is not None and update % s.keep_every_steps == 0:
                with self.clock("saving"):
                    self._keep(f"step-{update:08}", self._whole())
        if due or stop:
            with self.clock("saving"):
                self._check_loss()
                self._save()
        if stop:
            line = f"stopped {self.course}: go on with --resume --output {self.output}"
            raise Stopped(line if self.accelerator.is_main_process else "", stop)

    def _save(self) -> None:
        commit(self.accelerator, self.course, self.identity, self.state)
        self.interrupts.saved()

    def _evaluated(self) -> nn.Module:
        """The network that is evaluated: the averaged one, or the bare one, or under FSDP the only whole one."""
        if self.parts.ema is not None:
            return self.parts.ema.module
        return self.parts.model if self._sharded() else self.raw

    def _sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    def _whole(self) -> nn.Module:
        """The evaluated network with all of its weights. Under FSDP no process has them: all give theirs to rank 0."""
        if not self._sharded():
            return self._evaluated()
        weights = self.accelerator.get_state_dict(self.parts.model)
        network = self.task.make_network(False)
        if self.accelerator.is_main_process:
            network.load_state_dict(weights)
        return network

    def _publish(self) -> None:
        network, rows, every = self._whole(), self.course.rows, self.settings.keep_every_epochs
        if self.accelerator.is_main_process:
            with writing(self.output, ADVICE):
                publish(self.output, rows, network, self.task)
        if every is not None and len(rows) % every == 0:
            self._keep(f"epoch-{len(rows):04}", network)

    def _keep(self, name: str, network: nn.Module) -> None:
        if self.accelerator.is_main_process:
            folder, newest = self.output / "kept", self.settings.keep_newest
            with writing(folder, ADVICE):
                save_weights(folder / name, self.course.rows, network, self.task)
                if newest is not None:
                    keep_newest(folder, name.partition("-")[0], newest)

    def _stale(self) -> bool:
        """Whether there was no better epoch for too long."""
        rows, patience = self.course.rows, self.settings.patience
        return patience is not None and bool(rows) and len(rows) - best_row(rows, self.task)["epoch"] >= patience

    def _begin(self, resuming: bool) -> None:
        accelerator, settings, course = self.accelerator, self.settings, self.course
        if accelerator.is_main_process:
            for line in (*self.task.notes, self._first_line()):
                console.print(line)
            with writing(self.output):
                write_atomically(self.output / "config.yaml", yaml.safe_dump(settings.plain(), sort_keys=False))
                restore_folder(self.state)
        accelerator.wait_for_everyone()
        if resuming:
            accelerator.load_state(str(self.state))
            course.restore(accelerator)
            # The run may have been killed between its state and what users read.
            if course.rows and not course.step and not is_published(self.output, course.rows):
                self._publish()
            if accelerator.is_main_process:
                console.print(f"{self.output}: continuing {course}, of {self.parts.epochs} epochs")
        done = len(course.rows) * self.parts.updates_per_epoch + course.step // settings.grad_accum
        # What a tracker was told after the state that is gone on from, it is told again.
        accelerator.init_trackers("tensorboard", init_kwargs=dict(tensorboard=dict(purge_step=done + 1)))

    def _tell(self, row: dict) -> None:
        update = row["epoch"] * self.parts.updates_per_epoch
        self.accelerator.log({k: v for k, v in row.items() if k not in ("lr", "train_loss")}, step=update)
        if self.accelerator.is_main_process:
            console.print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))

    def _end(self) -> None:
        if self.accelerator.is_main_process:
            best, metric = best_row(self.course.rows, self.task), deciding_metric(self.settings, self.task)
            if len(self.course.rows) < self.parts.epochs:
                console.print(f"stopped early: no better {metric} for {self.settings.patience} epochs")
            console.print(f"best: epoch {best['epoch']} with {metric} {best[metric]:.4g}, in {self.output / 'best'}")
            if self.clock.on:
                console.print(str(self.clock))
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()

    def _first_line(self) -> str:
        s, (train_size, val_size) = self.settings, self.task.sizes
        trained = sum(p.numel() for p in self.raw.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in self.raw.parameters())
        parameters = f"{everything:,} parameters" + (f", {trained:,} of them trained," if trained < everything else "")
        processes = self.accelerator.num_processes
        whole = processes * s.batch_size * s.grad_accum
        return (
            f"{train_size:,} training and {val_size:,} validation images, {self.task.about}, "
            f"{s.model} with {parameters} on {self.accelerator.device}"
            + (f" in {processes} processes" if processes > 1 else "")
            + f", batch {whole}"
            + (
                f" = {processes} x {s.batch_size} x {s.grad_accum} (processes, images, steps)"
                if whole > s.batch_size
                else ""
            )
        )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"
