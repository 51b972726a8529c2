"""Promises of classification: weights, draws, metrics, several labels."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from nat_models.errors import UserError
from nat_models.training.splits import Part
from nat_models.training.tasks.classification import Classification, ClassificationMetrics, equal_draws
from nat_models.training.weighting import class_weights
from tests.training.conftest import make_settings

PART = Part(["image"] * 6, [0, 0, 0, 1, 1, 2])


def test_balanced_weights_are_inverse_to_the_counts_and_one_on_average():
    weights = class_weights("balanced", Counter(PART.targets), len(PART), ["a", "b", "c"])
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 1.0, 2.0]))
    assert weights[PART.targets].mean() == pytest.approx(1)


def test_weights_by_name_leave_the_others_at_one():
    assert class_weights("c=3, a=0.5", {}, 0, ["a", "b", "c"]).tolist() == [0.5, 1.0, 3.0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cta=2", "Unknown class in class_weights 'cta'"),
        ("a=much", "class_weights must be balanced, or as in cat=2,dog=0.5; got 'a=much'"),
        ("a=-1", "class_weights must be at least 0"),
    ],
)
def test_wrong_weights_are_errors(setting, message):
    with pytest.raises(UserError, match=message):
        class_weights(setting, {}, 0, ["a", "b", "c"])


def test_equal_draws_give_each_class_the_same_share():
    draws = torch.tensor(equal_draws(PART))
    shares = torch.zeros(3).index_add(0, torch.tensor(PART.targets), draws)
    torch.testing.assert_close(shares, torch.ones(3))


def test_equal_draws_of_several_labels_go_by_the_rarest():
    assert equal_draws(Part(["image"] * 3, [(0,), (0, 1), ()])) == [1 / 2, 1, 1 / 3]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_weighted_loss_is_a_mean_over_images(data, tmp_path, smoothing):
    task = Classification(make_settings(data, tmp_path, class_weights="red=3", smoothing=smoothing))
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 2])
    loss = task.losses(lambda images: logits, [torch.zeros(5), target])["cross_entropy"]
    each = F.cross_entropy(logits, target, weight=task.class_weights, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(loss, each.mean())


def test_unweighted_and_equally_weighted_losses_agree(data, tmp_path):
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 2])
    plain, weighted = (
        Classification(make_settings(data, tmp_path, class_weights=setting)).losses(
            lambda images: logits, [torch.zeros(5), target]
        )["cross_entropy"]
        for setting in (None, "red=1")
    )
    torch.testing.assert_close(plain, weighted)


def test_the_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(50, 7)).astype("float32"), rng.integers(0, 7, 50)
    metrics = ClassificationMetrics(7, multi_label=False)
    for part in (slice(0, 30), slice(30, 50)):
        metrics.update(torch.tensor(logits[part]), [None, torch.tensor(target[part])])
    found, predicted = metrics.compute(), logits.argmax(1)
    top5 = np.mean([t in row for t, row in zip(target, np.argsort(-logits)[:, :5], strict=True)])
    average = dict(average="macro", zero_division=0)
    expected = dict(
        val_loss=F.cross_entropy(torch.tensor(logits), torch.tensor(target)).item(),
        top1=100 * np.mean(predicted == target),
        top5=100 * top5,
        macro_precision=100 * precision_score(target, predicted, **average),
        macro_recall=100 * recall_score(target, predicted, **average),
        macro_f1=100 * f1_score(target, predicted, **average),
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert list(found) == list(expected)


def test_top5_is_counted_apart_from_top1_though_they_agree_at_first():
    metrics, target = ClassificationMetrics(7, multi_label=False), torch.tensor([6])
    metrics.update(torch.eye(7)[target], [None, target])
    metrics.update(torch.arange(7.0)[None].flip(1), [None, torch.tensor([2])])
    found = metrics.compute()
    assert (found["top1"], found["top5"]) == (50, 100)


def test_the_metrics_of_several_labels_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(40, 3)).astype("float32"), rng.integers(0, 2, (40, 3))
    metrics = ClassificationMetrics(3, multi_label=True)
    metrics.update(torch.tensor(logits), [None, torch.tensor(target, dtype=torch.float32)])
    found, predicted = metrics.compute(), logits > 0
    assert found["map"] == pytest.approx(100 * average_precision_score(target, logits, average="macro"), rel=1e-5)
    assert found["macro_f1"] == pytest.approx(100 * f1_score(target, predicted, average="macro"), rel=1e-5)
    assert found["micro_f1"] == pytest.approx(100 * f1_score(target, predicted, average="micro"), rel=1e-5)
    assert found["exact"] == pytest.approx(100 * np.mean((predicted == target).all(axis=1)), rel=1e-5)
