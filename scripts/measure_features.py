"""Measures what `nat-models features` costs beside the network, and whether its memory grows with the images.

    python scripts/measure_features.py overhead
    python scripts/measure_features.py memory

overhead: seconds of a bare loop over the same batches and of the extractor into a folder of shards, interleaved;
medians, and their ratio. memory: the greatest resident size of a process that extracts 1,000 and one of 100,000 small
images. Both write below a temporary folder.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from nat_models.training.embeddings import Extractor, extract
from nat_models.training.images import ImageSet, list_images, make_loader, read_batches
from nat_models.training.models import make_model

CHILD = """
import resource, sys
from pathlib import Path
import torch
from nat_models.training.embeddings import Extractor, extract
from nat_models.training.images import list_images
from nat_models.training.models import make_model
torch.set_num_threads(2)
model = make_model("nat_mini", model_kwargs=dict(embed_dim=16, depths=(1,) * 4, num_heads=(1,) * 4, kernel_size=3))
images = list_images(Path(sys.argv[1]))
extract(Extractor(model, img_size=32), images, Path(sys.argv[2]), batch_size=256)
print("MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_images(folder: Path, count: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i // 1000:03}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


def overhead(folder: Path, rounds: int = 5) -> None:
    write_images(folder / "images", 192, 256)
    images, extractor = list_images(folder / "images"), Extractor(make_model("nat_mini"))
    config = extractor.data_config

    @torch.inference_mode()
    def bare() -> None:
        loader = make_loader(ImageSet(images, None, 3, create_transform(**config)), 32)
        model = extractor.model
        torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in read_batches(loader)])

    seconds: dict[str, list[float]] = {"bare loop": [], "extractor": []}
    for i in range(rounds):
        for name in seconds:
            started = time.perf_counter()
            if name == "bare loop":
                bare()
            else:
                extract(extractor, images, folder / f"out{i}", batch_size=32, shard_size=64)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(medians)
    print(f"ratio of medians {medians['extractor'] / medians['bare loop']:.3f}, by round {np.round(ratios, 3)}")


def memory(folder: Path) -> None:
    for count in (1_000, 100_000):
        write_images(folder / str(count), count, 32)
        command = [sys.executable, "-c", CHILD, folder / str(count), folder / f"out{count}"]
        done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        print(f"{count:,} images: {done.stdout.split('MiB')[1].strip()} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "memory"))
    what = parser.parse_args().what
    with tempfile.TemporaryDirectory() as name:
        dict(overhead=overhead, memory=memory)[what](Path(name))
