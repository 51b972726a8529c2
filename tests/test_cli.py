"""The command nat-models: commands, errors, exit codes, and what it needs installed."""

import os
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import nat_models
from nat_models import errors, resources
from nat_models.cli import COMMANDS, main
from nat_models.errors import CheckpointError, UserError
from nat_models.resources import resource, resource_folder

ROOT = Path(__file__).parents[1]


def _run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "Unknown command 'trian', near to train."),
        (["info", "--verbose"], "Unknown argument '--verbose'"),
        (["train", "--epcohs", "3"], "Unknown argument '--epcohs', near to --epochs"),
        (["features"], "--data"),
        (["export", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["train", "--data", "x", "--config", "finetun"], "finetun"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_a_recipe_that_does_not_exist_lists_those_that_do(capsys):
    assert main(["train", "--data", "x", "--config", "nothing"]) == 2
    error = capsys.readouterr().err
    assert all(path.stem in error for path in (ROOT / "configs").glob("*.yaml"))


def test_version_and_help_import_no_command():
    code = """
import contextlib, io, sys
from nat_models.cli import main
for flag in ("--version", "--help"):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([flag])
    print(len(out.getvalue()) > 10)
print([name for name in sys.modules if name.startswith(("nat_models.commands", "nat_models.training", "accelerate"))])
"""
    run = _run(code)
    assert run.stdout.split("\n")[:3] == ["True", "True", "[]"], run.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"nat-models {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "argv", "extra"),
    [
        ("accelerate", ["train", "--data", "x"], "train"),
        ("matplotlib", ["train", "--data", "x"], "train"),
        ("rich", ["features", "--data", "x"], "train"),
    ],
)
def test_a_missing_package_is_an_error_that_names_the_extra(package, argv, extra):
    code = f"import sys; sys.modules[{package!r}] = None\nfrom nat_models.cli import main; sys.exit(main({argv!r}))"
    run = _run(code)
    assert run.returncode == 2, run.stderr
    assert run.stderr == f"error: The package {package} is not installed: pip install 'nat_models[{extra}]'\n"


def test_a_missing_exporter_is_an_error_that_names_the_extra(tmp_path):
    argv = ["export", "--model", "nat_mini", "--no-pretrained", "--output", str(tmp_path / "x.onnx")]
    run = _run(
        f"import sys; sys.modules['onnxruntime'] = None\nfrom nat_models.cli import main; sys.exit(main({argv}))"
    )
    assert run.returncode == 2, run.stderr
    assert "pip install 'nat_models[export]'" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_info_needs_no_extra():
    extras = ["accelerate", "matplotlib", "rich", "onnx", "onnxruntime", "onnxscript", "sklearn", "natten"]
    run = _run(
        f"import sys\nfor name in {extras}: sys.modules[name] = None\n"
        "from nat_models.cli import main; sys.exit(main(['info']))"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"nat_models {nat_models.__version__}, torch ")
    assert "nat-models weights" in run.stdout and "na2d runs on" in run.stdout


@pytest.mark.parametrize(
    ("found", "old"), [("1.0.26", True), ("1.0.31", False), ("1.0.31.dev0", False), ("1.1", False), ("0.9.16", True)]
)
def test_an_installed_package_that_is_too_old_is_named_with_what_is_needed(found, old, monkeypatch):
    monkeypatch.setattr(errors, "version", lambda package: found)
    if old:
        with pytest.raises(UserError, match=rf"training needs timm 1\.0\.31 or newer, found {found}: pip install"):
            errors.require("timm", "1.0.31", "training")
    else:
        errors.require("timm", "1.0.31", "training")


@pytest.mark.parametrize(
    ("package", "argv"), [("timm", ["train", "--data", "x"]), ("torch", ["export", "--no-pretrained"])]
)
def test_a_program_on_an_older_package_is_one_line(package, argv, tmp_path):
    code = (
        "import importlib.metadata as m, sys; version = m.version\n"
        f"m.version = lambda name: '1.0.26' if name == {package!r} else version(name)\n"
        f"from nat_models.cli import main; sys.exit(main({argv}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert f"needs {package} " in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [UserError("a"), CheckpointError("b")])
def test_errors_cross_process_borders_whole(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))


def test_recipes_and_manifest_are_found():
    assert resource("weights", "manifest.json") == ROOT / "weights" / "manifest.json"
    assert resource_folder("configs") == ROOT / "configs"
    with pytest.raises(UserError, match=r"no lost.yaml in .*, only .*digits\.yaml"):
        resource("configs", "lost.yaml")


def test_a_folder_beside_an_installed_package_is_not_ours(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "nat_models")
    with pytest.raises(UserError, match=r"There is no folder configs in .*nat_models:"):
        resource_folder("configs")


@pytest.mark.parametrize(
    ("script", "command"), [("train", "train"), ("extract_features", "features"), ("export", "export")]
)
def test_a_launcher_is_its_command(script, command):
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{script}.py", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: nat-models {command}")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the built wheel in it; it sees the packages of this one, but not this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    # A folder named in a .pth file adds what lies in it; the .pth files in it, editable installs among them, stay shut.
    (Path(site.stdout.strip()) / "packages.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(installed, tmp_path):
    def run(*command) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    package = run(installed / "python", "-c", "import nat_models; print(nat_models.__file__)")
    assert str(installed.parent) in package
    assert "nat_tiny.shi_in1k" in run(installed / "nat-models", "weights")
    listed = Path(package.strip()).parent
    assert {p.name for p in (listed / "configs").iterdir()} == {p.name for p in (ROOT / "configs").glob("*.yaml")}
    assert not list(listed.rglob("*.cpp")) and not (listed / "weights" / "nat_tiny.safetensors").exists()
    make_data = (
        "import numpy as np; from PIL import Image; from pathlib import Path\n"
        "for c in range(2):\n"
        "    for i in range(40):\n"
        "        Path(f'data/{c}').mkdir(parents=True, exist_ok=True)\n"
        "        Image.fromarray(np.full((32, 32), 90 * c + i, 'uint8')).save(f'data/{c}/{i}.png')\n"
    )
    run(installed / "python", "-c", make_data)
    flags = ["--data", "data", "--config", "digits", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "16"]
    run(installed / "nat-models", "train", *flags, "--output", "run")
    run(installed / "python", "-m", "nat_models", "features", "--data", "data", "--model", "local-dir:run/best")
    assert {"run", "features.safetensors"} <= {p.name for p in tmp_path.iterdir()}
