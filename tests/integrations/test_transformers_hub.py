"""transformers' Auto classes on repositories as shi-labs has them, served on 127.0.0.1, in fresh processes."""

import io
import json

import pytest
import torch
from safetensors.torch import save

from nat_models.checkpoints import convert_state_dict
from tests.conftest import FIXTURES, original_state_dict
from tests.hub import Hub, client_environment

pytest.importorskip("transformers", reason="transformers is not installed")

REPOS = {"nat_mini": "shi-labs/nat-mini-in1k-224", "dinat_mini": "shi-labs/dinat-mini-in1k-224"}
# Of the repositories: what transformers 4.24 wrote.
FIELDS = dict(
    attention_probs_dropout_prob=0.0,
    depths=[3, 4, 6, 5],
    drop_path_rate=0.2,
    embed_dim=64,
    hidden_act="gelu",
    hidden_dropout_prob=0.0,
    hidden_size=512,
    initializer_range=0.02,
    kernel_size=7,
    layer_norm_eps=1e-05,
    layer_scale_init_value=0.0,
    mlp_ratio=3.0,
    num_channels=3,
    num_heads=[2, 4, 8, 16],
    num_layers=4,
    patch_size=4,
    qkv_bias=True,
    torch_dtype="float32",
    transformers_version="4.24.0.dev0",
)
DILATIONS = [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]
WITHOUT_NATTEN = "import sys\nsys.modules['natten'] = None\n"


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    for variant, repo in REPOS.items():
        model_type = variant.split("_")[0]
        tensors = convert_state_dict(original_state_dict(variant), "transformers", model_type=model_type)
        labels = {str(i): f"class {i}" for i in range(1000)}
        config = dict(
            FIELDS,
            architectures=[f"{model_type.capitalize()}ForImageClassification"],
            model_type=model_type,
            id2label=labels,
            label2id={name: int(i) for i, name in labels.items()},
        )
        if model_type == "dinat":
            config["dilations"] = DILATIONS
        hub.files[repo] = {"config.json": json.dumps(config).encode()}
        if model_type == "nat":
            hub.files[repo]["model.safetensors"] = save(tensors, metadata=dict(format="pt"))
        else:  # both kinds of file are on the Hub
            buffer = io.BytesIO()
            torch.save(tensors, buffer)
            hub.files[repo]["pytorch_model.bin"] = buffer.getvalue()
    yield hub
    hub.close()


@pytest.mark.parametrize("natten", [True, False], ids=["natten", "no natten"])
@pytest.mark.parametrize("variant", REPOS)
def test_a_repository_of_the_hub_loads_and_gives_the_golden_logits(variant, natten, hub, tmp_path, hub_clients):
    fixture = "dinat_models" if variant.startswith("dinat") else "nat_models"
    code = f"""
import torch, nat_models.integrations.hf_transformers
from safetensors.torch import load_file
from transformers import AutoBackbone, AutoModelForImageClassification
from tests.conftest import tensor

if {natten}:
    import natten
model = AutoModelForImageClassification.from_pretrained("{REPOS[variant]}")
golden = load_file({str(FIXTURES / fixture)!r} + ".safetensors")["{variant}/224x224/logits"]
image = tensor("image_224x224", (1, 3, 224, 224))
with torch.no_grad():
    torch.testing.assert_close(model(image).logits[0], golden, rtol=0, atol=2e-5)
print(type(model).__name__, model.config.id2label[7])
backbone = AutoBackbone.from_pretrained("{REPOS[variant]}", out_features=["stage1", "stage4"])
print([tuple(m.shape) for m in backbone(image).feature_maps])
"""
    environment = client_environment(hub.endpoint, tmp_path)
    done = hub_clients.run(code=("" if natten else WITHOUT_NATTEN) + code, environment=environment)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    name = variant.split("_")[0].capitalize()
    assert f"{name}ForImageClassification class 7" in printed
    assert "[(1, 64, 56, 56), (1, 512, 7, 7)]" in printed
