"""The modules of a NAT apart: what a hook sees, and the stem and downsampling under torch.func."""

from contextlib import nullcontext
from unittest import mock

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nat_models.networks import parts
from nat_models.networks.blocks import ConvDownsampler, ConvTokenizer, NATBlock
from nat_models.networks.parts import LeanMlp
from tests.conftest import needs_torch


@pytest.mark.parametrize("name", ["", "norm1", "attn", "ls1", "norm2", "mlp", "ls2"])
def test_a_hook_on_a_block_sees_maps(name):
    block, shapes = NATBlock(16, 2, init_values=0.1), []
    block.get_submodule(name).register_forward_hook(lambda m, inputs, out: shapes.extend([inputs[0].shape, out.shape]))
    block(torch.randn(2, 5, 9, 16))
    assert shapes == 2 * [(2, 5, 9, 16)]


def test_a_class_activation_map_of_the_last_block(network):
    # Grad-CAM: channels of Swin's usual target, weighted by their mean gradient.
    model = network("nat_mini").double()
    image, target, seen = torch.randn(2, 3, 96, 128, dtype=torch.float64), model.levels[-1].blocks[-1].norm1, []

    def score():
        return model(image)[:, 7].sum()

    with target.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        (gradient,) = torch.autograd.grad(score(), seen)
    assert gradient.shape == seen[0].shape == (2, 3, 4, 512)
    cam = (gradient.mean((1, 2), keepdim=True) * seen[0]).sum(-1).relu()
    assert cam.shape == (2, 3, 4) and cam.any()

    direction = torch.randn_like(gradient)

    def moved(step):
        with torch.no_grad(), target.register_forward_hook(lambda *args: args[-1] + step * direction):
            return score()

    # A central difference of step h errs by h ** 2, and by the rounding of the score over h.
    difference = (moved(1e-4) - moved(-1e-4)) / 2e-4
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)


MODULES = [(ConvTokenizer(3, 16), (3, 22, 17)), (ConvDownsampler(8), (9, 6, 8))]


@pytest.mark.parametrize(("module", "shape"), MODULES)
def test_gradients_of_each_image_by_vmap_are_those_of_a_loop(module, shape):
    module, images = module.double(), torch.randn(3, *shape, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters, image):
        return functional_call(module, parameters, (image[None],)).square().sin().sum()

    together = vmap(grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        for name, expected in grad(loss)(parameters, image).items():
            torch.testing.assert_close(together[name][i], expected)


@pytest.mark.parametrize(("module", "shape"), MODULES)
def test_vmap_runs_several_weights_at_once(module, shape):
    module, image = module.double(), torch.randn(2, *shape, dtype=torch.float64)
    weights = {name: torch.randn(3, *p.shape, dtype=torch.float64) for name, p in module.named_parameters()}
    together = vmap(lambda weights: functional_call(module, weights, (image,)))(weights)
    for i, actual in enumerate(together):
        expected = functional_call(module, {name: weight[i] for name, weight in weights.items()}, (image,))
        torch.testing.assert_close(actual, expected)


class _Copies(TorchDispatchMode):
    """Shapes of the tensors that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_the_convolutions_hand_out_what_the_norms_read():
    model = timm.create_model("nat_mini", depths=(1, 1, 1, 1)).eval()
    with torch.no_grad(), _Copies() as copies:
        model(torch.randn(2, 3, 224, 224))
    assert copies.shapes == [(2, 224, 224, 3)]  # the image, once
    norm_inputs = []
    for module in (model.patch_embed, *(level.downsample for level in model.levels[1:])):
        module.norm.register_forward_pre_hook(lambda module, inputs: norm_inputs.extend(inputs))
    with torch.no_grad():
        model(torch.randn(2, 3, 224, 224))
    assert [x.is_contiguous() for x in norm_inputs] == 4 * [True]


class _KeepingMlp(LeanMlp):
    """The same operations, and backward computes nothing again."""

    def forward(self, x):
        with mock.patch.object(parts, "recomputing_gelu", lambda *args: nullcontext()):
            return super().forward(x)


def _mlps() -> tuple[LeanMlp, LeanMlp]:
    lean, plain = LeanMlp(8, 24), _KeepingMlp(8, 24)
    plain.load_state_dict(lean.state_dict())
    return lean, plain


def _gradients(mlp: nn.Module, x: torch.Tensor, autocast: bool = False, call=None) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = mlp(x) if call is None else call(mlp, x)
    return torch.autograd.grad(out.float().square().sum(), [x, *mlp.parameters()])


def _kept(mlp: nn.Module, x: torch.Tensor) -> bool:
    """Whether what the MLP's activation gives is in memory after a forward whose graph lives."""
    seen = []
    handle = mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage())))
    out = mlp(x)
    handle.remove()
    assert out.requires_grad
    return not seen[0].expired()


@needs_torch("2.7", "does not tell of hooks on what autograd keeps")
def test_an_mlp_keeps_less_and_its_gradients_are_the_same_bits():
    lean, plain = _mlps()
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    assert _kept(plain, x) and not _kept(lean, x)
    for autocast in (False, True):
        for a, b in zip(_gradients(lean, x, autocast), _gradients(plain, x, autocast), strict=True):
            assert torch.equal(a, b)


def test_an_mlp_is_timms():
    lean, timms = LeanMlp(8, 24), Mlp(8, 24)
    timms.load_state_dict(lean.state_dict())
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    torch.testing.assert_close(_gradients(lean, x), _gradients(timms, x))
    with torch.no_grad():
        torch.testing.assert_close(lean(x), timms(x))


def test_an_mlp_under_checkpointing_keeps_nothing_of_its_own():
    lean, plain = _mlps()
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    recompute = _gradients(lean, x, call=lambda mlp, x: checkpoint(mlp, x, use_reentrant=False))
    for a, b in zip(recompute, _gradients(plain, x), strict=True):
        assert torch.equal(a, b)
    seen = []
    handle = lean.fc1.register_forward_hook(lambda *args: seen.append(StorageWeakRef(args[-1].untyped_storage())))
    out = checkpoint(lean, x, use_reentrant=False)
    handle.remove()
    assert out.requires_grad and seen[0].expired()


@pytest.mark.parametrize("change", ["hook", "dropout", "another activation", "another projection", "frozen"])
def test_an_mlp_of_other_parts_has_their_gradients(change):
    gradients = []
    for mlp in _mlps():
        if change == "hook":
            mlp.act.register_forward_hook(lambda *args: 2 * args[-1])
        elif change == "dropout":
            mlp.drop1.p = 0.5
        elif change == "another activation":
            mlp.act = nn.GELU(approximate="tanh")
        elif change == "another projection":
            mlp.fc2 = nn.Sequential(nn.Linear(24, 24), nn.GELU(), mlp.fc2)
            nn.init.eye_(mlp.fc2[0].weight)
            nn.init.zeros_(mlp.fc2[0].bias)
        else:
            mlp.fc2.requires_grad_(False)
        x = torch.linspace(-2, 2, 240).view(2, 5, 3, 8).requires_grad_()
        torch.manual_seed(1)
        wanted = [x, *(p for p in mlp.parameters() if p.requires_grad)]
        gradients.append(torch.autograd.grad(mlp(x).square().sum(), wanted))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_an_mlp_has_second_derivatives():
    lean = LeanMlp(3, 4).double()
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: lean(x), (x, *lean.parameters()))
