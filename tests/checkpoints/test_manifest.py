"""The manifest of published checkpoints."""

import timm

import nat_models  # noqa: F401  registers the models
from nat_models.checkpoints import LAYOUTS, list_weights


def test_manifest_and_registry_agree():
    known = {weights.name: weights for weights in list_weights()}
    assert set(known) == set(timm.list_models(module=["nat", "dinat"], pretrained=True))
    for name, weights in known.items():
        cfg = timm.models.get_pretrained_cfg(name)
        assert (weights.repo, weights.url, weights.license) == (cfg.hf_hub_id, cfg.url or None, cfg.license)
        assert (weights.repo is None) != (weights.url is None)
        assert weights.layout in LAYOUTS
        model = timm.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == weights.parameters
