"""Imports go down only (CONTRIBUTING.md), vendors stay behind their files, and the light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("moe", "kernels", "launch") for path in (ROOT / folder).rglob("*.py"))

# The longest prefix of a module's name counts.
LAYERS = {
    "moe": 0,  # moe/__init__.py imports nothing
    "moe.config": 0,
    "moe.balance": 1,
    "moe.parallel": 1,
    "kernels": 1,
    "moe.model": 2,
    "moe.observe": 3,
    "moe.interop": 3,
    "moe.train": 4,
    "launch": 5,
}
VENDORS = {  # package: the files or folders that may import it
    "triton": ("kernels/",),
    "wandb": ("moe/observe/sinks.py", "moe/observe/dashboard.py"),
    "wandb_workspaces": ("moe/observe/dashboard.py",),
    "deepspeed": ("moe/train/engines/deepspeed_zero.py",),
    "megatron": (
        "moe/train/engines/megatron_core.py",
        "moe/train/engines/megatron_setup.py",
        "moe/interop/megatron.py",
    ),
    "transformers": ("moe/interop/transformers.py",),
}
LAUNCH_MAY_IMPORT_AT_TOP = {"moe.config", "moe.observe.cost", "moe", "pydantic", "tyro", "rich", "launch"}


def module_name(path: Path) -> str:
    """moe/train/loop.py -> moe.train.loop"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int:
    """The layer of a module of ours."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(LAYERS[name] for name in names if name in LAYERS)


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Full names of the imported modules; `from a import b` counts as a.b where that is a module of ours."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            base = node.module or ""
            below = {f"{base}.{alias.name}" for alias in node.names if is_module(f"{base}.{alias.name}")}
            found |= below or {base}
    return found


def is_module(name: str) -> bool:
    """Whether a dotted name is a file or package of this repository."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def ours(names: set[str]) -> set[str]:
    """Without foreign modules."""
    return {name for name in names if name.split(".")[0] in ("moe", "kernels", "launch")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path):
    module = module_name(path)
    for name in ours(imports(path)):
        if name == "moe":
            continue
        assert layer(name) <= layer(module), f"{module} (layer {layer(module)}) imports {name} (layer {layer(name)})"
        if module.startswith("kernels"):
            assert name.startswith("kernels"), f"{module} imports {name}: kernels never import moe"
        if module.startswith("moe.config"):
            assert name.startswith("moe.config"), f"{module} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_vendors_stay_behind_their_files(path: Path):
    where = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        allowed = VENDORS.get(name.split(".")[0])
        assert allowed is None or where.startswith(allowed), f"{where} imports {name}: only {', '.join(allowed)} may"
    optional = {"deepspeed", "megatron", "transformers", "wandb", "wandb_workspaces"}
    packages = {name.split(".")[0] for name in imports(path, top_only=True)}
    if where not in VENDORS["deepspeed"] + VENDORS["megatron"] + VENDORS["transformers"]:
        assert not packages & optional, f"{where} imports {packages & optional} at the top: import it when used"


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.name)
def test_launch_is_light(path: Path):
    for name in imports(path, top_only=True):
        package = name.split(".")[0]
        light = name in LAUNCH_MAY_IMPORT_AT_TOP or package in LAUNCH_MAY_IMPORT_AT_TOP - {"moe"}
        light = light or name.startswith("moe.config.")
        assert light or package in sys.stdlib_module_names or package == "__future__", (
            f"launch/{path.name} imports {name}"
        )


def test_no_cycles():
    graph = {module_name(path): ours(imports(path, top_only=True)) - {module_name(path)} for path in FILES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a cycle: {' -> '.join([*above, module])}"
        if module not in done:
            for below in graph.get(module, ()):
                visit(below, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("folder", ["moe", "kernels"])
def test_p05_nothing_is_probed_for(folder: str):
    """A misspelt attribute must fail, not switch the bias update off: no hasattr, no getattr with a default."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                probe = node.func.id == "hasattr" or (
                    node.func.id == "getattr" and len(node.args) + len(node.keywords) > 2
                )
                assert not probe or "overloadpacket" in ast.unparse(node), f"{path.name}: {ast.unparse(node)}"


def test_packages_that_import_nothing():
    for folder in ("moe", "moe/observe", "moe/interop", "kernels"):
        assert not imports(ROOT / folder / "__init__.py"), f"{folder}/__init__.py must stay light"


def test_kernels_is_no_hub_package():
    # transformers probes for the package `kernels` of the hub and believes a version in [0.18.2, 0.19).
    names = {node.id for node in ast.walk(ast.parse((ROOT / "kernels/__init__.py").read_text())) if hasattr(node, "id")}
    assert "__version__" not in names


@pytest.mark.parametrize(
    "module",
    [
        "moe.config",
        "moe.observe.cost",
        "launch.cli",
        "launch.train",
        "launch.prepare",
        "launch.report",
        "launch.watch",
        "moe.observe.report",
    ],
)
def test_no_torch(module: str):
    code = f"import sys, {module}; print([m for m in ('torch', 'triton', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
