"""Promises of the settings: recipes, flags and what is wrong with them."""

import pytest

from nat_models import cli
from nat_models.commands.train import TASKS
from nat_models.errors import UserError
from nat_models.resources import resource_folder
from nat_models.training.models import make_model
from nat_models.training.settings import Resume, Settings, from_flags


def parse(*flags: str) -> tuple[Settings, Resume]:
    args = cli.parse(["train", *flags])[1]
    return from_flags(args, TASKS[args.task].Settings)


def test_flags_win_over_yaml_which_wins_over_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nepochs: 7\nmodel_kwargs: {kernel_size: 3, mlp_ratio: 2}\n")
    flags = [
        "--epochs",
        "9",
        "--model-kwargs",
        "kernel_size=5",
        "--data",
        "x",
        "--no-pretrained",
        "--clip-grad",
        "none",
    ]
    cfg, resume = parse("--config", str(tmp_path / "c.yaml"), *flags)
    assert (cfg.lr, cfg.epochs, cfg.weight_decay) == (1e-3, 9, Settings.weight_decay)
    assert cfg.model_kwargs == dict(kernel_size=5, mlp_ratio=2)
    assert (cfg.pretrained, cfg.clip_grad, bool(resume)) == (False, None, False)


def test_a_model_takes_exponents_without_a_dot_for_numbers_from_yaml_and_from_flags(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "output: 1e-5\nmodel_kwargs: {init_values: 1e-5, rates: [-2E+3, {a: .5e1}], b: e5}\n"
    )
    cfg, _ = parse("--config", str(tmp_path / "c.yaml"), "--data", "x")
    assert cfg.model_kwargs == dict(init_values=1e-5, rates=[-2000.0, dict(a=5.0)], b="e5")
    assert cfg.output == "1e-5"  # the name of a folder
    cfg, _ = parse("--data", "x", "--model-kwargs", "init_values=1e-5", "rates=[1e-2,1]", "b=1e", "c=1.e3")
    assert cfg.model_kwargs == dict(init_values=1e-5, rates=[0.01, 1], b="1e", c=1000.0)
    assert make_model("nat_mini", model_kwargs=dict(init_values=cfg.model_kwargs["init_values"]), num_classes=2)


@pytest.mark.parametrize(
    ("yaml_text", "flags", "message"),
    [
        ("epcohs: 3", [], r"Unknown key in .*c\.yaml: 'epcohs', near to epochs"),
        ("", ["--epcohs", "3"], "Unknown argument '--epcohs', near to --epochs"),
        ("", ["--epoch", "3"], "Unknown argument '--epoch', near to --epochs"),
        ("lr: fast", [], "lr must be of type float, got 'fast'"),
        ("epochs: 2.5", [], "epochs must be of type int, got 2.5"),
        ("pretrained: 1", [], "pretrained must be of type bool, got 1"),
        ("in_chans: 4", [], r"in_chans must be 1 \(grey\) or 3 \(RGB\), got 4"),
        ("warmup_epochs: 30", [], "warmup_epochs must be below epochs, 30, got 30"),
        ("sched: multistep", [], r"milestones go with sched multistep, got \(\) with multistep"),
        ("milestones: [20]", [], r"milestones go with sched multistep, got \(20\.0,\) with cosine"),
        ("sched: multistep\nmilestones: [20, 30]", [], r"must rise, between 0 and epochs, 30, got \(20\.0, 30\.0\)"),
        ("", ["--mixup", "0.1", "--batch-size", "7"], "batch_size must be even"),
        ("", ["--model-kwargs", "kernel_size"], "model_kwargs must be key=value, got 'kernel_size'"),
    ],
)
def test_wrong_settings_are_errors_that_name_value_and_rule(tmp_path, yaml_text, flags, message):
    (tmp_path / "c.yaml").write_text(yaml_text)
    with pytest.raises(UserError, match=message):
        parse("--data", "x", "--config", str(tmp_path / "c.yaml"), *flags)


def test_resume_takes_the_settings_of_the_run(run):
    resumed, resume = parse("--resume", "--output", str(run[0]))
    assert resume
    assert (resumed.mixup, resumed.epochs, resumed.model_kwargs["kernel_size"]) == (0.2, 3, 3)


TASKS_OF = {"segment": "segment", "upernet": "segment", "detect": "detect", "rcnn": "detect"}  # a word in a name


@pytest.mark.parametrize("path", sorted(resource_folder("configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_valid(path):
    task = next((t for word, t in TASKS_OF.items() if word in path.stem), "classify")
    cfg, _ = parse("--task", task, "--config", path.stem, "--data", "x")
    make_model(cfg.model, model_kwargs=cfg.model_kwargs, num_classes=2)
    assert parse("--task", task, "--config", str(path), "--data", "x")[0] == cfg


def test_an_unknown_recipe_is_an_error_that_lists_them_and_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no recipe 'finetun'.*: ade20k_upernet, coco_cascade_mask_rcnn, "):
        parse("--config", "finetun", "--data", "x")
    with pytest.raises(UserError, match=r"There is no config file .*finetune\.yaml"):
        parse("--config", str(tmp_path / "finetune.yaml"), "--data", "x")


def test_a_recipe_changes_what_it_inherits(tmp_path):
    (tmp_path / "a.yaml").write_text("inherit: finetune\nepochs: 7\n")
    cfg, _ = parse("--config", str(tmp_path / "a.yaml"), "--data", "x")
    finetune, _ = parse("--config", "finetune", "--data", "x")
    assert cfg.epochs == 7 and cfg.layer_decay == finetune.layer_decay == 0.85
    (tmp_path / "a.yaml").write_text("inherit: nothing\n")
    with pytest.raises(UserError, match="no recipe 'nothing'"):
        parse("--config", str(tmp_path / "a.yaml"), "--data", "x")
