"""Checkpoints as trainers write them load, averaged weights first; those that cannot say why in at most five lines."""

import argparse
from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from timm.models import create_model, load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nat_models.checkpoints import CheckpointError, fit_state_dict
from tests.checkpoints.conftest import SMALL, load_file, random_state_dict, same_tensors, small_network

THREE = dict(num_classes=3)


class Trained:
    """A network after a step, its optimizer, and the average of the two states it had."""

    def __init__(self, average=lambda model: ModelEmaV3(model, decay=0.5)):
        self.model = small_network(**THREE)
        self.average = average(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        update = self.average.update_parameters if isinstance(self.average, AveragedModel) else self.average.update
        update(self.model)
        self.model(torch.ones(1, 3, 32, 32)).square().sum().backward()
        self.optimizer.step()
        update(self.model)
        assert not same_tensors(self.model, self.average.module.state_dict())


def _prefixed(state_dict, prefix):
    return OrderedDict((f"{prefix}{key}", value) for key, value in state_dict.items())


def _lightning(trained, **more):
    """What Lightning 2.6's Trainer.save_checkpoint writes of a module with a network, a weighted loss and a metric."""
    module = {"loss.weight": torch.ones(3), "val_acc.tp": torch.zeros(3)}
    progress = {"total": {"ready": 1, "completed": 1}, "current": {"ready": 1, "completed": 1}}
    return {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": _prefixed(trained.model.state_dict(), "model.") | module,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": progress, "epoch_loop.state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None, 'mode': 'min'}": {"best_model_path": "", "last_k": None}},
        "optimizer_states": [trained.optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "net_name": "nat_mini"},
        **more,
    }


def lightning(path):
    trained = Trained()
    torch.save(_lightning(trained), path / "last.ckpt")
    return "last.ckpt", trained.model


def lightning_weight_averaging(path):
    """Its callback puts the average at state_dict and the network itself aside."""
    trained = Trained(lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)))
    plain = _lightning(trained)
    aside = dict(current_model_state=plain["state_dict"], averaging_state={"n_averaged": torch.tensor(2)})
    average = plain["state_dict"] | _prefixed(trained.average.module.state_dict(), "model.")
    torch.save(_lightning(trained, **aside, state_dict=average), path / "last.ckpt")
    return "last.ckpt", trained.average.module


def lightning_ema_callback(path):
    trained = Trained()
    ema = _prefixed(trained.average.module.state_dict(), "model.")
    torch.save(_lightning(trained, callbacks={"EMACallback": {"ema_state_dict": ema, "decay": 0.5}}), path / "a.ckpt")
    return "a.ckpt", trained.average.module


def _save_state(path):
    accelerate = pytest.importorskip("accelerate")
    trained, accelerator = Trained(), accelerate.Accelerator(cpu=True)
    accelerator.prepare(trained.model, trained.optimizer)
    accelerator.register_for_checkpointing(trained.average)
    accelerator.save_state(str(path / "state"))
    return trained


def accelerate_save_state(path):
    return "state", _save_state(path).model


def accelerate_registered_average(path):
    return "state/custom_checkpoint_0.pkl", _save_state(path).average.module


def hf_trainer(path):
    """TimmWrapperForImageClassification keeps timm's network in timm_model."""
    trained = Trained()
    (path / "checkpoint-500").mkdir()
    tensors = _prefixed(trained.model.state_dict(), "timm_model.")
    save_file(tensors, path / "checkpoint-500" / "model.safetensors", metadata={"format": "pt"})
    torch.save(trained.optimizer.state_dict(), path / "checkpoint-500" / "optimizer.pt")
    return "checkpoint-500/model.safetensors", trained.model


def hf_sharded(path):
    trained = Trained()
    (path / "out").mkdir()
    save_torch_state_dict(_prefixed(trained.model.state_dict(), "backbone.net."), path / "out", max_shard_size="200KB")
    return "out", trained.model


def timm_train(path):
    trained = Trained()
    args = argparse.Namespace(model="nat_mini", lr=0.1)
    saver = CheckpointSaver(trained.model, trained.optimizer, args, trained.average, checkpoint_dir=str(path))
    saver.save_checkpoint(0, metric=50.0)
    return "model_best.pth.tar", trained.average.module


def ddp_of_compiled(path):
    trained = Trained()
    wrapped = nn.DataParallel(torch.compile(trained.model))  # DistributedDataParallel names its module alike
    assert "module._orig_mod.norm.weight" in wrapped.state_dict()
    torch.save({"epoch": 3, "model_state_dict": wrapped.state_dict(), "loss": torch.tensor(0.5)}, path / "a.pt")
    return "a.pt", trained.model


def compiled_parts(path):
    trained = Trained()
    expected = deepcopy(trained.model)
    trained.model.patch_embed = torch.compile(trained.model.patch_embed)
    trained.model.levels[0].blocks = torch.compile(trained.model.levels[0].blocks)
    tensors = trained.model.state_dict()
    assert "patch_embed._orig_mod.proj.0.weight" in tensors and "levels.0.blocks._orig_mod.0.attn.rpb" in tensors
    torch.save({"net": tensors, "optimizer": trained.optimizer.state_dict()}, path / "a.pt")
    return "a.pt", expected


def stochastic_weight_averaging(path):
    trained = Trained(lambda model: AveragedModel(model))
    assert "n_averaged" in trained.average.state_dict()
    torch.save({"model": trained.model.state_dict(), "swa_model": trained.average.state_dict()}, path / "a.pth")
    return "a.pth", trained.average.module


def averaged_alone(path):
    trained = Trained(lambda model: AveragedModel(model))
    torch.save(trained.average.state_dict(), path / "a.pth", _use_new_zipfile_serialization=False)
    return "a.pth", trained.average.module


def ema_beside_its_updates(path):
    trained = Trained()
    ema = trained.average.module.state_dict()
    torch.save({"epoch": 3, "model": trained.model.state_dict(), "ema": ema, "updates": 10}, path / "a.pt")
    return "a.pt", trained.average.module


def ema_pytorch(path):
    """Its state dict holds the network, its average and two counters side by side."""
    trained = Trained()
    both = _prefixed(trained.model.state_dict(), "online_model.")
    both |= _prefixed(trained.average.module.state_dict(), "ema_model.")
    torch.save({"initted": torch.tensor(True), "step": torch.tensor(9)} | both, path / "a.pt")
    return "a.pt", trained.average.module


def deepspeed(path):
    trained = Trained()
    module = trained.model.state_dict()
    shapes = [OrderedDict((key, value.shape) for key, value in module.items())]
    more = dict(buffer_names=[], param_shapes=shapes, frozen_param_shapes=None, ds_version="0.17", global_steps=2)
    torch.save({"module": module, "optimizer": None, **more}, path / "mp_rank_00_model_states.pt")
    return "mp_rank_00_model_states.pt", trained.model


def gan_like_nesting(path):
    trained = Trained()
    torch.save({"trainer": {"agents": [{"net": _prefixed(trained.model.state_dict(), "q.encoder.")}]}}, path / "a.pt")
    return "a.pt", trained.model


TRAINERS = [
    lightning,
    lightning_weight_averaging,
    lightning_ema_callback,
    accelerate_save_state,
    accelerate_registered_average,
    hf_trainer,
    hf_sharded,
    timm_train,
    ddp_of_compiled,
    compiled_parts,
    stochastic_weight_averaging,
    averaged_alone,
    ema_beside_its_updates,
    ema_pytorch,
    deepspeed,
    gan_like_nesting,
]


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_what_a_trainer_wrote_loads(tmp_path, trainer):
    file, expected = trainer(tmp_path)
    assert same_tensors(load_file(tmp_path / file, **THREE), expected.state_dict())
    assert same_tensors(load_file(tmp_path / file, num_classes=7), expected.state_dict(), without="head")


def test_the_encoder_of_a_segmentation_model_loads_as_features_and_as_nothing_else(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-nat_mini", encoder_weights=None, classes=2, **SMALL).eval()
    path = tmp_path / "unet.pth"
    torch.save({"state_dict": _prefixed(model.state_dict(), "model."), "epoch": 3}, path)
    features = load_file(path, features_only=True)
    image = torch.linspace(-2, 2, 3 * 64 * 64).sin().view(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.encoder(image)[2:]
        assert all(torch.equal(a, b) for a, b in zip(features.eval()(image), expected, strict=True))
    # Pooled features pass the norm, which this network never had.
    for num_classes in (0, 7, 1000):
        with pytest.raises(CheckpointError, match=r"missing: norm\.weight.*\n.*features_only=True loads it\.$"):
            load_file(path, num_classes=num_classes)


def test_timms_own_load_checkpoint_takes_the_fit_as_its_filter(tmp_path):
    file, expected = lightning_weight_averaging(tmp_path)
    model = create_model("nat_mini", **SMALL, **THREE)
    load_checkpoint(model, str(tmp_path / file), filter_fn=fit_state_dict)
    assert same_tensors(model, expected.state_dict())


class Own:
    """A class of a user's own."""


def holds_a_class(path):
    torch.save(_lightning(Trained(), hyper_parameters={"lr": 0.1, "data": Own()}), path / "last.ckpt")
    return "last.ckpt", r"holds more than tensors: .*Own\. .*\n.*safe_globals\(\[.*\n.*torch\.save\("


def teacher_and_student(path):
    trained = Trained()
    both = _prefixed(trained.model.state_dict(), "student.")
    both |= _prefixed(trained.average.module.state_dict(), "teacher.")
    torch.save(_lightning(trained, state_dict=both), path / "last.ckpt")
    return "last.ckpt", r"networks that differ, in .*\['student\.\*'\] and .*\['teacher\.\*'\];"


def parametrized(path):
    model = small_network(**THREE)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            parametrizations.weight_norm(module)
    torch.save({"model": model.state_dict()}, path / "a.pth")
    return "a.pth", r"(?s)Read from checkpoint\['model'\].* missing: patch_embed.*remove_parametrizations\."


def gathered_on_no_rank(path):
    empty = {key: torch.zeros(0) for key in small_network(**THREE).state_dict()}
    torch.save({"module": empty, "ds_version": "0.17"}, path / "a.pt")
    return "a.pt", r"(?s)of another shape: patch_embed\.proj\.0\.weight found \(0,\) .*zero_to_fp32\.py"


def pointer(path):
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 80\n")
    return "model.safetensors", "is a pointer of git-lfs and not the weights: run `git lfs pull`"


def adapters_alone(path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_network(**THREE), peft.LoraConfig(target_modules=["attn.qkv", "attn.proj"]))
    torch.save(model.state_dict(), path / "a.pt")
    return "a.pt", r"(?s)\['base_model\.model\.\*'\].*unexpected: .*base_layer.*merge_and_unload\(\)"


def another_network(path):
    model = create_model("resnet18", num_classes=3)
    torch.save(_lightning(Trained(), state_dict=_prefixed(model.state_dict(), "model.")), path / "last.ckpt")
    return (
        "last.ckpt",
        r"not a NAT in a known layout. Found keys such as 'model\.conv1\.weight'.*checkpoint\['state_dict'\]",
    )


def another_size(path):
    save_file(_prefixed(random_state_dict("nat_models", embed_dim=32), "net."), path / "model.safetensors")
    return "model.safetensors", r"Read from checkpoint\['net\.\*'\]\.\n\d+ of another shape: head"


REFUSED = [
    holds_a_class,
    teacher_and_student,
    parametrized,
    gathered_on_no_rank,
    pointer,
    adapters_alone,
    another_network,
    another_size,
]


@pytest.mark.parametrize("trainer", REFUSED, ids=lambda trainer: trainer.__name__)
def test_what_cannot_load_says_why_in_at_most_five_lines(tmp_path, trainer):
    file, message = trainer(tmp_path)
    with pytest.raises(CheckpointError, match=message) as refused:
        load_file(tmp_path / file, num_classes=1000 if trainer is another_size else 3)
    text = str(refused.value)
    assert len(text.splitlines()) <= 5 and len(text) < 5 * 240
    assert "damaged" not in text and "elete" not in text
