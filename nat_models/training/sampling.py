"""Which image comes when. Order and randomness are functions of seed, epoch and position, never of what ran before."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.utils.data import Sampler


def derive_seed(*numbers: int) -> int:
    """A seed below 2^32 from several numbers, far from those of their neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_step(seed: int, epoch: int, step: int, process: int) -> None:
    """Makes what the network and mixup draw in a step depend on these numbers alone."""
    set_seed(derive_seed(seed, epoch, step, process))


class EpochSampler(Sampler):
    """The order of an epoch's images, as (epoch, index); `begin` says which epoch, and how many images are done.

    Args:
        size: Number of images.
        seed: Of the order.
        draws: How often each image is drawn, relative to others: `size` draws with replacement. None: each one once.
    """

    def __init__(self, size: int, seed: int, draws: Sequence[float] | None = None):
        self.size, self.seed = size, seed
        self.draws = None if draws is None else torch.as_tensor(draws, dtype=torch.float64)
        self.begin(1)

    def begin(self, epoch: int, done: int = 0) -> None:
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        if self.draws is None:
            order = torch.randperm(self.size, generator=generator)
        else:
            # By inversion: torch.multinomial takes at most 2^24 images.
            ends = self.draws.cumsum(0)
            order = torch.searchsorted(ends, torch.rand(self.size, generator=generator, dtype=torch.float64) * ends[-1])
        yield from ((self.epoch, index) for index in order[self.done :].tolist())


class ShareSampler(Sampler):
    """One process's share of images that are read once: every n-th of n processes.

    All shares are equally long, because a step of a sharded network waits for all processes: the last index of some is
    one that another has too, and `real` is the number of those that count.
    """

    def __init__(self, size: int, process: int, processes: int):
        self.indices = list(range(process, size, processes))
        self.real = len(self.indices)
        self.indices += [0] * (-(-size // processes) - self.real)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
