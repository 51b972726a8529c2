"""What a block is made of beside its attention: norms and the MLP."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor

from ..ops.linear import linear
from .recomputing import recomputing_gelu


class MapNorm(nn.LayerNorm):
    """A LayerNorm that takes and returns [B, H, W, C], for hooks, and computes on [B, H * W, C], for Inductor."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = F.layer_norm(x.flatten(1, 2), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.view(shape)


class LeanMlp(Mlp):
    """timm's Mlp, which in training does not keep what comes out of its GELU: backward computes it again.

    Of what a block keeps for backward that is a fifth. The gradients are the same bits.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        hidden = linear(self.fc1, x)
        x = self.norm(self.drop1(self.act(hidden)))
        with recomputing_gelu(x, hidden):
            x = linear(self.fc2, x)
        return self.drop2(x)
