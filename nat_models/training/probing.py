"""What features are worth: nearest neighbours, a linear probe, search; beside raw pixels and random weights."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from .decoding import Encoded, ImageFile, decode
from .embeddings import Extractor, Features
from .images import load_images, read_batches
from .models import make_model, resolve_name

KS = (1, 3, 5, 10, 20, 50)
PENALTIES = tuple(10.0**i for i in range(-4, 3))  # scikit-learn's C: the smaller, the simpler
_PIXELS = 32


def split_features(all_: Features, fraction: float = 0.2, seed: int = 0) -> tuple[Features, Features]:
    """Two parts, the second with a fraction of each class."""
    held_out = set()
    for label in sorted(set(all_.labels)):
        members = [i for i, x in enumerate(all_.labels) if x == label]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out |= set(random.Random(f"{seed}/{label}").sample(members, count))
    keep = [i for i in range(len(all_.labels)) if i not in held_out]
    return take(all_, keep), take(all_, sorted(held_out))


def take(features: Features, rows: Sequence[int]) -> Features:
    rows = list(rows)
    return Features(
        features.features[rows],
        [features.names[i] for i in rows],
        [features.labels[i] for i in rows],
        features.metadata,
    )


def _flat(features: Features) -> np.ndarray:
    return features.features.reshape(len(features.names), -1)


def check_pair(train: Features, test: Features) -> None:
    """Whether two sets of features can be held against each other.

    Raises:
        UserError: They are of different models or kinds, or the test has classes that the training lacks.
    """
    for name in ("model", "kind", "preprocessing"):
        a, b = (x.metadata.get(name) for x in (train, test))
        if a != b:
            raise UserError(f"The features are of different {name}: {a} and {b}.")
    if train.features.shape[1:] != test.features.shape[1:]:
        raise UserError(f"The features' shapes differ: {train.features.shape[1:]} and {test.features.shape[1:]}.")
    if strangers := sorted(set(test.labels) - set(train.labels)):
        raise UserError(f"Classes to test that the training features lack: {', '.join(strangers[:10])}.")
    if len(set(train.labels)) < 2:
        raise UserError(f"There must be at least 2 classes, found {sorted(set(train.labels))}.")


def knn(train: Features, test: Features, ks: Sequence[int] = KS) -> dict:
    """k nearest neighbours by cosine, weighted by nearness; k is chosen on a fifth of the training features."""
    from sklearn.neighbors import KNeighborsClassifier

    def score(k: int, fitted: Features, asked: Features):
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights="distance")
        return model.fit(_flat(fitted), fitted.labels).predict(_flat(asked))

    inner, held_out = split_features(train)
    possible = [k for k in ks if 1 <= k <= len(inner.labels)]
    if not possible:
        raise UserError(f"k must lie between 1 and {len(inner.labels)}, got {list(ks)}.")
    best = max(possible, key=lambda k: (_accuracy(score(k, inner, held_out), held_out.labels), -k))
    return dict(method="knn", choice=f"k = {best}", **_figures(score(best, train, test), test.labels))


def probe(train: Features, test: Features, penalties: Sequence[float] = PENALTIES) -> dict:
    """Logistic regression on standardised features; its penalty is chosen on a fifth of the training features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def score(c: float, fitted: Features, asked: Features):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000, tol=1e-3))
        return model.fit(_flat(fitted), fitted.labels).predict(_flat(asked))

    inner, held_out = split_features(train)
    best = max(penalties, key=lambda c: (_accuracy(score(c, inner, held_out), held_out.labels), -c))
    return dict(method="probe", choice=f"C = {best:g}", **_figures(score(best, train, test), test.labels))


def _accuracy(predicted, labels: Sequence[str]) -> float:
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def _figures(predicted, labels: Sequence[str]) -> dict[str, float]:
    from sklearn.metrics import f1_score

    macro = f1_score(labels, predicted, average="macro", zero_division=0)
    return dict(top1=100 * _accuracy(predicted, labels), macro_f1=100 * macro)


def raw_pixels(images: Sequence[Encoded], in_chans: int) -> np.ndarray:
    """The images themselves, 32 x 32, as features."""
    size = (_PIXELS, _PIXELS)
    return np.stack([np.asarray(decode(image, in_chans).resize(size), np.float32).ravel() / 255 for image in images])


def baselines(features: Features, root: Path) -> dict[str, np.ndarray]:
    """Other features of the same images: raw pixels, and those of the same network with random weights.

    Args:
        features: Whose names are relative to `root`, and whose metadata name the network.
        root: The folder that the features were extracted from.

    Raises:
        UserError: An image is not there.
    """
    images = [ImageFile(name, str(root / name)) for name in features.names]
    config = json.loads(features.metadata["preprocessing"])
    torch.manual_seed(0)
    model = make_model(resolve_name(features.metadata["model"]), in_chans=config["input_size"][0])
    kind, level = features.metadata.get("kind", "pooled"), json.loads(features.metadata.get("level", "null"))
    return {
        "raw pixels": raw_pixels(images, config["input_size"][0]),
        "random weights": compute(Extractor(model, kind=kind, level=level), images, config),
    }


def compute(extractor: Extractor, images: Sequence[Encoded], config: dict, batch_size: int = 64) -> np.ndarray:
    """Features of a few images, in memory, with a preprocessing of your own."""
    batches = read_batches(load_images(images, config, batch_size))
    return torch.cat([extractor.features(batch) for batch, _ in batches]).numpy()


def search(features: Features, query: np.ndarray, top: int) -> list[list[tuple[str, str, float]]]:
    """For each query the nearest images by cosine: name, label, similarity."""

    def unit(x: np.ndarray) -> np.ndarray:
        x = x.reshape(len(x), -1).astype(np.float32)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    asked, there = list(query.shape[1:]), list(features.features.shape[1:])
    if asked != there:
        raise UserError(f"The query's features are {asked}, those to search {there}.")
    similarity = unit(query) @ unit(features.features).T
    found = []
    for row in similarity:
        order = np.argsort(-row, kind="stable")[:top]
        found.append([(features.names[i], features.labels[i], float(row[i])) for i in order])
    return found


def draw_components(images: Sequence[Encoded], maps: np.ndarray):
    """Each image beside the first three principal components of its dense features, as red, green and blue.

    One analysis serves all images, so equal colours mean alike features.
    """
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    count, height, width, dim = maps.shape
    components = PCA(3, random_state=0).fit_transform(maps.reshape(-1, dim))
    low, high = np.percentile(components, [1, 99], axis=0)
    colours = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1).reshape(count, height, width, 3)
    figure = Figure(figsize=(5, 2.4 * count), layout="constrained")
    for row, image, colour in zip(figure.subplots(count, 2, squeeze=False), images, colours, strict=True):
        row[0].imshow(decode(image, 3))
        row[0].set_title(image.name, fontsize=7)
        row[1].imshow(colour, interpolation="nearest")
        for axes in row:
            axes.axis("off")
    return figure


def draw_map(features: Features, method: str):
    """The features in the plane, coloured by class."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points, count = features.features.reshape(len(features.names), -1), len(features.names)
    if count < 3:
        raise UserError(f"A map takes at least 3 images, got {count}.")
    if method == "tsne":
        reduce = TSNE(2, init="pca", perplexity=min(30.0, (count - 1) / 3), random_state=0)
    else:
        reduce = PCA(2, random_state=0)
    placed = reduce.fit_transform(points)
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    names = sorted(set(features.labels))
    for i, name in enumerate(names):
        rows = [j for j, label in enumerate(features.labels) if label == name]
        axes.scatter(*placed[rows].T, s=8, color=colormaps["hsv"](i / len(names)), label=name)
    axes.set(xticks=[], yticks=[], title=f"{count:,} images, {method}")
    axes.legend(markerscale=2, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
