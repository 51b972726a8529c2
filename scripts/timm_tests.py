"""Runs timm's own tests/test_models.py on this package's networks: `make test-timm`.

The file comes from timm's source distribution and is not changed. Each of its tests that takes a `model_name` gets ours
in place of timm's, also where timm names a few networks only; what takes none tests one network of timm's and is left
out. Every test passes or is an exception below; an exception that passes, or that met no test, is an error too.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "1.0.31"

# Test: why it cannot pass.
EXCEPTIONS: dict[str, str] = {}


class OurNetworks:
    """A plugin of pytest: parametrises timm's tests with our networks, and collects what became of them."""

    # What a test may take besides a network's name and what does not depend on the network: arguments, of which ours
    # need none.
    ARGUMENTS = {"kwargs": {}, "model_kwargs": {}}

    def __init__(self, networks: list[str]) -> None:
        import pytest

        self.networks, self.parametrize = networks, pytest.mark.parametrize
        self.outcomes: dict[str, dict[str, str]] = {}  # of every test: network and parameters, what happened

    def pytest_generate_tests(self, metafunc) -> None:
        marks = metafunc.definition.own_markers
        for i, mark in enumerate(marks):
            names = [name.strip() for name in mark.args[0].split(",")] if mark.name == "parametrize" else []
            if "model_name" in names and set(names) <= {"model_name", *self.ARGUMENTS}:
                values = [tuple(self.ARGUMENTS.get(name, network) for name in names) for network in self.networks]
                marks[i] = self.parametrize(names, values, ids=self.networks).mark

    def pytest_collection_modifyitems(self, config, items) -> None:
        ours = [item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("model_name") in self.networks]
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            name, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
            self.outcomes.setdefault(name, {})[parameters.removesuffix("]")] = report.outcome


def complaints(outcomes: dict[str, dict[str, str]], exceptions: dict[str, str]) -> list[str]:
    """What differs from the promise: all pass, but for the exceptions, which do not."""
    found = [f"{name} is an exception and met no test" for name in exceptions if name not in outcomes]
    for name, results in outcomes.items():
        for parameters, outcome in results.items():
            if name in exceptions and outcome == "passed":
                found.append(f"{name}[{parameters}] passed and is an exception: {exceptions[name]}")
            elif name not in exceptions and outcome != "passed":
                found.append(f"{name}[{parameters}] {outcome}")
    return found


def fetch(folder: Path) -> Path:
    """timm's source distribution, unpacked in `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
    subprocess.run([*pip, "--dest", str(folder), f"timm=={VERSION}"], check=True)
    with tarfile.open(folder / f"timm-{VERSION}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"timm-{VERSION}"


def main(arguments: list[str]) -> int:
    if (installed := importlib.metadata.version("timm")) != VERSION:
        print(f"timm {VERSION}'s tests run on timm {installed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        # No network, and no weights that someone fetched before: what asks for them fails the same everywhere.
        os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=folder, TORCH_HOME=folder)
        import pytest
        from timm.models import list_models

        import nat_models  # noqa: F401  registers the networks

        plugin = OurNetworks(list_models(module="nat"))
        source = fetch(Path(folder))
        # timm's configuration, for its markers, and none of its packages: the installed timm is the one that is tested.
        options = ["--config-file", str(source / "pyproject.toml"), "-p", "no:cacheprovider", "-W", "ignore"]
        pytest.main([str(source / "tests" / "test_models.py"), *options, *arguments], plugins=[plugin])
    found = complaints(plugin.outcomes, EXCEPTIONS)
    count = sum(map(len, plugin.outcomes.values()))
    print(f"{count} tests, {len(EXCEPTIONS)} exceptions, {len(found)} complaints", *found, sep="\n")
    return 1 if found or not count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
