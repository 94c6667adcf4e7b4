"""Importing costs nothing before something is asked for, and every public name is there when it is."""

import ast
import inspect
import json
import re
import subprocess
import sys

import pytest

import trilobe
from trilobe.cli import VERBS

HEAVY = {"numpy", "scipy", "torch", "sqlalchemy", "alembic", "onnx", "onnxruntime", "rich", "PIL", "msgspec", "jinja2"}
LOADED = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"


def loaded_by(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", f"{code}\n{LOADED}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_import_trilobe_loads_nothing_heavy() -> None:
    assert not loaded_by("import trilobe") & (HEAVY | {"click"})


HELP = """
import sys
sys.argv = ["trilobe", {argument!r}]
from trilobe.cli import main
try:
    main()
except SystemExit as e:
    assert not e.code, e.code
"""


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_the_first_page_of_help_loads_nothing_heavy(argument: str) -> None:
    loaded = loaded_by(HELP.format(argument=argument))
    assert "click" in loaded and not loaded & HEAVY


def test_serving_loads_no_database_and_nothing_of_training() -> None:
    """A container pays for every import at each start; it serves a bundle that is named by its path."""
    code = "from trilobe.cli.commands import command; command('serve'); import trilobe.infrastructure.serve.grpc"
    loaded = loaded_by(f"{code}\nfrom trilobe.tasks import get; get('image_classification')")
    assert "numpy" in loaded
    assert not loaded & {"scipy", "torch", "sqlalchemy", "alembic", "onnx", "rich", "PIL", "jinja2"}


def test_the_command_and_the_module_print_the_same_help() -> None:
    done = subprocess.run([sys.executable, "-m", "trilobe", "--help"], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines() if re.match(r"  [a-z]+  ", line)][
        : len(VERBS)
    ] == list(VERBS)


@pytest.mark.parametrize("name", trilobe.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(trilobe, name)
    assert value is getattr(trilobe, name) and name in dir(trilobe)
    if name != "__version__":
        assert inspect.getdoc(value)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'trilobe' has no attribute 'nothing'"):
        trilobe.nothing  # noqa: B018
    assert not hasattr(trilobe, "__wrapped__")


def test_verbs_are_public_names() -> None:
    assert set(VERBS) <= set(trilobe.__all__)
    assert set(VERBS) == {n for n in trilobe.__all__ if inspect.isfunction(getattr(trilobe, n))}


@pytest.mark.parametrize("verb", VERBS)
def test_the_short_text_of_a_verb_is_the_first_sentence_of_its_docstring(verb: str) -> None:
    first = " ".join((inspect.getdoc(getattr(trilobe, verb)) or "").split("\n\n")[0].split()).replace("`", "")
    assert first.startswith(VERBS[verb].rstrip(".")), f"\n  listed:    {VERBS[verb]}\n  docstring: {first}"


def test_the_package_file_imports_lazily() -> None:
    tree = ast.parse(inspect.getsource(trilobe))
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in top} == {"importlib", "typing"}
