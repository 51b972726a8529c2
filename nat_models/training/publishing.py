"""The model card of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import yaml

from .settings import FREE, Settings


def model_card(
    settings: Settings,
    *,
    about: str,
    classes: Sequence[str],
    digest: str,
    epoch: int,
    figures: Mapping[str, float],
    data_config: Mapping,
) -> str:
    """A model card in Markdown, with the metadata that the Hub reads.

    Args:
        settings: Of the run; those that differ from the defaults are the recipe.
        about: The data, in words.
        classes: Their names.
        digest: Of the data.
        epoch: The epoch of these weights.
        figures: Of the validation images.
        data_config: The preprocessing, in timm's words.
    """
    head = dict(
        library_name="timm", pipeline_tag="image-classification", tags=["image-classification", "timm", "nat_models"]
    )
    plain = settings.plain()
    defaults = {f.name: f.default for f in fields(settings)}
    recipe = {k: v for k, v in plain.items() if k not in FREE and v != _as_plain(defaults[k]) and v != {}}
    recipe.setdefault("model", settings.model)
    shown = ", ".join(classes[:100]) + (f" and {len(classes) - 100} more" if len(classes) > 100 else "")
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items())
    steps = "\n".join(f"- {name}: {value}" for name, value in data_config.items())
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {settings.model}, trained on {Path(settings.data).name}

Trained with [nat_models](https://arxiv.org/abs/2204.07143): {about}.

Classes: {shown}

## Figures

Of the validation images, after epoch {epoch} of {settings.epochs}; percent, but for val_loss.

| metric | value |
| --- | --- |
{rows}

## Use

```python
import timm, nat_models

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
classes = model.pretrained_cfg["label_names"]
```

In transformers, after `import nat_models`: `pipeline("image-classification", model="FOLDER")`.

## Preprocessing

{steps}

## Recipe

Data digest {digest[:16]}. Settings that differ from nat_models' defaults:

```yaml
{yaml.safe_dump(recipe, sort_keys=False).strip()}
```
"""


def _as_plain(value):
    return list(value) if isinstance(value, tuple) else value
