"""Promises of the losses over pixels."""

import pytest
import torch
import torch.nn.functional as F

from nat_models.training.pixel_losses import LOSSES, pixel_loss

LABELS = torch.tensor([[[0, 1, 255], [2, 2, 255]], [[0, 0, 0], [1, 255, 1]]])  # 9 of 12 pixels are labelled
LOGITS = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(0))


def test_the_papers_mean_is_over_all_pixels_ignored_ones_included():
    whole = F.cross_entropy(LOGITS, LABELS, ignore_index=255, reduction="sum")
    torch.testing.assert_close(pixel_loss("cross_entropy", LOGITS, LABELS), whole / 12)
    torch.testing.assert_close(pixel_loss("cross_entropy", LOGITS, LABELS, "labelled"), whole / 9)


def test_weights_multiply_a_pixels_loss():
    weights = torch.tensor([1.0, 0.0, 3.0, 1.0])
    expected = F.cross_entropy(LOGITS, LABELS, weights, ignore_index=255, reduction="sum") / 12
    torch.testing.assert_close(pixel_loss("cross_entropy", LOGITS, LABELS, weights=weights), expected)


def test_focal_leaves_out_what_is_right_already():
    p = LOGITS.softmax(1).gather(1, LABELS.masked_fill(LABELS == 255, 0)[:, None])[:, 0]
    expected = (-((1 - p) ** 2) * p.log())[LABELS != 255].sum() / 12
    torch.testing.assert_close(pixel_loss("focal", LOGITS, LABELS), expected)


def test_dice_is_one_minus_the_overlap_of_the_classes_that_are_there():
    p, labelled = LOGITS.softmax(1), LABELS != 255
    overlaps = []
    for i in range(3):  # class 3 is nowhere
        true, found = (i == LABELS)[labelled].float(), p[:, i][labelled]
        overlaps.append(2 * (true * found).sum() / (true.sum() + found.sum()))
    torch.testing.assert_close(pixel_loss("dice", LOGITS, LABELS), 1 - torch.stack(overlaps).mean())
    perfect = 50 * F.one_hot(LABELS.masked_fill(LABELS == 255, 3), 4).movedim(-1, 1).float()
    assert pixel_loss("dice", perfect, LABELS) < 1e-6


@pytest.mark.parametrize("kind", LOSSES)
def test_ignored_pixels_have_no_gradient_and_nothing_labelled_no_loss(kind):
    logits = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(pixel_loss(kind, logits, LABELS), logits)
    ignored = (LABELS == 255)[:, None].expand_as(grad)
    assert not grad[ignored].any() and grad[~ignored].any()
    nothing = pixel_loss(kind, logits, torch.full_like(LABELS, 255))
    assert nothing.item() == 0
    nothing.backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_low_precision_is_computed_in_float32(kind):
    assert pixel_loss(kind, LOGITS.bfloat16(), LABELS).dtype == torch.float32
