"""Loading from the Hub: the real client against a hub served on 127.0.0.1, in fresh processes.

huggingface_hub reads its endpoint and its cache once, at import, so every case runs in a process of its own.
"""

import hashlib
import io
import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load, save
from timm.models import create_model, save_for_hf

import nat_models
from nat_models.checkpoints import convert_state_dict
from tests.conftest import FIXTURES, original_state_dict
from tests.hub import Hub, client_environment, commit_of

REPO = "shi-labs/nat-mini-in1k-224"


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    return convert_state_dict(original_state_dict("nat_mini"), "transformers")


def _bin(state_dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return buffer.getvalue()


_CHECK_LOGITS = f"""
from safetensors.torch import load_file
from tests.conftest import tensor
golden = load_file({str(FIXTURES / "nat_models.safetensors")!r})["nat_mini/96x96/logits"]
with torch.no_grad():
    logits = model.eval()(tensor("image_96x96", (1, 3, 96, 96)))[0]
torch.testing.assert_close(logits, golden, rtol=0, atol=2e-5)
print("logits hold")
"""


@pytest.fixture
def run(hub_clients):
    """Runs Python in a process that has imported timm, torch and nat_models with an environment of its own."""

    def run(hub: Hub | None, cache, code: str, **environment: str) -> subprocess.CompletedProcess:
        # A closed port stands for a network that is down.
        endpoint = hub.endpoint if hub else "http://127.0.0.1:9"
        environment = client_environment(endpoint, cache) | environment
        return hub_clients.run(code="import timm, torch, nat_models\n" + code, environment=environment)

    return run


def _error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode != 0, done.stdout
    last = done.stderr.strip().split("nat_models.errors.CheckpointError: ")
    assert len(last) == 2, f"not one CheckpointError: {done.stderr}"
    return last[1]


LOAD = 'model = timm.create_model("nat_mini", pretrained=True)\n'


def test_pretrained_takes_safetensors_first(hub, tmp_path, published, run):
    hub.files[REPO] = {"model.safetensors": save(published), "pytorch_model.bin": b"not asked for"}
    done = run(hub, tmp_path, LOAD + _CHECK_LOGITS)
    assert done.stdout == "logits hold\n", done.stderr
    assert hub.downloads() == {"model.safetensors"}


def test_pretrained_falls_back_to_the_pickle_and_then_works_offline(hub, tmp_path, published, run):
    hub.files[REPO] = {"pytorch_model.bin": _bin(published)}
    code = LOAD.replace("nat_mini", "nat_mini.shi_in1k") + _CHECK_LOGITS
    assert run(hub, tmp_path, code).stdout == "logits hold\n"
    assert hub.downloads() == {"pytorch_model.bin"}
    hub.requests.clear()
    done = run(hub, tmp_path, code, HF_HUB_OFFLINE="1")
    assert done.stdout == "logits hold\n", done.stderr
    assert not hub.requests


@pytest.mark.slow  # the client tries again and again
def test_what_was_downloaded_is_used_where_nobody_said_that_the_network_is_down(hub, tmp_path, published, run):
    hub.files[REPO] = {"model.safetensors": save(published)}
    assert run(hub, tmp_path, LOAD + _CHECK_LOGITS).stdout == "logits hold\n"
    done = run(None, tmp_path, LOAD + _CHECK_LOGITS)
    assert done.stdout == "logits hold\n", done.stderr


def test_the_authors_layout_on_a_hub_loads_too(hub, tmp_path, run):
    hub.files["someone/nat"] = {"nat_mini.pth": _bin({"state_dict": original_state_dict("nat_mini")})}
    overlay = "pretrained_cfg_overlay=dict(hf_hub_id='someone/nat', hf_hub_filename='nat_mini.pth')"
    done = run(hub, tmp_path, LOAD.replace("pretrained=True", f"pretrained=True, {overlay}") + _CHECK_LOGITS)
    assert done.stdout == "logits hold\n", done.stderr


def test_hf_hub_repositories_in_timm_format_load(hub, tmp_path, run):
    model_args = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    model = create_model("nat_mini", num_classes=3, **model_args).eval()
    save_for_hf(
        model,
        tmp_path / "repo",
        model_config=dict(label_names=["a", "b", "c"]),
        model_args=model_args,  # timm before 1.0.31 does not record them itself
        safe_serialization=True,
    )
    hub.files["someone/fine-tune"] = {f.name: f.read_bytes() for f in (tmp_path / "repo").iterdir()}
    x = torch.linspace(-2, 2, 3 * 64 * 64).sin().view(1, 3, 64, 64)
    code = """
model = timm.create_model("hf-hub:someone/fine-tune", pretrained=True).eval()
x = torch.linspace(-2, 2, 3 * 64 * 64).sin().view(1, 3, 64, 64)
print(model.pretrained_cfg["label_names"], model(x).tolist())
"""
    done = run(hub, tmp_path / "cache", code)
    assert done.stdout.strip() == f"['a', 'b', 'c'] {model(x).tolist()}", done.stderr


def test_a_missing_repository_is_one_clear_error(hub, tmp_path, run):
    assert f"nat_mini: there is no repository {REPO}" in _error(run(hub, tmp_path, LOAD))


def test_a_repository_without_weights_is_one_clear_error(hub, tmp_path, run):
    hub.files[REPO] = {"README.md": b"hello"}
    message = _error(run(hub, tmp_path, LOAD))
    assert f"nat_mini: {REPO} on the Hugging Face Hub holds no weights" in message
    assert "expected model.safetensors or pytorch_model.bin" in message


@pytest.mark.parametrize("environment", [pytest.param({}, marks=pytest.mark.slow), {"HF_HUB_OFFLINE": "1"}])
def test_no_connection_and_no_cache_is_one_clear_error(tmp_path, environment, run):
    message = _error(run(None, tmp_path, LOAD, **environment))
    assert f"nat_mini: {REPO} on the Hugging Face Hub is neither in the local cache" in message
    assert "pretrained_cfg_overlay=dict(file=" in message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_cut_off_file_is_named_in_the_cache(hub, tmp_path, published, name, run):
    content = save(published) if name.endswith("safetensors") else _bin(published)
    hub.files[REPO] = {name: content[: len(content) // 2]}
    message = _error(run(hub, tmp_path, LOAD))
    assert "cannot be read: it is cut off" in message
    assert str(tmp_path) in message and name in message  # the path to delete


def test_a_wrong_layout_on_the_hub_is_one_clear_error(hub, tmp_path, run):
    hub.files[REPO] = {"model.safetensors": save({"conv1.weight": torch.zeros(3)})}
    assert "not a NAT in a known layout. Found keys such as 'conv1.weight'" in _error(run(hub, tmp_path, LOAD))


SMALL = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


def _small(seed: int) -> bytes:
    torch.manual_seed(seed)
    return save(create_model("nat_mini", **SMALL).state_dict())


# Prints the largest weight of each head: what tells one network from another. `load` is what is tested.
_PRINT = f"""
def load(**overlay):
    model = timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **{SMALL})
    print(model.head.fc.weight.max().item())
"""


def _printed(content: bytes) -> str:
    return f"{load(content)['head.fc.weight'].max().item()}"


def test_a_pinned_revision_is_what_loads(hub, tmp_path, run):
    old, new = _small(1), _small(2)
    hub.files["someone/nat"] = {"model.safetensors": old}
    hub.commit("someone/nat", "v1", {"model.safetensors": old})
    hub.commit("someone/nat", "main", {"model.safetensors": new})
    at = commit_of({"model.safetensors": old})
    code = f"{_PRINT}\nfor at in ('', '@v1', '@{at}'): load(hf_hub_id='someone/nat' + at)\n"
    done = run(hub, tmp_path, code)
    assert done.stdout.split() == [_printed(new), _printed(old), _printed(old)], done.stderr
    message = _error(run(hub, tmp_path, f"{_PRINT}\nload(hf_hub_id='someone/nat@v2')"))
    assert "nat_mini: someone/nat@v2 on the Hugging Face Hub has no such revision" in message


def _manifest(tmp_path, **pins: str) -> str:
    """Code that makes nat_mini's entry of the manifest another one."""
    entry = {**nat_models.list_weights("nat_mini")[0]._asdict(), **pins}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"checkpoints": [entry]}))
    return f"from pathlib import Path\nnat_models.checkpoints.manifest.resource = lambda *names: Path({str(path)!r})\n"


def test_the_revision_and_the_file_that_the_manifest_knows_are_asked_for_verified_and_found_offline(hub, tmp_path, run):
    known, other = _bin(load(_small(1))), _small(2)
    files = {"pytorch_model.bin": known, "model.safetensors": other}
    hub.commit(REPO, "main", files)
    hub.commit(REPO, "main", {"pytorch_model.bin": b"another one"})
    pins = dict(revision=commit_of(files), sha256=hashlib.sha256(known).hexdigest())
    code = f"{_manifest(tmp_path, **pins)}{_PRINT}\nload()\nprint(nat_models.list_weights()[0].cached())"
    done = run(hub, tmp_path / "cache", code)
    assert done.returncode == 0, done.stderr
    largest, cached = done.stdout.split()
    assert largest == _printed(_small(1))
    assert cached.startswith(f"{tmp_path / 'cache'}/") and cached.endswith(f"{commit_of(files)}/pytorch_model.bin")
    assert hub.downloads() == {"pytorch_model.bin"}
    assert run(None, tmp_path / "cache", code, HF_HUB_OFFLINE="1").stdout == done.stdout


def test_a_file_of_another_hash_than_the_manifest_knows_is_refused(hub, tmp_path, run):
    content = _bin(load(_small(1)))
    hub.files[REPO] = {"pytorch_model.bin": content}
    message = _error(run(hub, tmp_path, f"{_manifest(tmp_path, sha256='0' * 64)}{_PRINT}\nload()"))
    for part in (
        hashlib.sha256(content).hexdigest(),
        "0" * 64,
        str(tmp_path),
        "pytorch_model.bin",
        "nothing was loaded",
    ):
        assert part in message
    assert "Delete it and load again" in message


def test_the_hash_of_the_published_file_is_none_of_another_revision_or_file(hub, tmp_path, run):
    hub.files[REPO] = {"pytorch_model.bin": _bin(load(_small(1))), "own.safetensors": _small(2)}
    code = f"{_manifest(tmp_path, sha256='0' * 64)}{_PRINT}\n"
    code += f"load(hf_hub_id='{REPO}@main')\nload(hf_hub_filename='own.safetensors')"
    done = run(hub, tmp_path, code)
    assert done.stdout.split() == [_printed(_small(1)), _printed(_small(2))], done.stderr


def test_a_cache_that_is_read_only_serves_what_it_has_and_the_rest_is_one_clear_error(hub, tmp_path, run):
    hub.files["someone/nat"] = {"model.safetensors": _small(1)}
    hub.files["someone/other"] = {"model.safetensors": _small(2)}
    cache = tmp_path / "cache"
    code = f"{_PRINT}\nload(hf_hub_id='someone/nat')\n"
    assert run(hub, cache, code).stdout.split() == [_printed(_small(1))]
    folders = [folder for folder, _, _ in os.walk(cache)]
    for folder in folders:
        os.chmod(folder, 0o555)
    try:
        obey = "from tests.hub import obey_permissions\nobey_permissions()\n"
        done = run(hub, cache, f"{obey}{code}load(hf_hub_id='someone/other')")
    finally:
        for folder in folders:
            os.chmod(folder, 0o755)
    assert done.stdout.split() == [_printed(_small(1))], done.stderr
    message = _error(done)
    assert "someone/other on the Hugging Face Hub is not in the cache" in message
    assert f"{cache / 'hub'}, which cannot be written to: Permission denied. Set HF_HUB_CACHE" in message


def test_a_repository_named_to_a_command_is_found_or_one_clear_error(hub, tmp_path, run):
    hub.files["someone/config"] = {"config.json": b'{"model_type": "nat"}'}
    code = """
from nat_models.cli import main
for repo in ("someone/lost", "someone/config@v3", "someone/config"):
    assert main(["export", "--model", f"hf-hub:{repo}"]) == 2
"""
    done = run(hub, tmp_path, code)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: hf-hub:")]
    for error, message in zip(
        errors, ("there is no repository", "has no such revision", "its config.json is not timm's"), strict=True
    ):
        assert message in error


def test_a_cache_that_cannot_be_made_is_one_clear_error(hub, tmp_path, run):
    hub.files["someone/nat"] = {"model.safetensors": _small(1)}
    message = _error(run(hub, tmp_path, f"{_PRINT}\nload(hf_hub_id='someone/nat')", HF_HUB_CACHE="/dev/null/cache"))
    assert "/dev/null/cache, which cannot be written to: Not a directory" in message
