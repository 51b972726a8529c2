"""Runs timm's own tests/test_models.py on this package's networks: `make test-timm`.

The file comes from timm's source distribution and is not changed. Each of its tests that takes a `model_name` gets ours
in place of timm's, also where timm names a few networks only. What takes none, or is about one family of timm's by its
own name, is left out. Every other test passes or is an exception below; an exception that passes and a test that is
skipped are errors too.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

VERSION = "1.0.31"

# Parts of test names: what one family of timm's has.
OTHER_FAMILIES = "swin_family|relpos|attention_bias_cache|efficientvim|mobile_model|resnetv2|efficientnet"

_NETWORK = "fetches weights or images from the Hub; tests/checkpoints loads ours from a local one"
# Test: why it cannot pass.
EXCEPTIONS = {
    "test_model_inference": _NETWORK,
    "test_model_load_pretrained": _NETWORK,
    "test_model_features_pretrained": _NETWORK,
    "test_model_default_cfgs_non_std": "takes axis 1 for the channels; test_model_default_cfgs asks output_fmt",
    "test_model_features_space2depth_reduction": "wants a stem of stride 2 with a feature map; ours has stride 4",
    "test_model_features_output_stride": "wants levels without their stride; ours have none, and say so in an error",
    "test_pruned_features_torchscript": "gives img_size, which ours refuse: nothing in them depends on it",
    "test_prune_extra_blocks_stem_width": "takes the stem for a feature map, by an argument of two families",
    "test_prune_to_stem_feature": "takes feature map 0 for an NCHW stem; ours is the first level, NHWC",
    "test_prune_class_token_avg_pool": "counts tokens of a fixed image size",
    "test_catavgmax_unsupported": "is about networks that cannot pool so; ours can",
    "test_headless_checkpoint_reload": "calls checkpoint_filter_fn of the module; ours is in nat_models.checkpoints",
}


# Arguments that some of these tests give their networks; ours get none.
ARGUMENTS = {"kwargs": {}, "model_kwargs": {}}


class OurNetworks:
    """A plugin of pytest: parametrises timm's tests with our networks."""

    def __init__(self, networks: list[str]) -> None:
        self.networks = networks
        self.problems: list[str] = []

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        marks = metafunc.definition.own_markers
        for i, mark in enumerate(marks):
            names = [name.strip() for name in mark.args[0].split(",")] if mark.name == "parametrize" else []
            if "model_name" in names and set(names) <= {"model_name", *ARGUMENTS}:
                values = [tuple(ARGUMENTS.get(name, network) for name in names) for network in self.networks]
                marks[i] = pytest.mark.parametrize(names, values, ids=self.networks).mark

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        ours = [item for item in items if self._is_ours(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours
        for item in ours:
            if (reason := EXCEPTIONS.get(item.originalname)) is not None and not _has_stride(item):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        found = {item.originalname for item in ours}
        self.problems = [f"{name} is an exception and no test" for name in EXCEPTIONS if name not in found]

    def _is_ours(self, item: pytest.Function) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return parameters.get("model_name") in self.networks and not re.search(OTHER_FAMILIES, item.originalname)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.rpartition("::")[2].partition("[")[0]
        # An exception may be skipped for the size of its images.
        if report.skipped and not hasattr(report, "wasxfail") and test not in EXCEPTIONS:
            self.problems.append(f"{report.nodeid} was skipped")


def _has_stride(item: pytest.Function) -> bool:
    """Whether a network has the stride that a test asks for: isotropic ones have 16."""
    parameters = item.callspec.params
    return parameters.get("output_stride") == 16 and bool(re.search("isotropic|vitrpb", parameters["model_name"]))


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
        from timm.models import list_models

        import nat_models  # noqa: F401  registers the networks

        plugin = OurNetworks(list_models(module=["nat", "dinat"]))
        source = fetch(Path(folder))
        # timm's configuration, for its markers, and none of its modules: the installed timm is the one that is tested.
        options = ["--config-file", str(source / "pyproject.toml"), "-p", "no:cacheprovider", "-W", "ignore"]
        code = pytest.main([str(source / "tests" / "test_models.py"), *options, *arguments], plugins=[plugin])
    print(*plugin.problems, sep="\n")
    return int(code) or bool(plugin.problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
