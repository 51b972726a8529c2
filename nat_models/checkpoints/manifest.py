"""The known checkpoints: where they are, in which layout, and what they reach (weights/manifest.json)."""

import fnmatch
import json
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from ..resources import resource

# What timm looks for in a repository, in its order, unless a configuration names a file.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class Weights(NamedTuple):
    """A published checkpoint. revision and sha256 are None until somebody with access to the Hub has recorded them;
    from then on that revision is what is asked for, and a file of another sha256 is refused."""

    name: str  # arch.tag, timm's name
    repo: str | None  # on the Hugging Face Hub; None where it is at `url`
    revision: str | None
    file: str
    sha256: str | None
    layout: str  # one of LAYOUTS
    license: str
    parameters: int
    top1: float | None  # ImageNet-1k, percent, as published; None for another set of classes
    url: str | None = None  # the authors' own address

    @property
    def megabytes(self) -> float:
        """What the tensors take in float32, on a disk or in memory; 10^6 bytes each."""
        return self.parameters * 4 / 1e6

    def cached(self) -> Path | None:
        """The file in the cache on this machine, the Hub's (HF_HOME, HF_HUB_CACHE) or for a url PyTorch's (TORCH_HOME);
        None if it is not there.

        No connection is made.
        """
        if self.repo is None:
            path = Path(torch.hub.get_dir(), "checkpoints", self.file)
            return path if path.is_file() else None
        # A file whose hash is known is asked for by its name; timm looks for safetensors first.
        for file in dict.fromkeys([self.file] if self.sha256 else [*HUB_FILES, self.file]):
            path = try_to_load_from_cache(self.repo, file, revision=self.revision)
            if isinstance(path, str):  # neither None nor the mark that the repository has no such file
                return Path(path)
        return None


def list_weights(pattern: str = "*") -> list[Weights]:
    """The entries of the manifest, in its order.

    Args:
        pattern: Of names, with shell wildcards: "nat_tiny.shi_in1k", an architecture as "nat_tiny", "nat_*".

    Raises:
        UserError: The manifest is missing from the installation.
    """
    manifest = json.loads(resource("weights", "manifest.json").read_text())
    known = [Weights(**entry) for entry in manifest["checkpoints"]]
    return [w for w in known if any(fnmatch.fnmatchcase(n, pattern) for n in (w.name, w.name.partition(".")[0]))]


def published(hub_id: str, filename: str | None) -> Weights | None:
    """The manifest's entry for what a configuration of timm's asks the Hub for.

    Args:
        hub_id: REPO or REPO@REVISION. Another revision than the manifest's is something else than what it knows.
        filename: None for whichever the repository has.
    """
    repo, _, revision = hub_id.partition("@")
    return next(
        (
            weights
            for weights in list_weights()
            if weights.repo == repo and filename in (None, weights.file) and revision in ("", weights.revision)
        ),
        None,
    )
