"""The order of the rooms: a module imports only from its own room and from rooms before it."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "nat_models"

# From first to last; rooms of one line stand beside each other and import nothing of one another. A module is in the
# longest name that starts its own.
ROOMS = [
    ["errors"],
    ["resources", "writing", "onnx_graph"],
    ["ops.window", "ops.request", "ops.tracing"],
    ["ops.checks"],
    ["ops.backends"],
    ["ops.selection"],
    ["ops.registration"],
    ["ops.functional"],
    ["ops.linear", "ops.weights"],
    ["ops"],
    ["layers"],
    ["complexity", "onnx_operator"],
    ["checkpoints"],
    ["networks"],
    ["fixed_size"],
    ["fuse", "export", "integrations"],
    ["conversion", "detector_export", "optimize", "quantization"],
    [""],  # nat_models/__init__.py, which re-exports
    ["training"],  # settings, images, splits, run_state, report, task, models and what they build on
    ["training.tuning", "training.tasks", "training.embeddings", "training.evaluation"],
    ["training.engine", "training.probing"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
RANKS = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def _modules() -> dict[str, Path]:
    """Dotted name below nat_models, and file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _room(module: str) -> str:
    names = module.split(".")
    return next(room for end in range(len(names), 0, -1) if (room := ".".join(names[:end])) in RANKS)


def _imports(module: str, path: Path) -> Iterator[str]:
    """The modules of this package that a module imports, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (n.removeprefix("nat_models").lstrip(".") for n in names if n.split(".")[0] == "nat_models")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package.split(".") if package else []
                base = base[: len(base) - node.level + 1]
                source = ".".join([*base, *([node.module] if node.module else [])])
            elif (node.module or "").split(".")[0] == "nat_models":
                source = node.module.removeprefix("nat_models").lstrip(".")
            else:
                continue
            for alias in node.names:
                inner = f"{source}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else source


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_a_room_imports_only_rooms_before_it(module):
    room = _room(module)
    wrong = []
    for imported in _imports(module, MODULES[module]):
        assert imported in MODULES, f"{module} imports nat_models.{imported}, which is no module"
        source = _room(imported) if imported else ""
        if source != room and RANKS[source] >= RANKS[room]:
            wrong.append(f"{module} imports {imported or '__init__'}")
    assert wrong == []


def test_every_module_has_a_room():
    lost = [name for name in MODULES if name and not any(name == r or name.startswith(f"{r}.") for r in RANKS if r)]
    assert lost == []


def test_the_imports_are_seen():
    seen = {module: set(_imports(module, path)) for module, path in MODULES.items()}
    assert {"ops.window", "ops.request"} <= seen["ops.backends.blocked"]
    assert {"checkpoints", "networks.blocks"} <= seen["networks.nat"]
    assert "ops.backends.native" in seen["ops.backends"]
    assert {"training.engine", "training.tasks.classification"} <= seen["commands.train"]


@pytest.mark.parametrize("module", MODULES)
def test_no_file_outgrows_its_room(module):
    assert len(MODULES[module].read_text().splitlines()) <= 450


@pytest.mark.parametrize("path", sorted((ROOT / "ops" / "csrc").iterdir()), ids=lambda path: path.name)
def test_no_cpp_file_outgrows_its_room(path):
    assert len(path.read_text().splitlines()) <= 400


def test_among_processes_tests_are_shared_out_by_file(request):
    file, _, name = request.node.nodeid.partition("::")
    assert name.endswith(f"@{file}") or os.environ.get("PYTEST_XDIST_WORKER") is None
