"""What people plug the backbones into: segmentation_models_pytorch and torchvision's FPN."""

import pytest
import timm
import torch

import nat_models  # noqa: F401  registers the models


def _train_one_step(model, x, loss_of) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    loss = loss_of(model(x))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_smp_unet_trains_a_step():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-nat_mini", encoder_weights=None, classes=3)
    x = torch.randn(2, 3, 64, 96)
    assert model(x).shape == (2, 3, 64, 96)
    _train_one_step(model, x, lambda masks: masks.square().mean())
    assert all(p.grad is not None for p in model.encoder.model.model.levels.parameters())


def test_torchvision_fpn_trains_a_step():
    ops = pytest.importorskip("torchvision.ops")

    class Detector(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model("nat_mini", features_only=True)
            self.fpn = ops.FeaturePyramidNetwork(self.backbone.feature_info.channels(), out_channels=32)

        def forward(self, x):
            return self.fpn({str(i): feature for i, feature in enumerate(self.backbone(x))})

    model = Detector()
    x = torch.randn(1, 3, 96, 64)
    assert [tuple(f.shape[1:]) for f in model(x).values()] == [(32, 24, 16), (32, 12, 8), (32, 6, 4), (32, 3, 2)]
    _train_one_step(model, x, lambda maps: sum(f.square().mean() for f in maps.values()))
    assert all(p.grad is not None for p in model.parameters())
