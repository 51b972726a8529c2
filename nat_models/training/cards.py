"""Model cards: what a README.md on the Hub tells people, and the metadata at its top that the Hub reads."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..errors import UserError
from .settings import FREE, Settings
from .task import Task

FORMATS = ("timm", "transformers")
_FILE = "card.json"
_SHOWN_CLASSES = 100
# The Hub's words for figures, where it has others.
_METRICS = {"top1": "accuracy", "map": "mean_average_precision", "macro_f1": "f1", "macro_recall": "recall"}
_METRICS |= {"macro_precision": "precision", "miou": "mean_iou"}


@dataclass(frozen=True)
class Facts:
    """What a card tells that the weights and their configuration do not hold; a run keeps it beside its weights.

    Attributes:
        title: Of the card.
        about: The training data, in words.
        dataset: Its name, for the metadata; None leaves the figures out of it.
        figures: In percent but for val_loss, by name.
        figures_of: What the figures were measured on, a sentence.
        recipe: Settings that differ from the defaults.
        digest: Of the data.
        license: As the Hub abbreviates it.
        base_model: The repository that the weights began from.
    """

    title: str
    about: str = ""
    dataset: str | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    figures_of: str = ""
    recipe: Mapping = field(default_factory=dict)
    digest: str = ""
    license: str | None = None
    base_model: str | None = None

    def write(self, folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(asdict(self), indent=2))


def read_facts(folder: Path) -> Facts | None:
    """What `Facts.write` wrote into a folder; None if there is nothing.

    Raises:
        UserError: It cannot be read.
    """
    if not (folder / _FILE).is_file():
        return None
    try:
        return Facts(**json.loads((folder / _FILE).read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{folder / _FILE} cannot be read: {e}") from None


def facts_of(task: Task, rows: Sequence[Mapping], title: str, **more) -> Facts:
    """What a run tells of the weights that it saves.

    Args:
        task: Of the run.
        rows: Its epochs so far, each with its figures.
        title: Of the card.
        **more: More fields of Facts.
    """
    s, last = task.settings, rows[-1] if rows else {}
    return Facts(
        title=title,
        about="Trained with [nat_models](https://arxiv.org/abs/2204.07143): "
        f"{task.about}, {task.sizes[0]:,} training and {task.sizes[1]:,} validation images.",
        dataset=Path(s.data).name or None,
        figures={name: last[name] for name in task.figures if name in last and not math.isnan(last[name])},
        figures_of=f"Of the validation images, after epoch {len(rows)} of {s.epochs}; percent, but for val_loss.",
        recipe=recipe_of(s),
        digest=task.digest,
        **more,
    )


def recipe_of(settings: Settings) -> dict:
    """The settings of a run that differ from the defaults and decide its course, and the model's name."""
    plain, defaults = settings.plain(), {f.name: f.default for f in fields(settings)}
    recipe = {k: v for k, v in plain.items() if k not in FREE and v != _as_plain(defaults[k]) and v != {}}
    return {**recipe, "model": settings.model}


def _as_plain(value):
    return list(value) if isinstance(value, tuple) else value


def model_card(
    facts: Facts,
    *,
    classes: Sequence[str],
    data_config: Mapping,
    source: str,
    format: str = "timm",
    create: str = "",
    task: str = "image-classification",
) -> str:
    """A model card in Markdown, with the metadata that the Hub reads.

    Args:
        facts: What was learnt, from what, and how well.
        classes: Their names.
        data_config: The preprocessing, in timm's words.
        source: Where the weights are: a folder, or a repository USER/NAME on the Hub.
        format: One of FORMATS, of the folder or repository, or "nat_models" for one that neither library loads.
        create: Of the transformers format: the call of timm.create_model that loads it.
        task: The Hub's word: "image-classification"; "image-segmentation" or "object-detection" of a folder of ours.
    """
    on_hub = source != "FOLDER"
    tags = list(dict.fromkeys([task, format, "nat_models"]))
    head = ModelCardData(
        license=facts.license,
        library_name=format,
        pipeline_tag=task,
        tags=tags,
        base_model=facts.base_model,
        model_name=facts.title,
        eval_results=_results(facts, task) or None,
    )
    if task in _FOLDERS:
        usage = _folder_usage(source, *_FOLDERS[task])
    else:
        usage = _timm_usage(source, on_hub) if format == "timm" else _transformers_usage(source, create)
    more = f" and {len(classes) - _SHOWN_CLASSES} more" if len(classes) > _SHOWN_CLASSES else ""
    sections = {
        "": f"{facts.about}\n\nClasses: {', '.join(classes[:_SHOWN_CLASSES])}{more}".strip(),
        "Figures": _figures(facts),
        "Use": usage,
        "Preprocessing": "\n".join(f"- {name}: {value}" for name, value in data_config.items()),
        "Recipe": _recipe(facts),
        "Licence": f"{facts.license}." if facts.license else "",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text)
    return f"---\n{_without_name(head)}\n---\n\n# {facts.title}\n\n{body}\n"


def _without_name(head: ModelCardData) -> str:
    """The metadata; a name stands in it for the figures alone."""
    if head.eval_results is None:
        head.model_name = None
    return head.to_yaml().strip()


def _results(facts: Facts, task: str) -> list[EvalResult]:
    if facts.dataset is None:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=facts.dataset.lower(),
            dataset_name=facts.dataset,
            metric_type=_METRICS.get(name, name),
            metric_name=f"{name} (percent)",
            metric_value=round(value, 4),
        )
        for name, value in facts.figures.items()
        if name != "val_loss" and " " not in name  # of one class
    ]


def _figures(facts: Facts) -> str:
    if not facts.figures:
        return ""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in facts.figures.items())
    return f"{facts.figures_of}\n\n| metric | value |\n| --- | --- |\n{rows}".strip()


def _recipe(facts: Facts) -> str:
    if not facts.recipe:
        return ""
    recipe = yaml.safe_dump(dict(facts.recipe), sort_keys=False).strip()
    digest = f"Data digest {facts.digest[:16]}. " if facts.digest else ""
    return f"{digest}Settings that differ from nat_models' defaults:\n\n```yaml\n{recipe}\n```"


def _timm_usage(source: str, on_hub: bool) -> str:
    name = f"hf-hub:{source}" if on_hub else f"local-dir:{source}"
    text = f"""```python
import timm, nat_models

model = timm.create_model("{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
classes = model.pretrained_cfg.get("label_names")
```

In transformers, after `import nat_models`: `pipeline("image-classification", model="{source}")`."""
    return f"{text}\n\n{_tensors(source)}" if on_hub else text


def _transformers_usage(source: str, create: str) -> str:
    return f"""With timm and [nat_models](https://arxiv.org/abs/2204.07143):

```python
import timm, nat_models

model = {create}.eval()
```

In transformers 5, where nat_models brings these networks back:

```python
import transformers, nat_models.integrations.hf_transformers

classify = transformers.pipeline("image-classification", model="{source}")
```

Without nat_models: transformers 4.57 and before, beside NATTEN before 0.20, read the repository as it is.

{_tensors(source)}"""


def _folder_usage(source: str, written: str, module: str, load: str, takes: str) -> str:
    return f"""{written}:

```bash
nat-models predict --model {source} photo.jpg
```

The network in Python:

```python
from pathlib import Path

from nat_models.training.{module} import {load}

network, about = {load}(Path("{source}"))
print(about.classes, about.mean, about.std)
```

{takes}"""


# Of a task: what predict writes, the module and the function that load a folder, what the network takes and gives.
_FOLDERS = {
    "image-segmentation": (
        "Label maps, pictures to look at and the areas of the classes, into `segmented/`",
        "segmenters",
        "load_segmenter",
        "`network(images)` gives logits [B, classes, H, W] of images [B, channels, H, W] that were scaled to the range "
        "of 0 to 1\nand normalised with `about.mean` and `about.std`.",
    ),
    "object-detection": (
        "Boxes and masks as COCO's JSON, and pictures to look at, into `detected/`",
        "detectors",
        "load_detector",
        "`network(images)` takes a list of images [channels, H, W] of any sizes, values 0 to 1, and gives for each a "
        "dict of boxes\n[N, 4] in pixels, labels [N] (indices of `about.classes`), scores [N] and masks [N, 1, H, W].",
    ),
}


def _tensors(source: str) -> str:
    return f"""The tensors alone, without nat_models or timm:

```python
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

tensors = load_file(hf_hub_download("{source}", "model.safetensors"))
```"""
