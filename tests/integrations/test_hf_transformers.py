"""Promises of NAT and DiNAT in transformers, beside its own heads and trainers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import create_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from nat_models.checkpoints import convert_state_dict  # noqa: E402
from nat_models.errors import UserError  # noqa: E402
from nat_models.integrations import hf_transformers as hf  # noqa: E402
from tests.conftest import FIXTURES, original_state_dict, tensor  # noqa: E402

GOLDEN = {**load_file(FIXTURES / "nat_models.safetensors"), **load_file(FIXTURES / "dinat_models.safetensors")}
SMALL = dict(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8])
DILATIONS = [[1], [2], [1, 2], [1]]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
TYPES = {
    "nat": (hf.NatConfig, hf.NatForImageClassification, hf.NatModel, hf.NatBackbone),
    "dinat": (hf.DinatConfig, hf.DinatForImageClassification, hf.DinatModel, hf.DinatBackbone),
}


def _config(model_type: str, **kwargs):
    dilations = dict(dilations=DILATIONS) if model_type == "dinat" else {}
    return TYPES[model_type][0](**SMALL, **dilations, **kwargs)


def _random(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def _ours(folder, **kwargs) -> torch.nn.Module:
    overlay = dict(file=str(folder / "model.safetensors"))
    given = dict(SMALL, dilations=DILATIONS, pretrained=True, pretrained_cfg_overlay=overlay)
    return create_model("dinat_mini", **(given | kwargs)).eval()


def _loaded_whole(info: dict) -> bool:
    return not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def _same(model, other) -> bool:
    first, second = model.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def published(tmp_path):
    """Makes a folder as the Hub's repositories are, filled with the fixtures' weights."""

    def make(variant: str, **config):
        model_type = "dinat" if variant.startswith("dinat") else "nat"
        state_dict = convert_state_dict(original_state_dict(variant), "transformers", model_type=model_type)
        save_file(state_dict, tmp_path / "model.safetensors", metadata={"format": "pt"})
        labels = {i: f"class {i}" for i in range(1000)}
        about = dict(architectures=[TYPES[model_type][1].__name__], model_type=model_type, id2label=labels, **config)
        (tmp_path / "config.json").write_text(json.dumps(about))
        return tmp_path, state_dict

    return make


LARGE_DATA = dict(embed_dim=96, depths=[3, 4, 18, 5], num_heads=[3, 6, 12, 24], mlp_ratio=2.0)


@pytest.mark.parametrize(
    "variant, config",
    [
        ("nat_mini", {}),
        ("dinat_mini", {}),
        ("nat_small", dict(LARGE_DATA, layer_scale_init_value=1e-5)),
    ],
)
def test_published_files_load_whole_give_the_golden_logits_and_are_saved_bitwise(variant, config, published, tmp_path):
    folder, state_dict = published(variant, **config)
    model, info = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert _loaded_whole(info)
    for case, golden in GOLDEN.items():
        if case.startswith(f"{variant}/") and case.endswith("/logits"):
            height, width = map(int, case.split("/")[1].split("x"))
            with torch.no_grad():
                logits = model(tensor(f"image_{height}x{width}", (1, 3, height, width))).logits[0]
            torch.testing.assert_close(logits, golden, rtol=0, atol=2e-5, msg=lambda m, case=case: f"{case}: {m}")
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == state_dict.keys() and all(torch.equal(saved[key], state_dict[key]) for key in saved)
    about = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (about["model_type"], about["architectures"]) == (variant.split("_")[0], [type(model).__name__])
    assert about["id2label"]["7"] == "class 7"


@pytest.mark.parametrize("model_type", TYPES)
def test_auto_classes_make_ours(model_type):
    config = _config(model_type)
    _, classifier, model, backbone = TYPES[model_type]
    assert type(transformers.AutoModelForImageClassification.from_config(config)) is classifier
    assert type(transformers.AutoModel.from_config(config)) is model
    assert type(transformers.AutoBackbone.from_config(config)) is backbone
    assert type(transformers.AutoConfig.for_model(model_type)) is TYPES[model_type][0]


@pytest.mark.parametrize("model_type", TYPES)
def test_each_class_is_saved_and_read_back_bitwise(model_type, tmp_path):
    _, *classes = TYPES[model_type]
    for cls in classes:
        model = _random(cls(_config(model_type, out_features=["stem", "stage2", "stage4"], layer_scale_init_value=0.1)))
        model.save_pretrained(tmp_path / cls.__name__)
        back, info = cls.from_pretrained(tmp_path / cls.__name__, output_loading_info=True)
        assert _loaded_whole(info) and _same(model, back), cls.__name__


def test_a_model_without_a_head_loads_from_a_file_with_one_and_the_other_way_round(tmp_path):
    whole = _random(hf.DinatForImageClassification(_config("dinat")))
    whole.save_pretrained(tmp_path / "whole")
    bare, info = hf.DinatModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and _same(bare, whole.dinat)
    bare.save_pretrained(tmp_path / "bare")
    assert all(not key.startswith("dinat.") for key in load_file(tmp_path / "bare" / "model.safetensors"))
    again, info = hf.DinatForImageClassification.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and _same(again.dinat, whole.dinat)


def test_new_parameters_are_initialised_as_the_configuration_says():
    model = hf.NatForImageClassification(_config("nat", layer_scale_init_value=0.25))
    block = model.nat.network.levels[0].blocks[0]
    assert block.ls1.gamma.eq(0.25).all() and block.norm1.weight.eq(1).all() and not block.norm1.bias.any()
    for weight in (block.attn.rpb, block.attn.qkv.weight, model.classifier.weight):
        assert 0.01 < weight.std() < 0.03
    assert not block.attn.qkv.bias.any()


def test_hidden_states_and_attentions_are_those_of_transformers_4():
    """Before each level's blocks and after the last, NHWC and NCHW; attentions of each level's last block."""
    model = _random(hf.DinatModel(_config("dinat")))
    x = torch.randn(2, 3, 64, 96)
    output = model(x, output_hidden_states=True, output_attentions=True)
    shapes = [(2, 16, 24, 16), (2, 8, 12, 32), (2, 4, 6, 64), (2, 2, 3, 128), (2, 2, 3, 128)]
    assert [tuple(h.shape) for h in output.hidden_states] == shapes
    for hidden, reshaped in zip(output.hidden_states, output.reshaped_hidden_states, strict=True):
        assert torch.equal(hidden.permute(0, 3, 1, 2), reshaped)
    assert [a.shape for a in output.attentions] == [
        (2, heads, h, w, 49) for heads, (_, h, w, _) in zip(SMALL["num_heads"], shapes, strict=False)
    ]
    assert all(torch.allclose(a.sum(-1), torch.ones(())) for a in output.attentions)
    plain = model(x)
    assert plain.hidden_states is plain.attentions is None
    torch.testing.assert_close(plain.last_hidden_state, output.last_hidden_state)
    torch.testing.assert_close(plain.pooler_output, plain.last_hidden_state.mean((1, 2)))
    as_tuple = model(x, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.last_hidden_state)


@pytest.mark.parametrize("out_features", [STAGES, ["stage2", "stage4"], ["stem", "stage1"]])
def test_a_backbones_maps_are_the_features_of_ours(out_features, tmp_path):
    model = _random(hf.DinatBackbone(_config("dinat", out_features=out_features)))
    assert model.channels == [dict(zip(["stem", *STAGES], (16, 16, 32, 64, 128), strict=True))[f] for f in out_features]
    x = torch.randn(1, 3, 64, 96)
    output = model(x, output_hidden_states=True)
    assert [f.shape[1] for f in output.feature_maps] == model.channels and len(output.hidden_states) == 5
    if out_features == STAGES:
        model.save_pretrained(tmp_path)
        ours = _ours(tmp_path, features_only=True, output_norms=True)
        for theirs, mine in zip(output.feature_maps, ours(x), strict=True):
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)


_HEADS = dict(hidden_dim=64, dim_feedforward=64, encoder_feedforward_dim=64, encoder_layers=1, num_attention_heads=4)


def _oneformer(backbone):
    return transformers.OneFormerForUniversalSegmentation(
        transformers.OneFormerConfig(
            backbone_config=backbone,
            **_HEADS,
            num_queries=10,
            conv_dim=64,
            mask_dim=64,
            decoder_layers=3,
            is_training=True,
            text_encoder_width=64,
            text_encoder_context_length=16,
            text_encoder_num_layers=1,
            text_encoder_vocab_size=50,
            text_encoder_n_ctx=4,
            task_seq_len=16,
            num_labels=5,
        )
    )


def _mask2former(backbone):
    sizes = dict(feature_size=64, mask_feature_size=64, decoder_layers=2, num_queries=10, num_labels=5)
    return transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(backbone_config=backbone, **_HEADS, **sizes)
    )


def _upernet(backbone):
    sizes = dict(hidden_size=32, auxiliary_channels=16, auxiliary_in_channels=64, num_labels=5)
    return transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=backbone, **sizes))


def _targets(model, size: int = 64) -> dict:
    if isinstance(model, transformers.UperNetForSemanticSegmentation):
        return dict(labels=torch.randint(0, 5, (2, size, size)))
    masks = torch.zeros(2, size, size)
    masks[0, : size // 2], masks[1, size // 2 :] = 1, 1
    given = dict(mask_labels=[masks] * 2, class_labels=[torch.tensor([0, 1])] * 2)
    if isinstance(model, transformers.OneFormerForUniversalSegmentation):
        config = model.config
        texts = config.num_queries - config.text_encoder_n_ctx
        tokens = (2, texts, config.text_encoder_context_length)
        given |= dict(
            task_inputs=torch.randint(0, 49, (2, config.task_seq_len)), text_inputs=torch.randint(0, 49, tokens)
        )
    return given


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize(
    "make, place",
    [
        (_oneformer, "model.pixel_level_module.encoder"),
        (_mask2former, "model.pixel_level_module.encoder"),
        (_upernet, "backbone"),
    ],
)
def test_segmentation_models_load_whole_train_and_give_our_maps(make, place, model_type, tmp_path):
    model = _random(make(_config(model_type, out_features=STAGES)))
    model.save_pretrained(tmp_path)
    keys = [key for key in load_file(tmp_path / "model.safetensors") if key.startswith(f"{place}.")]
    assert f"{place}.encoder.levels.2.layers.1.attention.self.key.weight" in keys
    assert f"{place}.hidden_states_norms.stage3.bias" in keys and not any("network" in key for key in keys)
    back, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert _loaded_whole(info) and _same(model, back)

    dilations = DILATIONS if model_type == "dinat" else (1, 1, 1, 1)
    ours = _ours(tmp_path, features_only=True, output_norms=True, dilations=dilations)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = back.eval().get_submodule(place)(x).feature_maps
        for theirs, mine in zip(maps, ours(x), strict=True):
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)
    back.train()
    loss = back(pixel_values=x, **_targets(back)).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert back.get_submodule(place).network.levels[3].blocks[0].attn.rpb.grad.abs().sum() > 0


def test_gradient_checkpointing_computes_blocks_again_and_changes_no_gradient():
    model = _random(hf.NatForImageClassification(_config("nat", drop_path_rate=0.0))).train()
    ran = []
    model.nat.network.levels[0].blocks[0].register_forward_pre_hook(lambda *args: ran.append(1))
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])

    def gradients():
        model.zero_grad()
        ran.clear()
        model(x, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    assert len(ran) == 1
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected)
    assert len(ran) == 2
    model.gradient_checkpointing_disable()
    gradients()
    assert len(ran) == 1


@pytest.mark.parametrize("other", [dict(patch_size=8), dict(hidden_act="relu"), dict(layer_norm_eps=1e-6)])
def test_a_configuration_that_the_networks_do_not_have_is_an_error(other):
    with pytest.raises(UserError, match=f"got {other}".replace("{", r"\{")):
        hf.NatModel(_config("nat", **other))


def test_no_pixels_are_an_error():
    with pytest.raises(ValueError, match="specify pixel_values"):
        hf.NatForImageClassification(_config("nat"))()


def test_the_pipeline_names_the_class_of_an_image(tmp_path):
    from PIL import Image

    labels = {0: "cat", 1: "dog", 2: "bird"}
    model = _random(hf.NatForImageClassification(_config("nat", id2label=labels)))
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size=dict(height=64, width=64)).save_pretrained(tmp_path)
    classify = transformers.pipeline("image-classification", model=str(tmp_path))
    best = classify(Image.new("RGB", (80, 60), "red"))[0]
    assert best["label"] == "dog" and best["score"] > 0.99


def test_the_trainer_fits_a_model_and_writes_a_checkpoint_that_loads(tmp_path):
    torch.manual_seed(0)
    model = hf.DinatForImageClassification(_config("dinat", num_labels=2, drop_path_rate=0.0))
    images = torch.stack([torch.full((3, 32, 32), value) for value in (-1.0, 1.0)] * 4)
    examples = [dict(pixel_values=image, labels=i % 2) for i, image in enumerate(images)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=8, learning_rate=3e-3, use_cpu=True, report_to=[]
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples)
    before = trainer.evaluate(examples)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(examples)["eval_loss"] < before / 2
    trainer.save_model(tmp_path / "best")
    assert _same(hf.DinatForImageClassification.from_pretrained(tmp_path / "best"), model.to("cpu"))


def test_the_package_alone_imports_no_transformers():
    code = "import sys, nat_models, nat_models.cli; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FIXTURES.parents[1])
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow  # a network of 200 M parameters, twice
@pytest.mark.parametrize("kind", ["oneformer", "mask2former"])
def test_a_full_size_model_with_dinat_large_loads_whole(kind, tmp_path):
    """Of the size of shi-labs' oneformer_*_dinat_large; its backbone's names are those of the published network."""
    dilations = [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2, 1, 2, 1]]
    data = dict(embed_dim=192, depths=[3, 4, 18, 5], num_heads=[6, 12, 24, 48], mlp_ratio=2.0, kernel_size=11)
    backbone = hf.DinatConfig(**data, dilations=dilations, out_features=STAGES)
    if kind == "oneformer":
        config = transformers.OneFormerConfig(backbone_config=backbone, is_training=True, num_labels=150)
        model = transformers.OneFormerForUniversalSegmentation(config)
    else:
        config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=150)
        model = transformers.Mask2FormerForUniversalSegmentation(config)
    place = "model.pixel_level_module.encoder."
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    original = json.loads((FIXTURES / "original_keys.json").read_text())["dinat_large"]
    shapes = {k: torch.empty(s, device="meta") for k, s in original.items() if not k.startswith(("norm.", "head."))}
    shapes |= {
        f"norm{i}.{part}": torch.empty(192 * 2**i, device="meta") for i in range(4) for part in ("weight", "bias")
    }
    expected = {place + k: v.shape for k, v in convert_state_dict(shapes, "transformers").items()}
    for key in expected:
        if key.endswith(".rpb"):
            expected[key] = torch.Size([expected[key][0], 21, 21])
    assert {k: v.shape for k, v in saved.items() if k.startswith(place)} == expected
    del model, saved
    cls = transformers.AutoModelForUniversalSegmentation
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert _loaded_whole(info)
    x = torch.randn(2, 3, 96, 96)
    overlay = dict(file=str(tmp_path / "model.safetensors"))
    arguments = dict(features_only=True, output_norms=True, kernel_size=11, dilations=dilations)
    ours = create_model("dinat_large", pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    with torch.no_grad():
        maps = model.eval().get_submodule(place.rstrip("."))(x).feature_maps
        for theirs, mine in zip(maps, ours(x), strict=True):
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)
        model.train()
        assert torch.isfinite(model(pixel_values=x, **_targets(model, 96)).loss).all()
