"""Stochastic depth: the numbers of the modules from the same random numbers, and dropped images computed nowhere, but
where someone would miss them."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nat_models.networks.blocks import NATBlock
from nat_models.networks.parts import LeanMlp

BATCH = 4


@pytest.fixture
def batches(monkeypatch):
    """How many images each MLP was given."""
    seen, forward = [], LeanMlp.forward
    monkeypatch.setattr(LeanMlp, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    return seen


def _block(drop_path=0.5, **kwargs):
    torch.manual_seed(0)
    block = NATBlock(16, 2, kernel_size=3, drop_path=drop_path, **kwargs)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def _map(dtype=torch.float32):
    return torch.randn(BATCH, 5, 7, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def _by_modules(block):
    """The same block, whose modules see all images: they do where one has a hook."""
    block.norm1.register_forward_hook(lambda *args: None)
    return block


def _kept(seed, shape=(BATCH, 1, 1, 1), keep=0.5):
    """How many images the two branches of a block keep that starts at a seed, by timm's DropPath."""
    torch.manual_seed(seed)
    return [int(DropPath(1 - keep)(torch.ones(shape)).count_nonzero()) for _ in range(2)]


def _run(block, x, seed):
    torch.manual_seed(seed)
    out = block(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return out, torch.autograd.grad(out.float(), [x, *block.parameters()], upstream.float())


def test_the_seeds_below_keep_none_some_and_all():
    assert {n for seed in range(40) for n in _kept(seed)} == set(range(BATCH + 1))


BLOCKS = {
    "published": {},
    "layer scale": {"init_values": 0.5},
    "dilated": {"dilation": 2},
    "a map that is padded": {"dilation": 3},
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_numbers_and_gradients_are_the_modules(kind, dtype, batches):
    block, modules = (_block(**BLOCKS[kind]).to(dtype) for _ in range(2))
    x, seeds = _map(dtype), range(40)
    found = [_run(block, x, seed) for seed in seeds]
    # An MLP whose images are all dropped computes them, for the parameters to have gradients.
    assert batches == [_kept(seed)[1] or BATCH for seed in seeds]
    expected = [_run(_by_modules(modules), x, seed) for seed in seeds]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attribute, value", [("scale_by_keep", False), ("drop_prob", 0.0), ("drop_prob", 1.0)])
def test_the_modules_settings_hold(attribute, value, batches):
    block, modules = _block(), _block()
    for drop_path in (block.drop_path1, modules.drop_path1):
        setattr(drop_path, attribute, value)
    found = [_run(block, _map(), seed) for seed in range(20)]
    assert min(batches) < BATCH
    torch.testing.assert_close(found, [_run(_by_modules(modules), _map(), seed) for seed in range(20)])


def test_one_branch_alone_may_drop(batches):
    block, modules = _block(), _block()
    block.drop_path1 = modules.drop_path1 = nn.Identity()
    found = [_run(block, _map(), seed) for seed in range(10)]
    assert min(batches) < BATCH
    torch.testing.assert_close(found, [_run(_by_modules(modules), _map(), seed) for seed in range(10)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["a float32 map", "a bfloat16 map"])
@pytest.mark.parametrize("init_values", [None, 0.5])
def test_under_autocast(init_values, dtype, batches):
    block, modules = _block(init_values=init_values), _by_modules(_block(init_values=init_values))
    for seed in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (_run(x, _map(dtype), seed) for x in (block, modules))
        assert found[0].dtype == expected[0].dtype
        torch.testing.assert_close(found[0], expected[0], rtol=2**-6, atol=0.1)
        for got, reference in zip(found[1], expected[1], strict=True):
            cosine = torch.cosine_similarity(got.flatten().double(), reference.flatten().double(), 0)
            assert got.dtype == reference.dtype and (cosine > 0.999 or not reference.any())
    assert min(batches) < BATCH


def test_images_whose_branches_are_all_dropped_pass_and_their_parameters_have_gradients():
    block, x = _block(), _map()
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1.0
    block(x).sum().backward()
    assert torch.equal(block(x), x)
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(not parameter.grad.any() for parameter in block.parameters())


def test_second_derivatives(batches):
    seconds = []
    for block in (_block().double(), _by_modules(_block().double())):
        x = _map(torch.float64)
        torch.manual_seed(0)
        first = torch.autograd.grad(block(x).pow(2).sum(), [x, *block.parameters()], create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *block.parameters()]))
    assert 0 < batches[0] < BATCH
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_the_same_images(use_reentrant, batches):
    block, x = _block(), _map()
    found = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        block.zero_grad()
        call(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in block.parameters()])
    assert len(set(batches)) == 1 and batches[0] < BATCH
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_network_that_keeps_some_images_is_the_network(batches):
    found = []
    for hook in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("nat_mini", depths=(1, 1, 2, 1), drop_path_rate=0.5, num_classes=7).train()
        for block in (module for module in model.modules() if hook and isinstance(module, NATBlock)):
            _by_modules(block)
        torch.manual_seed(1)
        logits = model(torch.randn(BATCH, 3, 64, 64))
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    assert min(batches[:5]) < BATCH == min(batches[5:])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


NAMES = [name for name, _ in NATBlock(16, 2, init_values=1.0, drop_path=0.5).named_modules()][1:]


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_on_any_module_sees_all_images(name, batches):
    block, seen = _block(init_values=0.5), []
    block.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(len(output)))
    block(_map())
    assert (seen, batches) == ([BATCH], [BATCH])


@pytest.mark.parametrize("name", NAMES)
def test_another_module_in_any_place_sees_all_images(name, batches):
    block, seen = _block(init_values=0.5), []
    module = block.get_submodule(name)
    original = type(module)
    forward = {"forward": lambda self, x: seen.append(len(x)) or original.forward(self, x)}
    module.__class__ = type("Other", (original,), forward)  # it may mix images, as a batch norm does
    block(_map())
    assert seen == [BATCH]


def test_a_counter_counts_all_images(batches):
    with FlopCounterMode(display=False):
        _block()(_map())
    assert batches == [BATCH]


def test_in_evaluation_nothing_is_dropped(batches):
    block, x = _block().eval(), _map()
    assert torch.equal(block(x), block(x))
    assert batches == 2 * [BATCH]


def test_transforms_of_torch_func_see_all_images(batches):
    block, x = _block(), _map().detach()
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda x: block(x), (x,), (x,))
    assert batches == [BATCH] and tangent.any()
