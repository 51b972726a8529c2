"""Loading that is never partial: a checkpoint of any layout is fitted to a model, or refused with what does not fit."""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models import clean_state_dict, load_pretrained
from torch import Tensor, nn

from ..errors import CheckpointError
from .layouts import convert_state_dict

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: EMA weights win
_LISTED_KEYS = 20
_HEAD, _STEM = "head.fc", "patch_embed.proj.0.weight"


def unwrap(checkpoint: Mapping) -> dict[str, Tensor]:
    """Takes the state dict out of a training checkpoint (EMA weights first), without DDP or compile prefixes."""
    for name in _WRAPPERS:
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
            break
    return clean_state_dict(checkpoint)


def fit_state_dict(checkpoint: Mapping, model: nn.Module, *, num_classes: int | None = None) -> dict[str, Tensor]:
    """Converts a checkpoint of any layout to exactly the keys and shapes of `model`, a NAT, or refuses it.

    rpb is interpolated (bicubic) to the model's kernel_size. The head is kept if it has as many classes as the model.
    It becomes the model's own, new one if the model asks for another number than the checkpoint was declared with. The
    input channels of the stem are timm's to adapt.

    Args:
        checkpoint: A state dict, or a training checkpoint that holds one.
        model: Left as it is.
        num_classes: Of the checkpoint, as declared by its configuration; None means the model's pretrained_cfg.

    Raises:
        CheckpointError: Keys are missing or unexpected, shapes differ; all of it is listed.
    """
    state_dict = convert_state_dict(unwrap(checkpoint), "nat_models")
    target = model.state_dict()
    declared = model.pretrained_cfg["num_classes"] if num_classes is None else num_classes
    _fit_head(state_dict, target, model.num_classes, declared)

    mismatched = []
    for key, value in state_dict.items():
        if key not in target:
            continue
        expected = target[key].shape
        if key.endswith(".rpb") and value.ndim == 3 and value.shape[0] == expected[0] and value.shape != expected:
            window = tuple((n + 1) // 2 for n in expected[1:])
            state_dict[key] = resize_rel_pos_bias_table_simple(value, window, expected)
        elif key == _STEM and value.ndim == 4 and value[:, :1].shape == target[key][:, :1].shape:
            continue
        elif value.shape != expected:
            mismatched.append(f"{key} found {tuple(value.shape)} expected {tuple(expected)}")
    problems = {
        "missing": [key for key in target if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in target],
        "of another shape": mismatched,
    }
    if any(problems.values()):
        listed = [f"{len(keys)} {what}: {_list(keys)}" for what, keys in problems.items() if keys]
        raise CheckpointError(f"The checkpoint does not fit the model, nothing was loaded. {'; '.join(listed)}.")
    return state_dict


def _list(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
    return ", ".join(keys[:_LISTED_KEYS]) + more


def _fit_head(state_dict: dict[str, Tensor], target: Mapping[str, Tensor], wanted: int, declared: int) -> None:
    """Keeps the head, puts the model's own in its place or refuses it.

    Its number of classes may differ from the declared one: a fine-tune keeps the configuration it began from.
    """
    weight = state_dict.get(f"{_HEAD}.weight")
    if weight is not None and len(weight) == wanted:
        return
    if wanted != declared:
        for key in (f"{_HEAD}.weight", f"{_HEAD}.bias"):
            state_dict.pop(key, None)
            if key in target:
                state_dict[key] = target[key]
    elif weight is not None:
        raise CheckpointError(
            f"The checkpoint's head has {len(weight)} classes, the model's {wanted}. Pass num_classes={len(weight)} "
            f"to use it, or num_classes=0 to load the backbone alone."
        )


def load_weights(model: nn.Module, name: str, pretrained_cfg: Mapping, cache_dir: str | None = None) -> None:
    """Fills a model with the weights that a configuration of timm's names: a file, a state dict, a repository.

    Args:
        model: A NAT.
        name: Of the model, for messages.
        pretrained_cfg: timm's, as a dict; left as it is.
        cache_dir: In place of the Hub's own cache.

    Raises:
        CheckpointError: The weights cannot be found, read or fitted; nothing was loaded.
    """
    # timm drops a head by comparing numbers of classes that describe the configuration and not the file. Without the
    # classifier's name it leaves the head to the filter, and loads strictly.
    own = {**pretrained_cfg, "classifier": None}
    fit = partial(fit_state_dict, num_classes=pretrained_cfg["num_classes"])
    with _explain_errors(name, pretrained_cfg):
        load_pretrained(model, own, in_chans=model.in_chans, filter_fn=fit, cache_dir=cache_dir)


@contextmanager
def _explain_errors(name: str, pretrained_cfg: Mapping) -> Iterator[None]:
    """Turns what loading weights raises into one CheckpointError that says what was sought, where, and what to do."""
    repo, file = pretrained_cfg.get("hf_hub_id"), pretrained_cfg.get("file")
    source = file or f"{repo} on the Hugging Face Hub"
    try:
        yield
    except LocalEntryNotFoundError as e:
        raise CheckpointError(
            f"{name}: {source} is neither in the local cache nor can the Hub be reached. Download it once with a "
            f"connection, or pass a local file: pretrained_cfg_overlay=dict(file='...'). ({e})"
        ) from e
    except RepositoryNotFoundError as e:
        raise CheckpointError(f"{name}: there is no repository {source}, or it is private. ({e})") from e
    except EntryNotFoundError as e:
        raise CheckpointError(
            f"{name}: {source} holds no weights, expected model.safetensors or pytorch_model.bin. ({e})"
        ) from e
    except HfHubHTTPError as e:
        raise CheckpointError(f"{name}: downloading {source} failed. ({e})") from e
    except FileNotFoundError as e:
        raise CheckpointError(f"{name}: there is no weights file {source}. {e}") from e
    except (SafetensorError, pickle.UnpicklingError, EOFError) as e:
        raise CheckpointError(_unreadable(name, repo, file, e)) from e
    except RuntimeError as e:
        # torch.load reports a damaged archive, and timm a refused pickle, as a plain RuntimeError.
        if isinstance(e, CheckpointError) or not re.search(r"PytorchStreamReader|weights_only", str(e)):
            raise
        raise CheckpointError(_unreadable(name, repo, file, e)) from e


def _unreadable(name: str, repo: str | None, file: str | None, error: Exception) -> str:
    cached = [] if file else [try_to_load_from_cache(repo, f) for f in ("model.safetensors", "pytorch_model.bin")]
    path = next((x for x in [file, *cached] if isinstance(x, str)), repo)
    return (
        f"{name}: {path} cannot be read: it is cut off, damaged or no weights file. Expected a safetensors file or a "
        f"torch.save archive of tensors. Delete it and load again. ({type(error).__name__}: {error})"
    )
