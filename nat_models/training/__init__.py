"""Training and what it shares with the other programs; imported by commands only, never by `import nat_models`."""

from ..errors import require

require("timm", "1.0.31", "nat_models.training")
