"""na1d: the window rule along one axis on every backend, and errors in terms of a sequence."""

import pytest
import torch

from nat_models.ops import na1d
from nat_models.ops.window import window
from tests.ops.conftest import gradients, relative_error

# B, L, heads, head_dim, kernel_size, dilation: lengths odd and even, the window's, of several tiles, of ragged groups
GRID = [
    (2, 7, 2, 8, 7, 1),
    (1, 8, 1, 20, 7, 1),
    (2, 61, 2, 8, 5, 1),
    (1, 300, 1, 4, 13, 1),
    (2, 30, 2, 8, 3, 4),
    (1, 47, 1, 8, 9, 5),
    (2, 6, 1, 8, 1, 2),
]


def attend(query, key, value, rpb, kernel_size, dilation, scale):
    """Every key of a sequence gathered."""
    keys, offsets = window(query.shape[1], kernel_size, dilation)
    logits = scale * torch.einsum("bind,biknd->bink", query, key[:, keys])
    if rpb is not None:
        logits = logits + rpb[:, offsets].transpose(0, 1)
    return torch.einsum("bink,biknd->bind", logits.softmax(-1), value[:, keys])


def _inputs(batch, length, heads, head_dim, kernel_size):
    query, key, value = torch.randn(3, batch, length, heads, head_dim, dtype=torch.float64).unbind()
    return [x.requires_grad_() for x in (query, key, value, torch.randn(heads, 2 * kernel_size - 1).double())]


@pytest.mark.parametrize("with_rpb", [True, False])
@pytest.mark.parametrize("case", GRID)
def test_every_backend_attends_along_the_sequence(case, with_rpb, backend):
    *shape, kernel_size, dilation = case
    query, key, value, rpb = _inputs(*shape, kernel_size)
    inputs = [query, key, value, *[rpb] * with_rpb]
    rpb = rpb if with_rpb else None
    expected = attend(query, key, value, rpb, kernel_size, dilation, 0.3)
    output = na1d(query, key, value, kernel_size=kernel_size, dilation=dilation, rpb=rpb, scale=0.3)
    assert output.is_contiguous() and output.shape == query.shape
    assert relative_error(output, expected) < 1e-12
    for actual, wanted in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        # With one key the weights are constant, and so is what they depend on.
        assert (actual - wanted).abs().max() < 1e-11 * max(wanted.abs().max().item(), 1)


def test_defaults_and_dropout_are_those_of_na2d():
    query, key, value, rpb = _inputs(1, 12, 2, 16, 3)
    torch.testing.assert_close(na1d(query, key, value, kernel_size=3), attend(query, key, value, None, 3, 1, 0.25))
    dropped = na1d(query, key, value, kernel_size=3, rpb=rpb, dropout_p=1.0)
    assert torch.equal(dropped, torch.zeros_like(dropped))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kernel_size=4), r"odd and at least 1, got kernel_size=\(1, 4\)"),
        (dict(kernel_size=(1, 3)), r"kernel_size of a sequence must be an int, got kernel_size=\(1, 3\)"),
        (dict(dilation=(1, 2)), r"dilation of a sequence must be an int, got dilation=\(1, 2\)"),
        (dict(dilation=5), r"fit in the map, got a map of 1 x 12 .*dilation=\(1, 5\)"),
        (dict(query=torch.zeros(1, 1, 12, 2, 8)), r"query must be \[B, L, num_heads, head_dim\].*\(1, 1, 12, 2, 8\)"),
        (dict(value=None), "value must be a tensor, got None"),
        (dict(key=torch.zeros(1, 12, 2, 4)), "key must match query"),
        (dict(rpb=torch.zeros(2, 1, 5)), r"rpb of a sequence must be \[num_heads, 2\*K-1\], got shape \(2, 1, 5\)"),
        (dict(rpb=torch.zeros(2, 7)), r"rpb must be .* = \(2, 1, 5\)"),
    ],
)
def test_bad_arguments_are_named_with_the_rule(change, message):
    x = torch.zeros(1, 12, 2, 8)
    with pytest.raises(ValueError, match=message):
        na1d(**dict(query=x, key=x, value=x, kernel_size=3) | change)
