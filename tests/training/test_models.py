"""Promises of models by name."""

import torch
from safetensors.torch import load_file

from nat_models.training.models import make_model
from tests.training.conftest import TINY


def test_a_checkpoint_file_is_where_training_starts(run):
    file = run[0] / "last" / "model.safetensors"
    kwargs = dict(checkpoint=str(file), model_kwargs=TINY["model_kwargs"])
    model, weights = make_model("nat_mini", num_classes=3, **kwargs), load_file(file)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    other_head = make_model("nat_mini", num_classes=5, **kwargs)
    assert torch.equal(other_head.patch_embed.proj[0].weight, weights["patch_embed.proj.0.weight"])
    assert other_head.num_classes == 5
