"""What features_only makes of a network."""

from timm.models._features import FeatureGetterNet

__all__ = ["FeatureMaps", "feature_arguments"]


class FeatureMaps(FeatureGetterNet):
    """timm's feature getter, whose maps are NCHW, with gradient checkpointing."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


def feature_arguments(kwargs: dict) -> dict:
    """Takes out of a model's arguments those of features_only; returns them as timm's feature_cfg.

    The classes "list", "dict", "hook" and "fx" convert no maps: theirs are NHWC and their output_fmt says so, as with
    timm's own NHWC networks. By default four levels, or the last three where all are of one resolution, as in timm's
    vision transformers.

    Raises:
        ValueError: One of these four classes for a network with output_norms, which they would leave out.
    """
    levels = (0, 1, 2, 3) if kwargs.get("downsample") != "none" else 3
    given = {"out_indices": levels, "feature_cls": "getter", **kwargs.pop("feature_cfg", {})}
    given.update({key: kwargs.pop(key) for key in ("out_indices", "feature_cls") if key in kwargs})
    if given["feature_cls"] in ("getter", FeatureGetterNet):
        return dict(given, feature_cls=FeatureMaps, output_fmt="NCHW")
    if kwargs.get("output_norms"):
        raise ValueError(f"output_norms go with the feature_cls 'getter', got {given['feature_cls']!r}.")
    # The levels are one Sequential. timm drops this for classes that do not look into it.
    return dict(given, flatten_sequential=True)
