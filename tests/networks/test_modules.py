"""The modules of a NAT apart: what a hook sees, and the stem and downsampling under torch.func."""

import pytest
import timm
import torch
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from nat_models.networks.blocks import ConvDownsampler, ConvTokenizer, NATBlock


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
