"""Publishes a model in a repository of the Hugging Face Hub, with a model card.

    nat-models push --model output/best --repo user/name --dry-run
    nat-models push --model nat_tiny --checkpoint weights.pth --repo user/name --license mit

--model is a folder that a run wrote, or a timm name whose weights --checkpoint holds, in any layout.

timm          config.json, model.safetensors: timm.create_model("hf-hub:user/name", pretrained=True)
transformers  those of NatForImageClassification or DinatForImageClassification, preprocessor_config.json

The files are one commit, made once they have all arrived: what breaks off before it leaves the repository as it was.
The token is HF_TOKEN or that of `hf auth login`. A dry run lists the files and prints the card, and pushes nothing.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from timm.data.model_config import resolve_input_data_config
from torch import nn

from ..checkpoints.files import sha256_of
from ..checkpoints.saving import save_for_transformers, save_model
from ..errors import UserError, require
from ..integrations.hub import check_repository, check_token, push_folder
from ..training.cards import FORMATS, Facts, model_card, read_facts
from ..training.models import (
    MULTI_LABEL,
    add_model_flags,
    class_names,
    is_multi_label,
    model_from_flags,
    parse_model_kwargs,
    published_as,
    readable,
    resolve_name,
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_flags(parser, default=None)
    add("--num-classes", type=int, help="of the checkpoint; the model's by default")
    add("--class-names", type=Path, help="file with a class on each line, in the order of the outputs")
    add("--repo", required=True, help="USER/NAME; created if there is none")
    add("--format", choices=FORMATS, default="timm", help="of the repository")
    add("--license", help="as the Hub abbreviates it; by default that of the published weights it began from")
    add("--base-model", help="repository that the weights began from; by default where it is known")
    add("--figures", nargs="+", default=[], metavar="KEY=VALUE", help="for the card, percent; by default the run's")
    add("--dataset", help="what the figures were measured on; by default the run's")
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", help="branch, created if there is none; main by default")
    add("--message", help="of the commit")
    add("--card", action=argparse.BooleanOptionalAction, default=True, help="write README.md, over one that is there")
    add("--dry-run", action="store_true", help="list the files and print the card; push nothing")


def run(args: argparse.Namespace) -> None:
    require("timm", "1.0.31", "pushing")  # writes a configuration that says how the network is made
    check_repository(args.repo)
    if not args.dry_run:  # better known before weights are loaded
        check_token()
    if (args.pretrained, args.checkpoint) == (False, None):
        raise UserError("There are no weights to push: neither --pretrained nor --checkpoint.")
    model = model_from_flags(args, args.num_classes)
    if args.class_names is not None:
        model.pretrained_cfg["label_names"] = _read_names(args.class_names)
    with tempfile.TemporaryDirectory() as folder:
        _write(model, _facts(model, args), Path(folder), args)
        files = sorted(Path(folder).iterdir())
        for path in files:
            print(f"{path.stat().st_size:>12,}  {path.name}")
        digest = sha256_of(Path(folder) / "model.safetensors")
        print(f"sha256 of model.safetensors: {digest}")
        if args.dry_run:
            if args.card:
                print(f"\n{(Path(folder) / 'README.md').read_text()}")
            return
        message = f"Weights and configuration for {args.format}" if args.message is None else args.message
        commit = push_folder(Path(folder), args.repo, message=message, private=args.private, revision=args.revision)
    print(f"Pushed to {commit}\nThis commit and no other: {args.repo}@{commit.oid}")


def _write(model: nn.Module, facts: Facts, folder: Path, args: argparse.Namespace) -> None:
    """The files of the repository."""
    names = class_names(model)
    problem_type = MULTI_LABEL if is_multi_label(model) else None
    data_config = resolve_input_data_config(model, {} if args.img_size is None else dict(img_size=args.img_size))
    create = ""
    if args.format == "timm":
        label_names = model.pretrained_cfg.get("label_names")  # those of ImageNet timm knows without
        save_model(
            model,
            folder,
            model_config=dict(label_names=label_names, problem_type=problem_type),
            data_config=data_config,
        )
    else:
        save_for_transformers(model, folder, classes=names, data_config=data_config, problem_type=problem_type)
        create = _create(model, args)
    if args.card:
        card = model_card(
            facts,
            classes=list(map(readable, names)),
            data_config=data_config,
            source=args.repo,
            format=args.format,
            create=create,
        )
        (folder / "README.md").write_text(card)


def _create(model: nn.Module, args: argparse.Namespace) -> str:
    """The call that makes the network with timm where the repository says nothing of timm."""
    from timm.models._input import get_model_args  # not in an older timm, which is refused with its name

    n = model.num_classes
    plain = dict(in_chans=3, global_pool="avg")
    kwargs = {k: v for k, v in get_model_args(model, {}).items() if v != plain.get(k)} | {"num_classes": n}
    overlay = f'dict(hf_hub_id="{args.repo}", num_classes={n})'
    arguments = "".join(f", {name}={value!r}" for name, value in kwargs.items())
    architecture = model.pretrained_cfg["architecture"]
    return f'timm.create_model("{architecture}", pretrained=True, pretrained_cfg_overlay={overlay}{arguments})'


def _facts(model: nn.Module, args: argparse.Namespace) -> Facts:
    """What is known of the weights, and what the flags say over it."""
    source, _, folder = resolve_name(args.model).partition(":")
    known, facts = published_as(model), None
    as_it_was = args.checkpoint is None and args.num_classes is None and not args.model_kwargs
    if as_it_was and source == "local-dir":
        facts = read_facts(Path(folder))
    elif as_it_was and known is not None:
        facts = Facts(
            title=args.repo.partition("/")[2],
            about=f"The weights of {known.repo} ({known.name}).",
            dataset="ImageNet-1k",
            figures=dict(top1=known.top1),
            figures_of="Of ImageNet-1k's validation images, as published; percent.",
            license=known.license,
            base_model=known.repo,
        )
    if facts is None:
        architecture = model.pretrained_cfg["architecture"]
        facts = Facts(title=args.repo.partition("/")[2], about=f"A network of the architecture {architecture}.")
    said = dict(license=args.license, base_model=args.base_model, dataset=args.dataset)
    if args.figures:
        said["figures"] = {name: _figure(name, value) for name, value in parse_model_kwargs(args.figures).items()}
        said["figures_of"] = f"Of {args.dataset if args.dataset else 'data that nobody named'}; percent."
    return dataclasses.replace(facts, **{name: value for name, value in said.items() if value is not None})


def _figure(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"--figures takes numbers, got {name}={value!r}.")
    return float(value)


def _read_names(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
