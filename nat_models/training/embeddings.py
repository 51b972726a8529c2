"""Features of images: pooled, of every level, or dense; in one file, or streamed into a folder of shards."""

import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn

from ..errors import UserError
from ..writing import write_atomically, writing
from .decoding import Encoded, ImageFile, decode
from .images import load_images, read_batches
from .models import PRECISIONS, computing, make_model
from .report import console, track

KINDS = ("pooled", "levels", "dense")
FORMATS = (".safetensors", ".npz", ".parquet")


class Extractor:
    """A network that gives features, made where and when it is first called: it is pickled as its arguments.

    Called with a batch of Ray Data it gives that batch with features, so it can stand in `map_batches`.

    Args:
        model: timm name or a folder that a run wrote, or a model.
        kind: pooled [C], as before the classifier; levels, the mean of each level's map, all in a row; or dense, the
            map [H, W, C] of one level.
        level: Which level dense features are of, from 0; None is the last.
        img_size: Height and width; None means the model's.
        precision: Of the computation: float32, bfloat16 or float16.
        device: What to compute on.
        model_kwargs: More arguments of `make_model`, such as pretrained and checkpoint.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        kind: str = "pooled",
        level: int | None = None,
        img_size: int | None = None,
        precision: str = "float32",
        device: str = "cpu",
        **model_kwargs,
    ):
        if kind not in KINDS:
            raise UserError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        self.name = model if isinstance(model, str) else model.pretrained_cfg.get("architecture", "model")
        self.kind, self.level, self.img_size, self.precision, self.device = kind, level, img_size, precision, device
        self.model_kwargs = model_kwargs
        self._given = not isinstance(model, str)
        self._model = model.to(device).eval() if self._given else None

    def __getstate__(self) -> dict:
        return {**vars(self), "_model": self._model if self._given else None}

    @property
    def model(self) -> nn.Module:
        if self._model is None:
            model = make_model(self.name, **{"pretrained": True, "img_size": self.img_size, **self.model_kwargs})
            self._model = model.to(self.device).eval()
        return self._model

    @property
    def data_config(self) -> dict:
        """The preprocessing, in timm's words."""
        return resolve_input_data_config(self.model, dict(img_size=self.img_size))

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Features in float32, on the CPU, of images [B, C, H, W] that were preprocessed."""
        model, images = self.model, images.to(self.device)
        with computing(self.precision, self.device):
            if self.kind == "pooled":
                found = model.forward_head(model.forward_features(images), pre_logits=True)
            else:
                maps = model.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
                if self.kind == "levels":
                    found = torch.cat([map_.mean(dim=(2, 3)) for map_ in maps], dim=1)
                else:
                    level = len(maps) - 1 if self.level is None else self.level
                    if not 0 <= level < len(maps):
                        raise UserError(f"level must lie between 0 and {len(maps) - 1}, got {level}.")
                    found = maps[level].permute(0, 2, 3, 1)
        return found.float().cpu()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of Ray Data, with "bytes" (encoded images) or "path", and "features" beside them."""
        config = self.data_config
        transform, in_chans = create_transform(**config), config["input_size"][0]
        if "bytes" in batch:
            images = [_Bytes(f"image {i}", "", content) for i, content in enumerate(batch["bytes"])]
        else:
            images = [ImageFile(str(path), str(path)) for path in batch["path"]]
        features = self.features(torch.stack([transform(decode(image, in_chans)) for image in images]))
        return {**{k: v for k, v in batch.items() if k != "bytes"}, "features": features.numpy()}


class _Bytes(NamedTuple):
    """An image that is at hand."""

    name: str
    path: str
    content: bytes

    def open(self) -> BinaryIO:
        return io.BytesIO(self.content)


@dataclass
class Features:
    """Features that were read back.

    Attributes:
        features: [N, ...].
        names: Of the images.
        labels: Of the images: those stored with them, or else the names of their folders.
        metadata: model, preprocessing, kind.
    """

    features: np.ndarray
    names: list[str]
    labels: list[str]
    metadata: dict


def extract(
    extractor: Extractor,
    images: Sequence[Encoded],
    output: Path,
    *,
    labels: Sequence[str] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    dtype: str = "float32",
    shard_size: int = 4096,
    suffix: str = ".safetensors",
    resume: bool = False,
    skip_unreadable: bool = False,
) -> None:
    """Writes the features of images to a file, or to a folder in shards.

    A file (.safetensors, .npz, .parquet) is held in memory until it is whole. A folder takes a shard as soon as it is
    full, each process of several its own, so memory does not grow with the images; what was written is not computed
    again when the same is asked for with `resume`. Every file is whole or absent.

    Args:
        extractor: Gives the features.
        images: The images.
        output: The file or the folder to write.
        labels: A class per image, kept beside the features.
        batch_size: Images per step.
        workers: Processes that load images.
        dtype: Of what is written: float32 or float16.
        shard_size: Images per shard.
        suffix: Of shards.
        resume: Go on with a folder that was begun.
        skip_unreadable: Leave out images that cannot be read, and say so; else the first one is an error.

    Raises:
        UserError: An image cannot be read; with skip_unreadable, none can. The folder holds other features.
    """
    started, one_file = time.perf_counter(), output.suffix in FORMATS
    state = PartialState(cpu=extractor.device == "cpu")
    if one_file and state.num_processes > 1:
        raise UserError(f"Several processes write a folder of shards: give --output a name without {output.suffix}.")
    model, config = extractor.model, extractor.data_config
    metadata = dict(model=extractor.name, preprocessing=json.dumps(config), kind=extractor.kind)
    metadata["level"] = json.dumps(extractor.level)
    share = range(
        len(images) * state.process_index // state.num_processes,
        len(images) * (state.process_index + 1) // state.num_processes,
    )
    shards = [share] if one_file else [share[i : i + shard_size] for i in range(0, len(share), shard_size)]
    paths = (
        [output] if one_file else [output / f"part-{state.process_index:03}-{i:06}{suffix}" for i in range(len(shards))]
    )
    if not one_file:
        identity = dict(
            metadata,
            dtype=dtype,
            shard_size=shard_size,
            suffix=suffix,
            processes=state.num_processes,
            weights=_digest_weights(model),
            images=_digest_names(images),
        )
        _claim(output, identity, resume, state)
    left = [(path, shard) for path, shard in zip(paths, shards, strict=True) if one_file or not path.exists()]
    todo = [i for _, shard in left for i in shard]
    loader = load_images(images, config, batch_size, workers, sampler=todo)
    batches = read_batches(track(loader, "images", state.is_main_process), _skip if skip_unreadable else None)
    rows, written, shape = iter(_rows(extractor, batches)), 0, ()
    held = next(rows, None)
    for path, shard in left:
        kept, found = [], []
        while held is not None and held[0] in shard:
            kept.append(held[0])
            found.append(held[1])
            held = next(rows, None)
        if not kept:
            continue
        features = torch.stack(found).to(PRECISIONS[dtype])
        names = [images[i].name for i in kept]
        with writing(path):
            _write(path, features, names, None if labels is None else [labels[i] for i in kept], metadata)
        written, shape = written + len(kept), tuple(features.shape[1:])
    if not written and todo:
        raise UserError(f"None of the {len(todo)} images can be read.")
    state.wait_for_everyone()
    if not one_file and state.is_main_process:
        names = sorted(path.name for path in output.glob(f"part-*{suffix}"))
        write_atomically(output / "index.json", json.dumps(dict(identity, shards=names), indent=2))
    if state.is_main_process:
        console.print(f"{output}: {[written, *shape]} in {time.perf_counter() - started:.1f} s")


def _rows(extractor: Extractor, batches) -> Iterator[tuple[int, Tensor]]:
    for batch, indices in batches:
        yield from zip(indices.tolist(), extractor.features(batch), strict=True)


def _claim(folder: Path, identity: dict, resume: bool, state: PartialState) -> None:
    """Makes the folder, or checks that what was begun in it is the same."""
    path = folder / "extraction.json"
    begun = path.is_file()
    state.wait_for_everyone()  # all look before one writes
    if begun:
        if not resume:
            raise UserError(f"{folder} holds features already: go on with --resume, or choose another --output.")
        saved = json.loads(path.read_text())
        changed = [name for name in identity if saved.get(name) != identity[name]]
        if changed:
            raise UserError(f"The features in {folder} were begun otherwise; changed: {', '.join(changed)}.")
    elif state.is_main_process:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UserError(f"{folder} is not empty: choose another --output.")
            write_atomically(path, json.dumps(identity, indent=2))
    state.wait_for_everyone()


def _digest_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_names(images: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.name}\n".encode())
    return digest.hexdigest()


def _write(path: Path, features: Tensor, names: list[str], labels: list[str] | None, metadata: dict) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    texts = dict(metadata, files=json.dumps(names), **({} if labels is None else dict(labels=json.dumps(labels))))
    if path.suffix == ".safetensors":
        save_file(dict(features=features.contiguous()), temporary, metadata=texts)
    elif path.suffix == ".npz":
        with open(temporary, "wb") as file:
            np.savez(file, features=features.numpy(), **{key: np.array(value) for key, value in texts.items()})
    else:
        import pyarrow
        import pyarrow.parquet

        flat = pyarrow.array(features.flatten().numpy())
        columns = dict(file=names, **({} if labels is None else dict(label=labels)))
        columns["features"] = pyarrow.FixedSizeListArray.from_arrays(flat, features[0].numel())
        table = pyarrow.table(columns)
        extra = {k: v for k, v in texts.items() if k not in ("files", "labels")} | dict(
            shape=json.dumps(list(features.shape[1:]))
        )
        pyarrow.parquet.write_table(table.replace_schema_metadata(extra), temporary)
    os.replace(temporary, path)


def load_features(path: Path) -> Features:
    """Reads what `extract` wrote, a file or a folder, in the order of the images.

    Raises:
        UserError: It holds no features, or is not finished.
    """
    if path.is_dir():
        if not (path / "index.json").is_file():
            raise UserError(f"{path} holds no finished features: there is no index.json in it.")
        parts = [_read(path / name) for name in json.loads((path / "index.json").read_text())["shards"]]
    else:
        parts = [_read(path)]
    return Features(
        np.concatenate([part.features for part in parts]),
        [name for part in parts for name in part.names],
        [label for part in parts for label in part.labels],
        parts[0].metadata,
    )


def _read(path: Path) -> Features:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                features, texts = file.get_tensor("features"), dict(file.metadata())
        elif path.suffix == ".npz":
            with np.load(path) as file:
                features, texts = file["features"], {k: str(file[k]) for k in file.files if k != "features"}
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            texts = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
            flat = table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            features = flat.reshape(len(table), *json.loads(texts.pop("shape")))
            texts["files"] = json.dumps(table["file"].to_pylist())
            if "label" in table.column_names:
                texts["labels"] = json.dumps(table["label"].to_pylist())
        else:
            raise ValueError(f"the name must end in {', '.join(FORMATS)}")
        names = json.loads(texts.pop("files"))
        labels = json.loads(texts.pop("labels", "null"))
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, TypeError, BadZipFile) as e:
        raise UserError(f"{path} cannot be read as features: {e}.") from None
    labels = [name.rpartition("/")[0].rpartition("/")[2] for name in names] if labels is None else labels
    return Features(features, names, labels, texts)


def _skip(error: UserError) -> None:
    print(f"skipped: {error}", file=sys.stderr)
