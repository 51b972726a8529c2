"""What a run is made of: its schedule."""

import pytest

from nat_models.training.parts import make_accelerator, prepare
from nat_models.training.tasks.classification import Classification
from tests.training.conftest import make_settings


def _rates(data, output, **kwargs) -> list[list[float]]:
    """The learning rate of each update, epoch by epoch."""
    settings = make_settings(data, output, **kwargs)
    accelerator = make_accelerator(settings)
    parts = prepare(settings, Classification(settings), accelerator, initial_weights=False)
    rates = []
    for update in range(settings.epochs * parts.updates_per_epoch):
        parts.scheduler.step_update(update)
        rates.append(parts.optimizer.param_groups[0]["lr"])
    u = parts.updates_per_epoch
    return [rates[i : i + u] for i in range(0, len(rates), u)]


def test_multistep_divides_the_rate_by_ten_after_each_milestone(data, tmp_path):
    kwargs = dict(epochs=4, warmup_epochs=0, lr=1e-3, sched="multistep", milestones=(2, 3))
    for epoch, expected in zip(_rates(data, tmp_path, **kwargs), (1e-3, 1e-3, 1e-4, 1e-5), strict=True):
        assert epoch == pytest.approx([expected] * len(epoch))


def test_a_warm_up_may_end_within_an_epoch(data, tmp_path):
    rates = _rates(data, tmp_path, epochs=2, warmup_epochs=0.5, warmup_lr=0.0, lr=1e-3, sched="poly", min_lr=0.0)
    warm = len(rates[0]) // 2
    rising = [1e-3 * i / (len(rates[0]) / 2) for i in range(warm)]
    assert rates[0][:warm] == pytest.approx(rising, abs=1e-9)
    assert rates[0][warm:] == sorted(rates[0][warm:], reverse=True)
