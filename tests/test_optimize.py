"""Promises of optimize: the same function, faster, and nothing else changed."""

import copy

import pytest
import timm
import torch

import nat_models
from nat_models.errors import UserError

TINY = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3, num_classes=5)


@pytest.fixture
def compiling(monkeypatch):
    """Compiles without a compiler: calls the network as it is, and says whether freezing was on."""
    calls = []

    def compile(module, **kwargs):
        assert kwargs == dict(fullgraph=True)

        def run(image):
            calls.append(torch._inductor.config.freezing)
            return module(image)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    return calls


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_an_optimised_network_is_the_network(dtype, network, compiling):
    model, image = network("nat_small", **TINY).train(), torch.randn(2, 3, 64, 96)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimized = nat_models.optimize(model, image, dtype=dtype)
    assert model.training, "the model it was given was put into evaluation"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected, actual = model.eval()(image), optimized(image)
    assert (actual.dtype, actual.requires_grad) == (torch.float32, False)
    if dtype == torch.bfloat16:
        assert torch.nn.functional.cosine_similarity(actual, expected).min() > 0.999
    assert (actual - expected).abs().max() <= (5e-2 if dtype == torch.bfloat16 else 1e-5) * expected.abs().max()


def test_freezing_is_on_while_a_new_shape_compiles_and_never_outside(network, compiling):
    optimized = nat_models.optimize(network("nat_mini", **TINY), torch.randn(1, 3, 64, 64))
    assert compiling == [True, False]
    for batch in (3, 3, 1):
        optimized(torch.randn(batch, 3, 64, 64))
    assert compiling == [True, False, True, False, False]
    assert torch._inductor.config.freezing is False


def test_it_says_what_was_done(network, compiling):
    optimized = nat_models.optimize(network("nat_mini", **TINY), torch.randn(1, 3, 64, 64), dtype=torch.bfloat16)
    assert optimized.report.startswith("4 blocks fused, weights frozen, compiled for [1, 3, 64, 64] in bfloat16, ")


def test_a_network_without_nat_blocks_is_frozen_and_compiled(compiling):
    model = timm.create_model("resnet10t", num_classes=3).eval()
    image = torch.randn(1, 3, 64, 64)
    optimized = nat_models.optimize(model, image)
    torch.testing.assert_close(optimized(image), model(image).detach())
    assert optimized.report.startswith("0 blocks fused")


def test_maps_of_a_backbone_come_as_they_are(network, compiling):
    options = {key: value for key, value in TINY.items() if key != "num_classes"}
    backbone = network("nat_mini", **options, features_only=True)
    image = torch.randn(1, 3, 64, 64)
    for actual, expected in zip(nat_models.optimize(backbone, image)(image), backbone(image), strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-5)


def test_what_is_for_training_is_refused(network, compiling):
    image = torch.randn(1, 3, 64, 64)
    optimized = nat_models.optimize(network("nat_mini", **TINY), image)
    assert optimized.eval() is optimized
    assert (list(optimized.parameters()), optimized.training) == ([], False)
    with pytest.raises(ValueError, match="for inference alone: train the model it was made of"):
        optimized.train()
    with pytest.raises(ValueError, match=r"image\.requires_grad must be False"):
        optimized(image.requires_grad_())
    with pytest.raises(ValueError, match="stays on its device and in its dtype"):
        optimized.bfloat16()


@pytest.mark.parametrize(
    ("example", "dtype", "message"),
    [
        (torch.randn(3, 64, 64), None, r"example must be a float32 tensor \[B, C, H, W\], got torch.float32 \[3, 64,"),
        (torch.randn(1, 3, 64, 64, dtype=torch.float64), None, "got torch.float64"),
        ([1], None, "got list"),
        (torch.randn(1, 3, 64, 64), torch.float16, "or torch.bfloat16, got torch.float16"),
    ],
)
def test_a_wrong_example_or_dtype_is_named(example, dtype, message, network):
    with pytest.raises(ValueError, match=message):
        nat_models.optimize(network("nat_mini", **TINY), example, dtype=dtype)


def test_without_a_compiler_the_error_says_how_to_get_one(network, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def fail():
        raise exc.InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fail)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler, and PyTorch found none: install one"):
        nat_models.optimize(network("nat_mini", **TINY), torch.randn(1, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_network_at_every_batch(dtype, network):
    model = network("nat_small", **TINY)
    settings = copy.deepcopy(torch._inductor.config.freezing)
    optimized = nat_models.optimize(model, torch.randn(2, 3, 64, 96), dtype=dtype)
    assert torch._inductor.config.freezing == settings
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    for batch in (2, 5, 1, 7):
        image = torch.randn(batch, 3, 64, 96)
        with torch.no_grad():
            expected = model(image)
        assert (optimized(image) - expected).abs().max() <= tolerance * expected.abs().max()
    with torch._dynamo.config.patch(error_on_recompile=True):
        optimized(torch.randn(6, 3, 64, 96))
