"""A block in inference: the numbers of its modules, and the modules themselves where someone could tell."""

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nat_models.networks import blocks
from nat_models.networks.blocks import NATBlock
from nat_models.networks.inference import infer
from nat_models.ops import use_backend
from tests.ops.conftest import ONEDNN_DTYPES, needs_onednn

pytestmark = needs_onednn


@pytest.fixture
def inferred(monkeypatch):
    """The blocks that ran without their modules."""
    seen = []
    monkeypatch.setattr(blocks, "infer", lambda block, x: seen.append(block) or infer(block, x))
    return seen


def _block(**kwargs):
    torch.manual_seed(0)
    block = NATBlock(16, 2, kernel_size=3, drop_path=0.5, proj_drop=0.5, **kwargs).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def _map(dtype=torch.float32, height=5, width=7):
    return torch.randn(2, height, width, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def _by_modules(block, x):
    """With gradients on, so that the modules run."""
    assert torch.is_grad_enabled()
    return block(x).detach()


BLOCKS = {
    "published": {},
    "layer scale": {"init_values": 0.5},
    "no bias": {"qkv_bias": False},
    "dilated": {"dilation": 2},
    "a map that is padded": {"dilation": 3},
}


@ONEDNN_DTYPES
@pytest.mark.parametrize("kind", BLOCKS)
def test_numbers_are_the_modules(kind, dtype, inferred):
    block, x = _block(**BLOCKS[kind]).to(dtype), _map(dtype)
    block.mlp.act = nn.GELU(approximate="tanh" if kind == "dilated" else "none").eval()
    with torch.no_grad():
        got = block(x)
    assert inferred == [block] and got.is_contiguous() and got.dtype == dtype
    # In bfloat16 the modules round to 8 bits what comes before the GELU and the sums.
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2**-6, atol=0.1)
    torch.testing.assert_close(got, _by_modules(block, x), **tolerance)
    exact = _by_modules(copy.deepcopy(block).double(), x.double())
    assert torch.cosine_similarity(got.double().flatten(), exact.flatten(), 0) > (1 - 1e-4)


def test_a_map_in_another_layout(inferred):
    block, x = _block(), _map().permute(0, 2, 1, 3)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), block(x.contiguous()), rtol=0, atol=0)
    assert inferred == 2 * [block]


NAMES = [name for name, _ in NATBlock(16, 2, init_values=1.0).named_modules()][1:]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", NAMES)
def test_a_hook_on_any_module_is_called(name, register, inferred):
    block, seen = _block(init_values=0.5), []
    getattr(block.get_submodule(name), register)(lambda *args: seen.append(name))
    with torch.no_grad():
        block(_map())
    assert (seen, inferred) == ([name], [])


@pytest.mark.parametrize("name", NAMES)
def test_another_module_in_any_place_is_called(name, inferred):
    block, x = _block(init_values=0.5), _map()
    module = block.get_submodule(name)
    original = type(module)
    module.__class__ = type("Doubled", (original,), {"forward": lambda self, x: 2 * original.forward(self, x)})
    with torch.no_grad():
        got = block(x)
    torch.testing.assert_close(got, _by_modules(block, x), rtol=0, atol=0)
    assert inferred == []


@pytest.mark.parametrize("name", ["drop_path1", "drop_path2", "attn.proj_drop", "mlp.drop1", "mlp.drop2"])
def test_a_module_in_training_drops(name, inferred):
    block = _block()
    block.get_submodule(name).train()
    with torch.no_grad():
        assert not torch.equal(block(_map()), block(_map()))
    assert inferred == []


def test_a_block_in_training_runs_its_modules(inferred):
    block = _block().train()
    assert isinstance(block.drop_path1, DropPath)
    with torch.no_grad():
        block(_map())
    assert inferred == []


def test_other_dtypes_autocast_and_counters_run_the_modules(inferred):
    block, x = _block(), _map()
    with torch.no_grad():
        assert copy.deepcopy(block).double()(x.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x).dtype == torch.float32  # the residual sums
        with FlopCounterMode(display=False) as counter:
            block(x)
    tokens, attention = 2 * 5 * 7, 2 * 2 * 9 * 16  # two products over nine keys
    assert counter.get_total_flops() == tokens * (2 * 16 * (3 * 16 + 16 + 2 * 48) + attention)
    assert inferred == []


def test_parameters_of_two_dtypes_are_pytorchs_error(inferred):
    block = _block()
    block.mlp.fc2.bfloat16()
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        block(_map())
    assert inferred == []


def test_the_backend_that_was_asked_for_computes_the_attention(inferred):
    block, x = _block(), _map()
    with torch.no_grad(), use_backend("reference"):
        got = block(x)
    torch.testing.assert_close(got, _by_modules(block, x))
    assert inferred == [block]
