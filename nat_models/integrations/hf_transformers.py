"""NAT and DiNAT in transformers: importing this module registers them with its Auto classes.

    import nat_models.integrations.hf_transformers
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained("shi-labs/nat-tiny-in1k-224")

transformers dropped NAT in version 5, and its DiNAT needs a NATTEN before 0.20; here both run on this package's network
and operator, without NATTEN. The networks are those of networks/nat.py. Files keep the names that the Hub's have:
transformers' own key conversions translate them when it loads and saves (checkpoints/layouts.py has the table).

Source: the configurations, classes and outputs of transformers 4.57 for these two model types.
"""

import torch
from timm.layers import LayerScale
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    DinatConfig,
    PreTrainedModel,
    ViTImageProcessor,
    initialization,
)
from transformers.backbone_utils import BackboneMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_outputs import BackboneOutput
from transformers.models.swin.modeling_swin import SwinImageClassifierOutput, SwinModelOutput
from transformers.utils.generic import can_return_tuple

from ..checkpoints.layouts import BLOCK_NAMES, QKV_NAMES, STEM_AND_HEAD_NAMES
from ..checkpoints.saving import network_arguments
from ..layers import NeighborhoodAttention2d
from ..networks.nat import NAT

__all__ = [
    "DinatBackbone",
    "DinatConfig",
    "DinatForImageClassification",
    "DinatModel",
    "NatBackbone",
    "NatConfig",
    "NatForImageClassification",
    "NatModel",
]

_MOST_LEVELS = 8  # that a file's names are translated for; the published networks have four


class NatConfig(DinatConfig):
    """The configuration of a NAT, with the fields and defaults of DinatConfig but for dilations, all 1."""

    model_type = "nat"

    def __post_init__(self, **kwargs) -> None:
        self.dilations = [[1] * depth for depth in self.depths]
        super().__post_init__(**kwargs)


class Unbind(ConversionOps):
    """The two layer scales of a block, [2, dim] in a file, are two parameters here."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs) -> dict[str, Tensor]:
        ((value,),) = (x if isinstance(x, list) else [x] for x in input_dict.values())
        return dict(zip(target_patterns, (row.clone() for row in value.unbind()), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return Stack()


class Stack(ConversionOps):
    """The reverse of Unbind."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs) -> dict[str, Tensor]:
        found = [input_dict[name] for name in source_patterns]
        return {target_patterns[0]: torch.stack([x[0] if isinstance(x, list) else x for x in found])}

    @property
    def reverse_op(self) -> ConversionOps:
        return Unbind()


def _conversions() -> list[WeightRenaming | WeightConverter]:
    """From the names in files to those of the modules below, in the order in which they apply."""
    levels = range(_MOST_LEVELS)
    names = {"encoder.levels": "network.levels", "layers": "blocks"}
    # From the last level on: no name is then translated twice, neither so nor in the reverse order, to save.
    names |= {f"network.levels.{i}.downsample": f"network.levels.{i + 1}.downsample" for i in reversed(levels)}
    names |= {f"hidden_states_norms.stage{i + 1}": f"network.output_norms.{i}" for i in levels}
    names |= {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
    names |= {theirs: f"network.{ours}" for ours, theirs in STEM_AND_HEAD_NAMES.items() if ours != "head"}
    qkv = [f"attention.self.{name}" for name in QKV_NAMES]
    return [
        *(WeightRenaming(theirs, ours) for theirs, ours in names.items()),
        WeightConverter(qkv, "attn.qkv", [Concatenate(0)]),
        WeightConverter("layer_scale_parameters", ["ls1.gamma", "ls2.gamma"], [Unbind()]),
    ]


def _network(config: DinatConfig, **kwargs) -> NAT:
    return NAT(num_classes=0, **network_arguments(config.to_dict()), **kwargs)


class NatPreTrainedModel(PreTrainedModel):
    """What all models of both types have in common."""

    config_class = NatConfig
    base_model_prefix = "nat"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("NATBlock", "ConvTokenizer", "ConvDownsampler")

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            initialization.constant_(module.gamma, self.config.layer_scale_init_value)
        elif isinstance(module, NeighborhoodAttention2d):
            initialization.trunc_normal_(module.rpb, std=0.02)


class _WithNetwork(NatPreTrainedModel):
    """What models that hold the network itself have in common."""

    network: NAT

    def get_input_embeddings(self) -> nn.Module:
        return self.network.patch_embed

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers sets this on every module that has it."""
        return self.network.levels[0].grad_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.network.set_grad_checkpointing(enable)

    def _run(
        self, pixel_values: Tensor | None, output_attentions: bool | None
    ) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...] | None]:
        """What goes into each level's blocks and what comes out, [B, H, W, C], and attentions if asked for."""
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values, [B, num_channels, H, W].")
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        inputs, outputs, attentions = [], [], []
        x = self.network.patch_embed(pixel_values)
        for level in self.network.levels:
            inputs.append(level.downsample(x))
            if wanted:
                x, weights = level.run_blocks_with_attention(inputs[-1])
                attentions.append(weights.permute(0, 3, 1, 2, 4))
            else:
                x = level.run_blocks(inputs[-1])
            outputs.append(x)
        return inputs, outputs, tuple(attentions) if wanted else None

    def _wants_hidden_states(self, output_hidden_states: bool | None) -> bool:
        return self.config.output_hidden_states if output_hidden_states is None else output_hidden_states


def _nchw(maps: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    return None if maps is None else tuple(x.permute(0, 3, 1, 2) for x in maps)


class NatModel(_WithNetwork):
    """The network without a head.

    Args:
        config: A NatConfig.
        add_pooling_layer: Whether pooler_output is the mean over positions, or None.
    """

    def __init__(self, config: DinatConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.network = _network(config)
        self.num_features = self.network.num_features
        self.add_pooling_layer = add_pooling_layer
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SwinModelOutput:
        """[B, num_channels, H, W], H and W from 32 px, to the last map [B, H/32, W/32, C], normalised.

        hidden_states are what goes into the levels' blocks and the last level's output, [B, H, W, C];
        reshaped_hidden_states the same, NCHW; attentions those of each level's last block, [B, num_heads, H, W, K * K].

        Raises:
            ValueError: There are no pixel_values.
        """
        inputs, outputs, attentions = self._run(pixel_values, output_attentions)
        last = self.network.norm(outputs[-1])
        hidden_states = (*inputs, outputs[-1]) if self._wants_hidden_states(output_hidden_states) else None
        return SwinModelOutput(
            last_hidden_state=last,
            pooler_output=last.mean((1, 2)) if self.add_pooling_layer else None,
            hidden_states=hidden_states,
            attentions=attentions,
            reshaped_hidden_states=_nchw(hidden_states),
        )


class NatForImageClassification(NatPreTrainedModel):
    """The network with a linear classifier on its pooled features."""

    _model: type[NatModel] = NatModel

    def __init__(self, config: DinatConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        model = self._model(config)
        setattr(self, self.base_model_prefix, model)
        self.classifier = nn.Linear(model.num_features, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SwinImageClassifierOutput:
        """[B, num_channels, H, W] to logits [B, num_labels], and the loss where there are labels.

        Of labels transformers tells the kind of loss: [B] class indices, [B, num_labels] for several labels per image.

        Raises:
            ValueError: There are no pixel_values.
        """
        outputs = self.base_model(
            pixel_values, output_attentions=output_attentions, output_hidden_states=output_hidden_states
        )
        logits = self.classifier(outputs.pooler_output)
        return SwinImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class NatBackbone(BackboneMixin, _WithNetwork):
    """The network's maps for detection and segmentation, each with a norm of its own; `out_features` names them.

    "stage1" to "stage4" are the levels, at strides 4 to 32; "stem" is what goes into the first.
    """

    def __init__(self, config: DinatConfig) -> None:
        super().__init__(config)
        self.network = _network(config, output_norms=True)
        self.network.norm = nn.Identity()  # files of backbones have none
        self.num_features = [config.embed_dim, *(info["num_chs"] for info in self.network.feature_info)]
        for level, name in enumerate(self.stage_names[1:]):
            if name not in self.out_features:
                self.network.output_norms[level] = nn.Identity()
        stem = {"stem": nn.LayerNorm(config.embed_dim)} if "stem" in self.out_features else {}
        self.hidden_states_norms = nn.ModuleDict(stem)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """[B, num_channels, H, W] to feature_maps, NCHW, one for each of out_features.

        hidden_states are what goes into the first level and what comes out of each, [B, H, W, C], without norms.
        """
        inputs, outputs, attentions = self._run(pixel_values, output_attentions)
        hidden_states = (inputs[0], *outputs)
        norms = [self.hidden_states_norms["stem"] if self.hidden_states_norms else None, *self.network.output_norms]
        maps = [
            norm(x)
            for norm, x, name in zip(norms, hidden_states, self.stage_names, strict=True)
            if name in self.out_features
        ]
        return BackboneOutput(
            feature_maps=tuple(x.permute(0, 3, 1, 2).contiguous() for x in maps),
            hidden_states=hidden_states if self._wants_hidden_states(output_hidden_states) else None,
            attentions=attentions,
        )


class DinatModel(NatModel):
    """NatModel for model_type "dinat", whose blocks have dilations."""

    config_class = DinatConfig
    base_model_prefix = "dinat"


class DinatForImageClassification(NatForImageClassification):
    """NatForImageClassification for model_type "dinat"."""

    config_class = DinatConfig
    base_model_prefix = "dinat"
    _model = DinatModel


class DinatBackbone(NatBackbone):
    """NatBackbone for model_type "dinat"."""

    config_class = DinatConfig
    base_model_prefix = "dinat"


def _register() -> None:
    AutoConfig.register("nat", NatConfig, exist_ok=True)
    for config, model, classifier, backbone in (
        (NatConfig, NatModel, NatForImageClassification, NatBackbone),
        (DinatConfig, DinatModel, DinatForImageClassification, DinatBackbone),
    ):
        register_checkpoint_conversion_mapping(config.model_type, _conversions(), overwrite=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForImageClassification.register(config, classifier, exist_ok=True)
        AutoBackbone.register(config, backbone, exist_ok=True)
        AutoImageProcessor.register(config, ViTImageProcessor, exist_ok=True)


_register()
