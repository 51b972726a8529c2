"""Loading that is never partial: a checkpoint of any layout is fitted to a model, or refused with what does not fit."""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.error import URLError

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models import adapt_input_conv, load_pretrained
from torch import Tensor, nn

from ..errors import CheckpointError
from .files import first_line, holds_weights, read_checkpoint, sha256_of, why_unreadable
from .layouts import convert_state_dict
from .manifest import HUB_FILES, Weights, published
from .unwrapping import Network, find_network

_LISTED_KEYS = 6
_HEAD, _NORM, _OUTPUT_NORMS = "head.fc", "norm", "output_norms"
_STEMS = ("patch_embed.proj.0.weight", "patch_embed.proj.weight")


def fit_state_dict(
    checkpoint: Mapping, model: nn.Module, *, num_classes: int | None = None, features_only: bool = False
) -> dict[str, Tensor]:
    """Converts a checkpoint of any layout to exactly the keys and shapes of `model`, a NAT, or refuses it.

    rpb is interpolated (bicubic) to the model's kernel_size. The head is kept if it has as many classes as the model.
    It becomes the model's own, new one if the model asks for another number than the checkpoint was declared with. So
    do output_norms, as in the authors' own fine-tuning, if the checkpoint has none. The input channels of the stem are
    timm's to adapt.

    Args:
        checkpoint: A state dict, or a training checkpoint that holds one; what stands outside the network is left out.
        model: Left as it is.
        num_classes: Of the checkpoint, as declared by its configuration; None means the model's pretrained_cfg.
        features_only: The model's feature maps alone are asked for: the norm after them may be missing.

    Raises:
        CheckpointError: It holds no NAT or several, keys are missing or unexpected, shapes differ; how many and which.
    """
    network = find_network(checkpoint)
    state_dict = convert_state_dict(network.tensors, "nat_models")
    target = model.state_dict()
    declared = model.pretrained_cfg["num_classes"] if num_classes is None else num_classes
    _fit_head(state_dict, target, model.num_classes, declared, network)
    for part in [_OUTPUT_NORMS, *([_NORM] if features_only else [])]:
        if not any(key.startswith(f"{part}.") for key in state_dict):
            state_dict |= {key: value for key, value in target.items() if key.startswith(f"{part}.")}

    for key, value in state_dict.items():
        expected = target[key].shape if key in target else value.shape
        if key.endswith(".rpb") and value.ndim == 3 and value.shape[0] == expected[0] and value.shape != expected:
            window = tuple((n + 1) // 2 for n in expected[1:])
            state_dict[key] = resize_rel_pos_bias_table_simple(value, window, expected)
    refuse_misfits(state_dict, target, network.place)
    return state_dict


def complete(fitted: dict[str, Tensor], target: Mapping[str, Tensor], prefix: str) -> None:
    """What segmenters and detectors do last to fit a state dict, in place: counters of batches, which nothing reads,
    are the model's where they are missing, and a stem is adapted to other input channels as timm does.

    Args:
        fitted: The state dict.
        target: The model's.
        prefix: Of the backbone's keys.

    Raises:
        CheckpointError: Keys are missing or unexpected, shapes differ; how many and which.
    """
    counters = [key for key in target if key.endswith(".num_batches_tracked") and key not in fitted]
    fitted |= {key: target[key] for key in counters}
    for key in (f"{prefix}{stem}" for stem in _STEMS):
        if key in fitted and key in target and fitted[key].shape[1] != target[key].shape[1]:
            fitted[key] = adapt_input_conv(target[key].shape[1], fitted[key])
    refuse_misfits(fitted, target)


def refuse_misfits(state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor], place: str = "") -> None:
    """Raises a CheckpointError that lists how a state dict does not fit, `target` being the model's.

    A stem may have other input channels. `place` is where in its file the state dict was found.
    """
    missing = [key for key in target if key not in state_dict]
    unexpected = [key for key in state_dict if key not in target]
    mismatched = [
        f"{key} found {tuple(value.shape)} expected {tuple(target[key].shape)}"
        for key, value in state_dict.items()
        if key in target and value.shape != target[key].shape and not _of_other_channels(key, value, target[key])
    ]
    if missing or unexpected or mismatched:
        where = f" Read from {place}." if place else ""
        lines = [f"The checkpoint does not fit the model, nothing was loaded.{where}"]
        problems = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
        lines += [f"{len(keys)} {what}: {_list(keys)}." for what, keys in problems.items() if keys]
        raise CheckpointError("\n".join([*lines, *_advice(missing, unexpected, mismatched)]))


def _of_other_channels(key: str, value: Tensor, own: Tensor) -> bool:
    return key in _STEMS and value.ndim == 4 and value[:, :1].shape == own[:, :1].shape


def _list(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
    return ", ".join(keys[:_LISTED_KEYS]) + more


def _advice(missing: list[str], unexpected: list[str], mismatched: list[str]) -> list[str]:
    """What to do about misfits whose cause can be told, in a line or none."""
    if any(".parametrizations." in key for key in unexpected):
        return ["Its weights are parametrized; before saving: torch.nn.utils.parametrize.remove_parametrizations."]
    if unexpected and all(key.startswith(f"{_OUTPUT_NORMS}.") for key in unexpected):
        return ["It has a norm for each level's map, which output_norms=True loads and uses."]
    if any("lora_" in key for key in unexpected):
        return ["It holds adapters beside the weights; before saving: model = model.merge_and_unload()."]
    if any("found (0,)" in text for text in mismatched):
        return ["Its tensors are empty, as ZeRO-3 leaves them; DeepSpeed's zero_to_fp32.py gathers them in a file."]
    if not unexpected and not mismatched:
        head, norm = ({f"{part}.weight", f"{part}.bias"} for part in (_HEAD, _NORM))
        if set(missing) == head:
            return ["It is a backbone without a head: num_classes=0 loads it."]
        if norm <= set(missing) <= norm | head:
            return ["It lacks the norm after the last level, as features_only leaves it; features_only=True loads it."]
    return []


def _fit_head(
    state_dict: dict[str, Tensor], target: Mapping[str, Tensor], wanted: int, declared: int, network: Network
) -> None:
    """Keeps the head, puts the model's own in its place or refuses it.

    Its number of classes may differ from the declared one: a fine-tune keeps the configuration it began from.
    """
    weight = state_dict.get(f"{_HEAD}.weight")
    if weight is not None and len(weight) == wanted:
        return
    if wanted != declared:
        if weight is None and wanted:
            _refuse_a_head_elsewhere(network, target[f"{_HEAD}.weight"])
        for key in (f"{_HEAD}.weight", f"{_HEAD}.bias"):
            state_dict.pop(key, None)
            if key in target:
                state_dict[key] = target[key]
    elif weight is not None:
        raise CheckpointError(
            f"The checkpoint's head has {len(weight)} classes, the model's {wanted}. Pass num_classes={len(weight)} "
            f"to use it, or num_classes=0 to load the backbone alone."
        )


def _refuse_a_head_elsewhere(network: Network, new: Tensor) -> None:
    """A new head would be wrong without a word where the file has a trained one of its shape outside the network."""
    for key, value in network.beside.items():
        if value.shape == new.shape:
            raise CheckpointError(
                f"The network in {network.place} has no head, and {key} beside it is of a head's shape.\n"
                "num_classes=0 loads the network; to use that head too, save it as the network's head.fc."
            )


def load_weights(
    model: nn.Module, name: str, pretrained_cfg: Mapping, cache_dir: str | None = None, *, features_only: bool = False
) -> None:
    """Fills a model with the weights that a configuration of timm's names: a file, a state dict, a repository.

    Of a repository that the manifest knows, the manifest's revision is asked for, and a file whose sha256 it knows is
    verified; REPO@REVISION in the configuration asks for another revision, of which it knows nothing.

    Args:
        model: A NAT.
        name: Of the model, for messages.
        pretrained_cfg: timm's, as a dict; left as it is.
        cache_dir: In place of the Hub's own cache.
        features_only: As in fit_state_dict.

    Raises:
        CheckpointError: The weights cannot be found, read or fitted, or are not those that the manifest knows; nothing
            was loaded.
    """
    # timm drops a head by comparing numbers of classes that describe the configuration and not the file. Without the
    # classifier's name it leaves the head to the filter, and loads strictly.
    own = {**pretrained_cfg, "classifier": None}
    fit = partial(fit_state_dict, num_classes=pretrained_cfg["num_classes"], features_only=features_only)
    known = published(own["hf_hub_id"], own.get("hf_hub_filename")) if _is_on_hub(own) else None
    if known is not None and known.revision is not None:
        own["hf_hub_id"] = f"{known.repo}@{known.revision}"
    with explain_errors(name, dict(own), cache_dir):
        file = _local_file(own)
        if known is not None and known.sha256 is not None:
            file = _verified(known, cache_dir)
        if file is not None:
            # timm would take one entry out of the file before the filter sees what is beside it.
            own |= dict(source="", state_dict=fit(read_checkpoint(file), model))
            load_pretrained(model, own, in_chans=model.in_chans, cache_dir=cache_dir)
        else:
            load_pretrained(model, own, in_chans=model.in_chans, filter_fn=fit, cache_dir=cache_dir)


def _local_file(pretrained_cfg: Mapping) -> str | None:
    """The file or folder that a configuration takes weights from; None where timm finds it."""
    file, source = pretrained_cfg.get("file"), pretrained_cfg.get("source")
    if source == "local-dir":
        return file if holds_weights(file) else None
    return None if source == "hf-hub" or pretrained_cfg.get("state_dict") else file


def _is_on_hub(pretrained_cfg: Mapping) -> bool:
    """Whether timm would ask the Hub."""
    nearer = pretrained_cfg.get("state_dict") or pretrained_cfg.get("file")
    return bool(pretrained_cfg.get("hf_hub_id")) and (pretrained_cfg.get("source") == "hf-hub" or not nearer)


def _verified(known: Weights, cache_dir: str | None) -> str:
    """The file of a checkpoint whose hash is known, from the cache or the Hub."""
    file = hf_hub_download(known.repo, known.file, revision=known.revision, cache_dir=cache_dir)
    if (found := sha256_of(file)) != known.sha256:
        raise CheckpointError(
            f"{known.name}: {file} is not the file that weights/manifest.json knows, nothing was loaded. "
            f"Its sha256 is {found}, expected {known.sha256}.\n"
            "Delete it and load again. If it comes back the same, the repository has changed: only if you trust it, "
            "pass the file by its name, pretrained_cfg_overlay=dict(file='...')."
        )
    return file


@contextmanager
def explain_errors(name: str, pretrained_cfg: Mapping, cache_dir: str | None = None) -> Iterator[None]:
    """Turns what loading weights raises into one CheckpointError that says what was sought, where, and what to do."""
    on_hub = _is_on_hub(pretrained_cfg)
    elsewhere = pretrained_cfg.get("file") or pretrained_cfg.get("url")
    source = f"{pretrained_cfg['hf_hub_id']} on the Hugging Face Hub" if on_hub else elsewhere
    try:
        yield
    except LocalEntryNotFoundError as e:
        raise CheckpointError(
            f"{name}: {source} is neither in the local cache nor can the Hub be reached. Download it once with a "
            f"connection, or pass a local file: pretrained_cfg_overlay=dict(file='...'). ({e})"
        ) from e
    except RevisionNotFoundError as e:
        raise CheckpointError(f"{name}: {source} has no such revision (branch, tag or commit). ({e})") from e
    except RepositoryNotFoundError as e:
        raise CheckpointError(f"{name}: there is no repository {source}, or it is private. ({e})") from e
    except EntryNotFoundError as e:
        wanted = pretrained_cfg.get("hf_hub_filename") or " or ".join(HUB_FILES)
        raise CheckpointError(f"{name}: {source} holds no weights, expected {wanted}. ({e})") from e
    except (HfHubHTTPError, URLError) as e:
        raise CheckpointError(f"{name}: downloading {source} failed. ({e})") from e
    except (SafetensorError, pickle.UnpicklingError, EOFError) as e:
        raise CheckpointError(f"{name}: {_unreadable(pretrained_cfg, cache_dir, e)}") from e
    except OSError as e:
        if on_hub and e.errno is not None:
            raise CheckpointError(
                f"{name}: {source} is not in the cache {cache_dir or constants.HF_HUB_CACHE}, which cannot be written "
                f"to: {e.strerror}. Set HF_HUB_CACHE (or HF_HOME) to a folder that can. ({e})"
            ) from e
        if not isinstance(e, FileNotFoundError):
            raise
        raise CheckpointError(f"{name}: there is no weights file {source}. {e}") from e
    except RuntimeError as e:
        # torch.load reports a damaged archive, and timm a refused pickle, as a plain RuntimeError.
        if isinstance(e, CheckpointError) or not re.search(r"PytorchStreamReader|weights_only", str(e)):
            raise
        raise CheckpointError(f"{name}: {_unreadable(pretrained_cfg, cache_dir, e)}") from e


def _unreadable(pretrained_cfg: Mapping, cache_dir: str | None, error: Exception) -> str:
    """What timm could not read, looked at where it is: a download in the Hub's cache."""
    path = pretrained_cfg.get("file")
    if _is_on_hub(pretrained_cfg):
        repo, _, revision = pretrained_cfg["hf_hub_id"].partition("@")
        files = dict.fromkeys([*HUB_FILES, pretrained_cfg.get("hf_hub_filename") or HUB_FILES[0]])
        cached = [try_to_load_from_cache(repo, f, cache_dir=cache_dir, revision=revision or None) for f in files]
        path = next((x for x in cached if isinstance(x, str)), None)
    if path is not None and Path(path).is_file():
        return why_unreadable(Path(path), error, advice="Delete it and load again.")
    where = path or pretrained_cfg.get("hf_hub_id")
    return f"{where} cannot be read: it is cut off, damaged or no weights file. ({first_line(error)})"
