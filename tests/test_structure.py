"""The house rules that a machine can check: which way imports point, how large rooms may grow."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "trilobe"
FILES = sorted(SRC.rglob("*.py"))

# Who may import whom (besides itself). ARCHITECTURE.md draws the same picture; change both together.
GROUND = {"types", "errors", "statistics", "rows", "files", "config", "__init__"}
LOBES = {"data", "algorithms", "infrastructure"}
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "statistics": {"errors", "types"},
    "types": {"errors"},
    "rows": {"types"},
    "files": {"errors"},
    "config": {"errors", "types", "__init__"},
    "data": GROUND,
    "algorithms": GROUND,
    "infrastructure": GROUND,
    "trust": GROUND | LOBES,
    "tasks": GROUND | LOBES | {"trust"},
    "web": GROUND,
    "loop": GROUND | LOBES | {"trust", "tasks", "web"},
    "demos": GROUND | LOBES | {"trust", "tasks", "web", "loop"},
    "cli": GROUND | {"loop", "demos"},
    "__main__": {"cli"},
}
HEAVY = {"torch", "transformers", "ray", "onnx", "onnxruntime", "onnxscript", "sklearn", "matplotlib"}
MAX_FILE, MAX_FUNCTION, MAX_ARGUMENTS = 800, 60, 10


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    """First-level rooms of trilobe that a module imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "trilobe":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "trilobe":
                    names.add(parts[1] if len(parts) > 1 else "__init__")
    return {"__init__" if n == "__version__" else n for n in names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_arrows_point_down(path: Path) -> None:
    here = room(path)
    assert here in ALLOWED, f"{here} is a new room: give it its arrows here and in ARCHITECTURE.md"
    wrong = imported_rooms(ast.parse(path.read_text("utf-8"))) - ALLOWED[here] - {here}
    assert not wrong, f"{path.relative_to(SRC)} imports {sorted(wrong)}; {here} may import {sorted(ALLOWED[here])}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_sizes(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= MAX_FILE, f"{path.name} outgrew one file: make it a folder of the same name"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            lines = (node.end_lineno or 0) - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
            where = f"{path.relative_to(SRC)}:{node.lineno} {node.name}"
            assert lines <= MAX_FUNCTION, f"{where} has {lines} lines without its docstring"
            count = len(node.args.args) + len(node.args.kwonlyargs)
            assert count <= MAX_ARGUMENTS + 1, f"{where} takes {count} arguments"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_heavy_imports_stand_inside_functions(path: Path) -> None:
    """Modules that only draw or decide must load without torch; those that are about torch say so by name."""
    about_torch = {"algorithms", "model.py", "attacks.py", "saliency.py"}
    if about_torch & {*path.relative_to(SRC).parts}:
        return
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            heavy = {n.split(".")[0] for n in names} & HEAVY
            assert not heavy, f"{path.relative_to(SRC)} imports {heavy} at the top"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_every_room_opens_with_its_paragraph(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert doc, f"{path.relative_to(SRC)} opens without saying what lives in it"


def test_no_empty_rooms() -> None:
    for folder in [p for p in SRC.rglob("*") if p.is_dir() and p.name != "__pycache__"]:
        real = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc" and p.name != "__init__.py"]
        assert real, f"{folder.relative_to(SRC)} is an empty room"
