"""Signals that ask a run to stop or to save, answered between two steps."""

import signal
import time
from types import FrameType

import torch
from accelerate import Accelerator

from ..errors import Stopped

_STOP = (signal.SIGINT, signal.SIGTERM)
_SAVE = getattr(signal, "SIGUSR1", None)  # what clusters send some time before they take the machine; not on Windows
# Processes have to agree on when to stop. Asking all of them costs a message each time, so it is not done at each step.
_AGREE_EVERY = 8


class Interrupts:
    """While entered, SIGINT and SIGTERM wait for `requests`; a second SIGINT stops at once.

    Before `defer` is called there is nothing to save, and the first signal stops at once too.
    """

    def __init__(self, accelerator: Accelerator, save_every_minutes: float | None):
        self.accelerator, self.interval = accelerator, save_every_minutes
        self.stop = self.save = self.calls = 0
        self.deferred, self.saved_at, self._before = False, time.monotonic(), {}

    def __enter__(self) -> "Interrupts":
        try:
            for number in (*_STOP, *([] if _SAVE is None else [_SAVE])):
                self._before[number] = signal.signal(number, self._receive)
        except ValueError:  # not the main thread, as in a notebook's worker: signals are somebody else's there
            self._before = {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == _SAVE:
            self.save = 1
        elif not self.deferred:
            raise Stopped("stopped before the first step: there is nothing to go on from", number)
        elif self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.stop = int(number)

    def defer(self) -> None:
        """From now on signals wait."""
        self.deferred = True

    def requests(self) -> tuple[bool, int]:
        """Whether a state is due, and the signal to stop for, 0 for none: the same in all processes."""
        due = self.interval is not None and time.monotonic() - self.saved_at >= 60 * self.interval
        wanted = [int(bool(self.save or due)), self.stop]
        if self.accelerator.num_processes > 1:
            self.calls += 1
            if self.calls % _AGREE_EVERY:
                return False, 0
            flags = torch.tensor([wanted], device=self.accelerator.device)
            wanted = self.accelerator.gather(flags).amax(0).tolist()
        return bool(wanted[0]), wanted[1]

    def saved(self) -> None:
        self.save, self.saved_at = 0, time.monotonic()
