"""The three key layouts of published checkpoints, the maps between them, and loading that is never partial.

- "nat_models": this package's state dicts.
- "original": the authors' nat_*.pth. Levels end with their downsampling, ours start with it.
- "transformers": the repositories on the Hub (NatForImageClassification). query, key and value are apart, the two layer
  scales together.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models import clean_state_dict
from torch import Tensor, nn

from .errors import CheckpointError

LAYOUTS = ("nat_models", "original", "transformers")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: EMA weights win
_LISTED_KEYS = 20

# original <-> transformers. I is a level, J a block; what follows the prefix (weight, bias, an index) is kept.
_BLOCK = ("levels.I.blocks.J", "nat.encoder.levels.I.layers.J")
_PREFIXES = [
    ("patch_embed.proj", "nat.embeddings.patch_embeddings.projection"),
    ("patch_embed.norm", "nat.embeddings.norm"),
    ("levels.I.downsample", "nat.encoder.levels.I.downsample"),
    *(
        (f"{_BLOCK[0]}.{original}", f"{_BLOCK[1]}.{transformers}")
        for original, transformers in (
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("attn.rpb", "attention.self.rpb"),
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        )
    ),
    ("norm", "nat.layernorm"),
    ("head", "classifier"),
]


def _rename(key: str, source: int) -> str | None:
    for pair in _PREFIXES:
        pattern = re.escape(pair[source]).replace("I", r"(\d+)").replace("J", r"(\d+)")
        if match := re.fullmatch(rf"{pattern}(\..*)?", key):
            *numbers, rest = match.groups()
            prefix = pair[1 - source]
            for letter, number in zip("IJ", numbers, strict=False):
                prefix = prefix.replace(letter, number)
            return prefix + (rest or "")
    return None


def _original_from_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in state_dict.items():
        key = re.sub(r"^head\.fc\.", "head.", key)
        key = re.sub(r"^levels\.(\d+)\.downsample\.", lambda m: f"levels.{int(m[1]) - 1}.downsample.", key)
        out[re.sub(r"\.ls([12])\.gamma$", r".gamma\1", key)] = value
    return out


def _ours_from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in state_dict.items():
        key = re.sub(r"^head\.", "head.fc.", key)
        key = re.sub(r"^levels\.(\d+)\.downsample\.", lambda m: f"levels.{int(m[1]) + 1}.downsample.", key)
        out[re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)] = value
    return out


def _transformers_from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.(\w+)", key):
            prefix = f"nat.encoder.levels.{match[1]}.layers.{match[2]}.attention.self"
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[f"{prefix}.{name}.{match[3]}"] = part
        elif match := re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.gamma1", key):
            scales = torch.stack([value, state_dict[key[:-1] + "2"]])
            out[f"nat.encoder.levels.{match[1]}.layers.{match[2]}.layer_scale_parameters"] = scales
        elif not key.endswith(".gamma2"):
            out[_rename(key, source=0) or key] = value
    return out


def _original_from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A backbone saved without its classification model lacks the prefix.
    state_dict = {k if k.startswith(("nat.", "classifier.")) else f"nat.{k}": v for k, v in state_dict.items()}
    out = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r"nat\.encoder\.levels\.(\d+)\.layers\.(\d+)\.attention\.self\.query\.(\w+)", key):
            parts = [state_dict.get(key.replace(".query.", f".{name}.")) for name in ("query", "key", "value")]
            if all(part is not None for part in parts):
                out[f"levels.{match[1]}.blocks.{match[2]}.attn.qkv.{match[3]}"] = torch.cat(parts)
        elif match := re.fullmatch(r"nat\.encoder\.levels\.(\d+)\.layers\.(\d+)\.layer_scale_parameters", key):
            for i, scale in enumerate(value.unbind(), start=1):
                out[f"levels.{match[1]}.blocks.{match[2]}.gamma{i}"] = scale
        elif not re.search(r"\.attention\.self\.(key|value)\.\w+$", key):
            out[_rename(key, source=1) or key] = value
    return out


def detect_layout(state_dict: Mapping[str, Tensor]) -> str:
    """Names the layout of a state dict: one of LAYOUTS.

    Raises:
        CheckpointError: The keys are of none of them.
    """
    if any(re.match(r"(nat\.)?(embeddings|encoder)\.", key) for key in state_dict):
        return "transformers"
    if any(key.startswith("patch_embed.proj.0.") for key in state_dict):
        original = any(re.match(r"levels\.0\.downsample\.|head\.(weight|bias)$|.*\.gamma[12]$", k) for k in state_dict)
        return "original" if original else "nat_models"
    raise CheckpointError(
        "The checkpoint is not a NAT in a known layout. Found keys such as "
        f"{', '.join(map(repr, list(state_dict)[:4])) or '(none)'}; expected patch_embed.proj.0.weight, "
        "levels.0.blocks.0.attn.qkv.weight, ... (nat_models and original layout) or "
        "nat.embeddings.patch_embeddings.projection.0.weight, ... (transformers layout)."
    )


def convert_state_dict(state_dict: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Renames, splits and joins the tensors of a state dict from whichever layout it has to `layout`.

    Keys that no layout knows are kept as they are, for the loader to report.

    Raises:
        ValueError: `layout` is not in LAYOUTS.
        CheckpointError: The state dict is in none of them.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout=}.")
    source = detect_layout(state_dict)
    if source == layout:
        return dict(state_dict)
    to_original = {"nat_models": _original_from_ours, "transformers": _original_from_transformers, "original": dict}
    from_original = {"nat_models": _ours_from_original, "transformers": _transformers_from_original, "original": dict}
    return from_original[layout](to_original[source](state_dict))


def unwrap(checkpoint: Mapping) -> dict[str, Tensor]:
    """Takes the state dict out of a training checkpoint (EMA weights first), without DDP or compile prefixes."""
    for name in _WRAPPERS:
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
            break
    return clean_state_dict(checkpoint)


def fit_state_dict(checkpoint: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Converts a checkpoint of any layout to the keys and shapes of `model`, a NAT, and checks that nothing is left.

    rpb is interpolated (bicubic) to the model's kernel_size. The head is kept if it has as many classes as the model
    and dropped if the model asks for another number than the checkpoint was declared with. The input channels of the
    stem are timm's to adapt.

    Raises:
        CheckpointError: Keys are missing or unexpected, shapes differ; all of it is listed.
    """
    state_dict = convert_state_dict(unwrap(checkpoint), "nat_models")
    target = model.state_dict()
    _fit_head(state_dict, model)
    new_head = {"head.fc.weight", "head.fc.bias"} if model.num_classes != model.pretrained_cfg["num_classes"] else set()
    first_conv = f"{model.pretrained_cfg['first_conv']}.weight"

    mismatched = []
    for key, value in state_dict.items():
        if key not in target:
            continue
        expected = target[key].shape
        if key.endswith(".rpb") and value.ndim == 3 and value.shape[0] == expected[0] and value.shape != expected:
            window = tuple((n + 1) // 2 for n in expected[1:])
            state_dict[key] = resize_rel_pos_bias_table_simple(value, window, expected)
        elif key == first_conv and value.ndim == 4 and value[:, :1].shape == target[key][:, :1].shape:
            continue
        elif value.shape != expected:
            mismatched.append(f"{key} found {tuple(value.shape)} expected {tuple(expected)}")
    problems = {
        "missing": [key for key in target if key not in state_dict and key not in new_head],
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


def _fit_head(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Keeps, drops or refuses the head, whose size may differ from what pretrained_cfg declares (a fine-tune)."""
    weight = state_dict.get("head.fc.weight")
    if weight is None:
        return
    found, wanted, declared = len(weight), model.num_classes, model.pretrained_cfg["num_classes"]
    if found == wanted:
        # timm drops the head by this number, which describes the checkpoint: now it is known.
        model.pretrained_cfg["num_classes"] = found
    elif wanted == declared:
        raise CheckpointError(
            f"The checkpoint's head has {found} classes, the model's {wanted}. Pass num_classes={found} to use it, "
            f"or num_classes=0 to load the backbone alone."
        )
    else:
        del state_dict["head.fc.weight"]
        state_dict.pop("head.fc.bias", None)


@contextmanager
def explain_load_errors(name: str, pretrained_cfg: Mapping) -> Iterator[None]:
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
