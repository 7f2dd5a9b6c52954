"""The house: packages import downwards only, and nothing but the common ground lies at the top."""

import ast
from pathlib import Path

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "flatdepth"

LAYERS = (
    "types errors geometry resources untrusted pace",
    "cli config hub",
    "rooms",
    "augment",
    "show",
    "data",
    "models",
    "judge",
    "training",
    "predict",
    "benchmarks report label",
    "app bench",
    "commands api",
    "__main__ train",
)
"""From the ground up; a module imports from its own layer and from those below."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


def imports(file: Path) -> set[str]:
    """The first names below ``flatdepth`` of what a module imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "flatdepth":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flatdepth."):
            found.add(str(node.module).split(".")[1])
    return found


def test_imports_go_downwards() -> None:
    upwards = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if (own := file.relative_to(PACKAGE).parts[0].removesuffix(".py")) != "__init__"
        for name in sorted(imports(file))
        if LEVEL[name] > LEVEL[own]
    ]
    assert not upwards


def test_everything_has_its_layer() -> None:
    modules = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    packages = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert modules | packages == set(LEVEL)
