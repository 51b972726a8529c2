"""Promises of a run that is stopped: at any moment, and gone on with to the very same result."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import filelock
import pytest
import torch
import yaml

from nat_models.cli import main
from nat_models.errors import Stopped, UserError
from nat_models.training import run_state
from nat_models.training.settings import Resume
from nat_models.training.tasks.classification import Classification
from tests.training.conftest import fit, make_settings, same_course, summary

# Everything that draws random numbers or carries something from step to step.
RICH = dict(ema_decay=0.9, mixup=0.2, cutmix=0.3, drop_path=0.2, clip_grad=1.0, layer_decay=0.9, reprob=0.2)
RICH |= dict(auto_augment="rand-m5-mstd0.5", mixed_precision="bf16", head_only_epochs=1)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing ever stopped."""
    output = tmp_path_factory.mktemp("whole") / "o"
    return output, fit(make_settings(data, output, **RICH, grad_accum=2))


def at_step(monkeypatch, number: int, act) -> None:
    """Calls `act` when the losses are asked for the number-th time."""
    losses, calls = Classification.losses, []

    def counting(*args):
        calls.append(1)
        if len(calls) == number:
            act()
        return losses(*args)

    monkeypatch.setattr(Classification, "losses", counting)


def die():
    raise Killed


@pytest.mark.parametrize("step", range(1, 16))
def test_a_run_killed_at_any_step_goes_on_to_the_same_bits(data, whole, tmp_path, monkeypatch, step):
    settings = make_settings(data, tmp_path / "o", **RICH, grad_accum=2, save_every_steps=1)
    at_step(monkeypatch, step, die)
    with pytest.raises(Killed):
        fit(settings)
    monkeypatch.undo()
    fit(settings, resume=True)
    same_course(whole[0], tmp_path / "o")


def test_the_state_within_an_epoch_is_where_a_run_goes_on(data, tmp_path, monkeypatch):
    """Without it the test above would only show that epochs are done again."""
    settings = make_settings(data, tmp_path / "o", save_every_steps=1)
    at_step(monkeypatch, 9, die)
    with pytest.raises(Killed):
        fit(settings)
    monkeypatch.undo()
    done = []
    at_step(monkeypatch, -1, die)
    losses = Classification.losses
    monkeypatch.setattr(Classification, "losses", lambda *args: (done.append(1), losses(*args))[1])
    fit(settings, resume=True)
    assert len(done) == 15 - 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_in_one_line_after_the_step_at_hand(
    data, whole, tmp_path, monkeypatch, capsys, number, code
):
    settings = make_settings(data, tmp_path / "o", **RICH, grad_accum=2)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings.plain()))
    at_step(monkeypatch, 8, lambda: os.kill(os.getpid(), number))
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == code
    err = capsys.readouterr().err
    # Step 8 is the third of the second epoch and half of an update; the update is finished.
    assert err == f"stopped after epoch 1, step 4 of epoch 2: go on with --resume --output {tmp_path / 'o'}\n"
    monkeypatch.undo()
    assert main(["train", "--resume", "--output", str(tmp_path / "o")]) == 0
    assert "continuing after epoch 1, step 4 of epoch 2" in capsys.readouterr().out
    same_course(whole[0], tmp_path / "o")


def test_sigusr1_saves_and_the_run_goes_on(data, tmp_path, monkeypatch):
    settings = make_settings(data, tmp_path / "o", epochs=1, warmup_epochs=0)
    saved = []
    commit = run_state.commit
    monkeypatch.setattr("nat_models.training.engine.commit", lambda *args: (saved.append(str(args[1])), commit(*args)))
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert len(fit(settings)) == 1
    assert saved == ["after the beginning, step 2 of epoch 1", "after epoch 1"]


def test_a_signal_during_evaluation_waits_for_no_epoch(data, whole, tmp_path, monkeypatch):
    settings = make_settings(data, tmp_path / "o", **RICH, grad_accum=2)
    predict = Classification.predict
    monkeypatch.setattr(
        Classification, "predict", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), predict(*args))[1]
    )
    with pytest.raises(Stopped, match="after the beginning, step 5 of epoch 1"):
        fit(settings)
    monkeypatch.undo()
    fit(settings, resume=True)
    same_course(whole[0], tmp_path / "o")


def test_a_signal_before_the_first_step_ends_at_once(data, tmp_path, monkeypatch):
    make_network = Classification.make_network
    monkeypatch.setattr(
        Classification, "make_network", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), make_network(*args))[1]
    )
    with pytest.raises(Stopped, match="before the first step") as stop:
        fit(make_settings(data, tmp_path / "o"))
    assert stop.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def _command(settings, path) -> list[str]:
    path.write_text(yaml.safe_dump(settings.plain()))
    return [sys.executable, "-m", "nat_models", "train", "--config", str(path), "--resume"]


def test_ctrl_c_reaches_workers_too_and_none_of_them_speaks(data, tmp_path):
    settings = make_settings(data, tmp_path / "o", workers=1, epochs=500)
    process = subprocess.Popen(
        _command(settings, tmp_path / "c.yaml"),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (tmp_path / "o" / "summary.csv").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    error = process.communicate()[1]
    assert process.returncode == 130, error
    assert error.startswith("stopped after epoch") and error.count("\n") == 1


@pytest.mark.slow
def test_twenty_real_kills_at_random_moments_leave_no_trace(data, tmp_path):
    settings = dict(**RICH, workers=1, epochs=250, save_every_steps=1)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = (make_settings(data, tmp_path / name, **settings) for name in ("whole", "killed"))
    subprocess.run(_command(whole, tmp_path / "w.yaml"), check=True, env=env, stdout=subprocess.DEVNULL)
    rng, kills, within = random.Random(0), 0, 0
    while kills < 20:
        process = subprocess.Popen(
            _command(killed, tmp_path / "k.yaml"), start_new_session=True, env=env, stdout=subprocess.DEVNULL
        )
        try:
            # Some of them before the first step, most of them while it trains; it starts for some seconds each time.
            process.wait(rng.uniform(2, 9))
            pytest.fail(f"the run ended after {kills} kills")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            kills += 1
            if (tmp_path / "killed" / "state").exists():
                course = torch.load(tmp_path / "killed" / "state" / "custom_checkpoint_0.pkl", weights_only=False)
                within += course["step"] > 0
    print(f"{kills} kills, {within} of them left a state within an epoch")
    subprocess.run(_command(killed, tmp_path / "k.yaml"), check=True, env=env, stdout=subprocess.DEVNULL)
    assert within > 0
    same_course(tmp_path / "whole", tmp_path / "killed")


def test_extending_the_epochs_is_the_way_to_run_on(data, run, tmp_path):
    first = make_settings(data, tmp_path / "o", epochs=2)
    rows = fit(first)
    with pytest.raises(UserError, match=r"epochs must stay 2, .* --extend-epochs makes it longer"):
        fit(make_settings(data, tmp_path / "o", epochs=4), resume=True)
    longer = fit(first, resume=Resume(True, extend_epochs=4))
    assert len(longer) == 4 and longer[:2] == rows
    assert yaml.safe_load((tmp_path / "o" / "config.yaml").read_text())["epochs"] == 4
    with pytest.raises(UserError, match="--extend-epochs must exceed the run's epochs, 4, got 3"):
        fit(make_settings(data, tmp_path / "o", epochs=4), resume=Resume(True, extend_epochs=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lr=0.5), r"lr must stay 0\.002, as the run in .*/o began, to resume it; got 0\.5"),
        (dict(seed=1), "seed must stay 0"),
        (dict(mixup=0.1), "mixup must stay 0.0"),
        (dict(model="nat_tiny"), "model must stay 'nat_mini'"),
        (dict(epochs=2), "epochs must stay 1"),
        (dict(val_fraction=0.5), r"val_fraction must stay 0\.25"),
    ],
)
def test_other_settings_are_refused_by_name(data, tmp_path_factory, change, message):
    output = tmp_path_factory.getbasetemp() / "refused" / "o"
    settings = dict(epochs=1, warmup_epochs=0)
    if not output.exists():
        fit(make_settings(data, output, **settings))
    with pytest.raises(UserError, match=message):
        fit(make_settings(data, output, **settings | change), resume=True)


def test_another_version_is_refused_and_can_be_accepted(data, tmp_path, monkeypatch):
    settings = make_settings(data, tmp_path / "o", epochs=1, warmup_epochs=0)
    rows = fit(settings)
    version = run_state.version
    monkeypatch.setattr(run_state, "version", lambda name: "9.9" if name == "timm" else version(name))
    with pytest.raises(UserError, match=r"began with timm [\d.]+, this is 9\.9: .* --accept-versions"):
        fit(settings, resume=True)
    assert fit(settings, resume=Resume(True, accept_versions=True)) == rows


def test_a_second_run_is_kept_out(data, tmp_path):
    (tmp_path / "o").mkdir()
    with (
        filelock.FileLock(tmp_path / "o" / ".lock"),
        pytest.raises(UserError, match="Another run is writing to"),
    ):
        fit(make_settings(data, tmp_path / "o"))
    assert [path.name for path in (tmp_path / "o").iterdir()] == [".lock"]


def test_an_output_that_is_a_file_is_an_error(data, tmp_path):
    (tmp_path / "o").write_text("")
    with pytest.raises(UserError, match=r"/o is a file: choose another --output"):
        fit(make_settings(data, tmp_path / "o"))


def test_an_output_below_a_file_is_an_error(data, tmp_path):
    (tmp_path / "o").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*/o/p: Not a directory"):
        fit(make_settings(data, tmp_path / "o" / "p"))


def test_a_disk_that_takes_no_more_leaves_the_last_state(data, whole, tmp_path, monkeypatch):
    settings = make_settings(data, tmp_path / "o", **RICH, grad_accum=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails as on a full disk
    at_step(monkeypatch, 8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1])))
    try:
        with pytest.raises(UserError, match=r"Cannot write .*/state: .*; the state before it stays"):
            fit(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    monkeypatch.undo()
    assert len(summary(tmp_path / "o")) == 1
    assert not list((tmp_path / "o").glob("*.tmp"))
    fit(settings, resume=True)
    same_course(whole[0], tmp_path / "o")
