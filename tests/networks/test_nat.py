"""The networks: the published ones exactly, and timm's contract over all of them."""

import re

import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import create_model, list_models, save_for_hf
from timm.optim import create_optimizer_v2
from torch._inductor.utils import run_and_get_code
from torch.utils.flop_counter import FlopCounterMode

import nat_models  # noqa: F401  registers the models
from nat_models.networks.blocks import NATBlock
from nat_models.networks.nat import NAT
from tests.conftest import FIXTURES, tensor
from tests.networks.zoo import MODELS, assert_golden_logits, golden_cases, published, tiny

GOLDEN = load_file(FIXTURES / "nat_models.safetensors")
# The published table: parameters, GMACs at 224 px.
PUBLISHED = {
    "nat_mini": (19_984_174, "2.7"),
    "nat_tiny": (27_901_582, "4.3"),
    "nat_small": (50_743_297, "7.8"),
    "nat_base": (89_769_652, "13.7"),
}


def _small(**kwargs) -> NAT:
    """The real class at a size that tests can afford."""
    defaults = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), num_classes=10)
    return create_model("nat_mini", **(defaults | kwargs))


def test_the_zoo_is_registered():
    assert set(list_models(module="nat")) == set(PUBLISHED)
    assert set(list_models(module="nat", pretrained=True)) == {f"{name}.shi_in1k" for name in PUBLISHED}


@pytest.mark.parametrize("case", golden_cases(GOLDEN))
def test_logits_of_the_authors_networks(case):
    assert_golden_logits(GOLDEN, case)


def test_features_of_the_authors_network_level_by_level():
    model = published("nat_mini")
    with torch.no_grad():
        features = model.forward_intermediates(
            tensor("image_224x224", (1, 3, 224, 224)), output_fmt="NHWC", intermediates_only=True
        )
    assert len(features) == 4
    for i, feature in enumerate(features):
        golden = {k.split("/")[-1]: v for k, v in GOLDEN.items() if k.startswith(f"nat_mini/224x224/level{i}/")}
        torch.testing.assert_close(feature.mean((0, 1, 2)), golden["channel_mean"], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(feature[0, :3, :3, :16], golden["corner"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_and_cost_are_the_published_ones(name):
    parameters, gmacs = PUBLISHED[name]
    model = create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert f"{counter.get_total_flops() / 2e9:.1f}" == gmacs


@pytest.mark.parametrize("name", PUBLISHED)
def test_fvcore_counts_the_published_cost_too(name):
    flop_count = pytest.importorskip("fvcore.nn", reason="fvcore is not installed").FlopCountAnalysis
    model, image = create_model(name).eval().requires_grad_(False), torch.zeros(1, 3, 224, 224)
    count = flop_count(model, image)
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # Published with one digit. Norms are counted too, and the zero token beside every map in a trace.
    assert count.total() / 1e9 == pytest.approx(float(PUBLISHED[name][1]), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        model(image)
    flops = counter.get_flop_counts()["Global"][torch.ops.nat_models.na2d_qkvpacked_inference]
    assert 2 * count.by_operator()["na2d_qkvpacked"] == flops  # an operation of fvcore is a multiply and an add


@pytest.mark.parametrize("name", MODELS)
def test_backward_reaches_every_parameter(name):
    model = tiny(name, num_classes=42, drop_path_rate=0.0).train()
    logits = model(torch.randn(2, 3, 128, 96))
    assert logits.shape == (2, 42)
    logits.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("name", MODELS)
def test_default_cfg_describes_the_model(name):
    model = tiny(name).eval()
    cfg = model.default_cfg
    state_dict = model.state_dict()
    assert f"{cfg['classifier']}.weight" in state_dict and f"{cfg['first_conv']}.weight" in state_dict
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    x = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, *cfg["pool_size"], model.num_features)
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model(x).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features)
        model.reset_classifier(7, "avg")
        assert model(x).shape == (1, 7) and model.num_classes == 7
    data = resolve_model_data_config(model)
    size, crop_pct = (384, 1.0) if name.endswith("384") else (224, 0.875)
    assert (data["crop_pct"], data["interpolation"], data["input_size"]) == (crop_pct, "bicubic", (3, size, size))
    assert cfg.get("hf_hub_id") or cfg["url"].endswith(".pth")


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="timm 1.0.26 keeps no arguments of a model")
@pytest.mark.parametrize("name", MODELS)
def test_what_timm_saves_it_builds_again(name, tmp_path):
    model = tiny(name, num_classes=3, in_chans=1).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 1, 64, 96)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_forward_intermediates_ends_in_forward_features(name):
    model = tiny(name).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_features(x)
        output, intermediates = model.forward_intermediates(x, norm=True)
        assert torch.equal(output, expected)
        torch.testing.assert_close(intermediates[-1].permute(0, 2, 3, 1), expected)
        early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
        nhwc = model.forward_intermediates(x, indices=2, output_fmt="NHWC", intermediates_only=True)
    assert [f.shape[1] for f in early] == [f["num_chs"] for f in model.feature_info[:2]]
    assert [f.shape[-1] for f in nhwc] == [f["num_chs"] for f in model.feature_info[2:]]


def test_forward_intermediates_refuses_another_format():
    with pytest.raises(ValueError, match="'NCHW' or 'NHWC', got output_fmt='NLC'"):
        _small().forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NLC")


@pytest.mark.parametrize("indices", [1, [0, 2], [3]])
def test_pruned_models_keep_what_was_asked_for(indices):
    model = _small().eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    kept = model.prune_intermediate_layers(indices)
    torch.testing.assert_close(model.forward_intermediates(x, indices=kept, intermediates_only=True), expected)
    assert model(x).shape[-1] == model.num_features
    model.reset_classifier(6, "avg")  # a pruned backbone takes a new head
    assert model(x).shape == (1, 6)


def _levels_run(model: NAT) -> list[int]:
    ran = []
    for i, level in enumerate(model.levels):
        level.register_forward_hook(lambda *args, i=i: ran.append(i))
    return ran


def test_stop_early_leaves_later_levels_out_and_is_off_by_default():
    model = _small().eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_features(x)
    ran = _levels_run(model)
    output, (first,) = model.forward_intermediates(x, indices=[0], output_fmt="NHWC")
    assert ran == [0, 1, 2, 3]
    torch.testing.assert_close(output, expected)
    ran.clear()
    output, (early,) = model.forward_intermediates(x, indices=[0], stop_early=True, output_fmt="NHWC")
    assert ran == [0]
    assert torch.equal(early, first)
    assert torch.equal(output, first)  # no norm: it is as wide as the last level


def test_pruning_keeps_the_norm_with_the_level_it_belongs_to():
    whole, cut, bare = (_small() for _ in range(3))
    assert whole.prune_intermediate_layers() == [3]  # the last one
    assert isinstance(whole.norm, torch.nn.LayerNorm) and len(whole.levels) == 4
    assert cut.prune_intermediate_layers([1]) == [1]
    assert isinstance(cut.norm, torch.nn.Identity) and len(cut.levels) == 2
    assert isinstance(bare.prune_intermediate_layers([3], prune_norm=True), list)
    assert isinstance(bare.norm, torch.nn.Identity)
    x = torch.randn(1, 3, 64, 64)
    assert whole(x).shape == (1, 2, 2, 128) and cut(x).shape == (1, 8, 8, 32)  # maps: the head went, and its pooling
    kept = _small()
    kept.prune_intermediate_layers([3], prune_head=False)
    assert kept(x).shape == (1, 10)


def test_a_new_classifier_sets_pooling_and_width():
    model = _small()
    model.reset_classifier(7, "catavgmax")
    assert (model.num_classes, model.global_pool, model.head_hidden_size) == (7, "catavgmax", 256)
    model.reset_classifier(5)
    assert (model.num_classes, model.global_pool, model.head_hidden_size) == (5, "catavgmax", 256)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("name", ["nat_mini", "nat_small"])  # without and with layer scale
def test_fx_graph_runs_forward_and_backward(name):
    # head.drop is followed by Identity: the graph's output is the logits' input, as in timm's own tests.
    model = create_model(name, num_classes=5, drop_path_rate=0.0)
    graph = timm.models._features_fx.GraphExtractNet(model, ["head.fc"])
    x = torch.randn(2, 3, 64, 64)
    output = graph(x)
    torch.testing.assert_close(output, model(x))
    output.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["nat_mini", "nat_small"])  # without and with layer scale
def test_grad_checkpointing_computes_blocks_again_and_changes_no_gradient(name):
    model = create_model(name, num_classes=5, drop_path_rate=0.0).train()
    ran = []
    model.levels[0].blocks[0].register_forward_pre_hook(lambda *args: ran.append(1))
    x = torch.randn(1, 3, 64, 64)

    def gradients():
        model.zero_grad()
        ran.clear()
        model(x).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = gradients()
    assert len(ran) == 1
    model.set_grad_checkpointing()
    for n, grad in gradients().items():
        torch.testing.assert_close(grad, expected[n], msg=lambda m, n=n: f"{n}: {m}")
    assert len(ran) == 2  # once more for the backward
    model.set_grad_checkpointing(False)
    gradients()
    assert len(ran) == 1


def test_torchscript_trace_agrees():
    model = _small().eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(traced(x), model(x))


def test_torchscript_runs_and_says_why_it_cannot_be_saved(tmp_path):
    model = _small(scriptable=True)
    scripted = torch.jit.script(model.eval())
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(scripted(x), model(x))
    torch.testing.assert_close(torch.jit.freeze(scripted)(x), model(x))
    with pytest.raises(RuntimeError, match="Could not export Python function call"):
        scripted.save(tmp_path / "model.pt")


def test_compiles_as_one_graph():
    model = _small().eval()
    x = torch.randn(2, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (96, 96), (100, 260), (225, 32)])
def test_any_image_size_runs_forward_and_backward(size):
    model = _small()
    logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 10) and torch.isfinite(logits).all()
    logits.sum().backward()


@pytest.mark.parametrize("in_chans", [1, 2, 4])
def test_in_chans(in_chans):
    assert _small(in_chans=in_chans)(torch.randn(1, in_chans, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", "catavgmax"])
def test_global_pool(global_pool):
    model = _small(global_pool=global_pool)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    assert model.head_hidden_size == model.num_features * (2 if global_pool == "catavgmax" else 1)


@pytest.mark.parametrize("rate", ["drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_each_drop_rate_acts_in_training_alone(rate):
    model = _small(**{"drop_path_rate": 0.0, rate: 0.5})
    x = torch.randn(4, 3, 64, 64)
    assert not torch.equal(model(x), model(x))
    model(x).sum().backward()
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_device_are_constructor_arguments(dtype):
    model = _small(dtype=dtype, init_values=1e-5)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(1, 3, 64, 64, dtype=dtype)).dtype == dtype
    model.reset_classifier(3)
    assert model.head.fc.weight.dtype == dtype
    meta = _small(device="meta", init_values=1e-5)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_bfloat16_follows_float32():
    model = published("nat_mini")
    x = tensor("image_96x96", (1, 3, 96, 96))
    with torch.no_grad():
        expected = model(x)[0]
        logits = model.bfloat16()(x.bfloat16())[0].float()
    # 18 blocks of bfloat16 rounding (8 bits): the direction holds to three digits.
    assert torch.nn.functional.cosine_similarity(logits, expected, dim=0) > 0.999


@pytest.mark.parametrize(
    "typo",
    [
        dict(drop_pathrate=0.1),
        dict(window_size=7),
        dict(kernel=5),
        dict(depth=2),
        dict(img_size=224),
        dict(out_indices=(1,)),
    ],
)
def test_misspelt_arguments_are_errors(typo):
    with pytest.raises(TypeError, match=next(iter(typo))):
        create_model("nat_mini", **typo)


def test_arguments_reach_every_block():
    given = dict(kernel_size=(3, 5), mlp_ratio=2, qkv_bias=False, init_values=0.1, proj_drop_rate=0.1)
    blocks = [block for level in _small(**given, attn_drop_rate=0.2).levels for block in level.blocks]
    assert len(blocks) == 5
    for block in blocks:
        assert (block.attn.kernel_size, block.attn.qkv.bias, block.attn.attn_drop) == ((3, 5), None, 0.2)
        assert block.attn.proj_drop.p == block.mlp.drop1.p == 0.1
        assert block.mlp.fc1.out_features == 2 * block.attn.dim
        assert block.ls1.gamma.eq(0.1).all() and block.ls2.gamma.eq(0.1).all()


def test_a_block_alone_has_the_papers_window_and_nothing_dropped():
    block = NATBlock(32, 1)
    assert (block.attn.kernel_size, block.attn.attn_drop, block.attn.proj_drop.p) == ((7, 7), 0.0, 0.0)
    assert block.attn.qkv.bias is not None and block.mlp.fc1.out_features == 3 * 32
    assert isinstance(block.drop_path1, torch.nn.Identity) and isinstance(block.ls1, torch.nn.Identity)


def test_depths_and_heads_must_agree():
    with pytest.raises(ValueError, match=r"depths=\(1, 1\), num_heads=\(1, 2, 4\)"):
        create_model("nat_mini", depths=(1, 1), num_heads=(1, 2, 4))


@pytest.mark.parametrize("features_only", [False, True])
def test_the_only_output_stride_is_the_networks(features_only):
    model = _small(features_only=features_only, output_stride=32)
    assert model.feature_info[-1]["reduction"] == 32
    with pytest.raises(ValueError, match=r"output_stride must be 32, .* got output_stride=16"):
        _small(features_only=features_only, output_stride=16)


def test_init_weights_gives_every_parameter_its_initial_value():
    model = _small(device="meta", init_values=0.1).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name.endswith("gamma"):
            assert parameter.eq(0.1).all()
        elif "norm" in name:
            assert parameter.eq(1.0 if name.endswith("weight") else 0.0).all(), name
        elif name.endswith(("rpb", "qkv.weight", "fc1.weight")):
            assert 0.015 < parameter.std() < 0.025, name  # 0.02, of 169 numbers or more
        elif name.endswith(("qkv.bias", "fc.bias")):
            assert not parameter.any(), name


def test_none_arguments_mean_default():
    # timm's scripts pass None for what the user left out.
    assert create_model("nat_mini", drop_rate=None, global_pool=None).global_pool == "avg"


def test_set_input_size_changes_nothing():
    model = _small().eval()
    x = torch.randn(1, 3, 80, 48)
    expected = model(x)
    model.set_input_size(img_size=(64, 96))
    assert torch.equal(model(x), expected)


def test_no_weight_decay_names_every_rpb():
    model = _small()
    expected = {name for name, _ in model.named_parameters() if "rpb" in name}
    assert model.no_weight_decay() == expected and len(expected) == 5


def test_optimizer_decays_neither_rpb_nor_biases_and_scales_by_depth():
    model = _small(init_values=1e-5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = {name: group_of[id(p)] for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (groups[name]["weight_decay"] > 0) == (parameter.ndim > 1 and "rpb" not in name), name
    ordered = ["patch_embed.proj.0.weight", "levels.0.blocks.0.mlp.fc1.weight", "levels.1.downsample.reduction.weight"]
    ordered += ["levels.2.blocks.0.attn.qkv.weight", "levels.2.blocks.1.attn.qkv.weight", "head.fc.weight"]
    scales = [groups[name]["lr_scale"] for name in ordered]
    assert scales == sorted(scales) and len(set(scales)) >= 5 and scales[-1] == 1.0


@pytest.mark.parametrize("coarse", [True, False])
def test_every_parameter_has_a_group(coarse):
    model = _small()
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
    assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))
    # The stem, then levels or blocks (a downsampling goes with the block behind it), then the head.
    assert len(groups) == 1 + (4 if coarse else 5) + 1


def test_the_last_norm_goes_with_the_last_block_and_groups_are_blocks_by_default():
    model = _small()
    matcher = model.group_matcher()
    assert matcher == model.group_matcher(coarse=False) != model.group_matcher(coarse=True)
    layer_of = timm.models.group_parameters(model, matcher, reverse=True)
    assert layer_of["norm.weight"] == layer_of["norm.bias"] == layer_of["levels.3.blocks.0.mlp.fc2.weight"]
    assert layer_of["patch_embed.norm.weight"] == layer_of["patch_embed.proj.0.weight"] == 0
    assert layer_of["head.fc.weight"] == 1 + max(i for name, i in layer_of.items() if not name.startswith("head"))


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_compiled_every_map_keeps_its_channels_together(train):
    model = create_model("nat_mini", depths=(2, 2, 2, 2)).train(train)
    compiled = torch.compile(model, fullgraph=True)
    with torch.set_grad_enabled(train), torch._inductor.config.patch(force_disable_caches=True):
        _, (code, *_) = run_and_get_code(compiled, torch.randn(2, 3, 224, 224))
    buffers = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\), \(([\d, ]+)\)", code)
    assert ("2, 224, 224, 3", "150528, 672, 3, 1") in buffers  # the image, for the first convolution
    maps = [(size, stride) for size, stride in buffers if int(size.split(", ")[-1]) >= 64]
    assert len(maps) > 4
    assert [(size, stride) for size, stride in maps if stride.split(", ")[-1] != "1"] == []
