"""How the documentation is built: Sphinx, MyST and furo, from these pages and from the code itself.

The reference of the command line is made from the commands (:func:`commands_page`), that of the settings from the
classes that check them (:func:`settings_page`), so neither can drift. The built site loads nothing from the network.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import click
import msgspec
from sphinx.application import Sphinx

import trilobe
from trilobe import config
from trilobe.cli import VERBS, main

HERE = Path(__file__).parent
WIDTH = 94  # characters of code that fit beside the navigation; a longer line has to be scrolled
project, author, copyright = "Trilobe", "the Trilobe authors", "the Trilobe authors, Apache-2.0"
version = release = trilobe.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["generated/*"]
html_theme = "furo"
html_title = f"Trilobe {version}"
html_theme_options = {"top_of_page_buttons": [], "light_css_variables": {"code-font-size": "0.78rem"}}
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes (learned)", "Attributes")]
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
highlight_language = "python"


def commands_page() -> str:
    """The help of every verb, as ``trilobe VERB --help`` prints it."""
    parts = ["# Commands", (
        "Made from the commands when this page was built. Every command is also a function of the same name and\n"
        "arguments: see [the verbs](verbs.md). Data goes to stdout, talk to stderr; `--json` prints the result for\n"
        "machines. Exit codes: 0 done, 1 error, 2 wrong usage, 3 a gate failed or the monitor alarms, 130 interrupted."
    ), _help(main, "trilobe", None)]  # fmt: skip
    root = click.Context(main, info_name="trilobe")
    for name in VERBS:
        parts += [f"## {name}", _help(main.get_command(root, name), name, root)]
    return "\n\n".join(parts) + "\n"


def _help(command: Any, name: str, parent: click.Context | None) -> str:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH)
    return f"```text\n{command.get_help(context)}\n```"


def settings_page() -> str:
    """Every key of ``trilobe.toml`` with its type, its default and the comment beside it in ``config.py``."""
    parts = [(HERE / "reference" / "configuration.head.txt").read_text("utf-8").rstrip()]
    for section, kind in _types(config.Config).items():
        parts += [f"## [{section}]", "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(
            f"| `{section}.{f.name}` | {_type(f.type)} | {_default(f)} | {_comment(kind, f.name)} |"
            for f in msgspec.structs.fields(kind)
        )]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _types(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {f.name: f.type for f in msgspec.structs.fields(kind)}


def _default(f: msgspec.structs.FieldInfo) -> str:
    if f.required:
        return "required"
    value = f.default_factory() if f.default is msgspec.NODEFAULT else f.default
    return f"`{list(value) if isinstance(value, tuple) else value!r}`".replace("'", '"')


def _type(kind: Any) -> str:
    """A type in words: ``float, 0 to 1``."""
    info = msgspec.inspect.type_info(kind)
    if isinstance(info, msgspec.inspect.UnionType):
        return ", or ".join(_words(part) for part in info.types)
    return _words(info)


def _words(info: Any) -> str:
    words = {"IntType": "integer", "FloatType": "number", "StrType": "text", "BoolType": "true or false",
             "VarTupleType": "list", "DictType": "table"}  # fmt: skip
    if isinstance(info, msgspec.inspect.LiteralType):
        return ", ".join(f"`{v}`" for v in info.values)
    limits = {"from": "ge", "above": "gt", "to": "le", "below": "lt"}
    said = [f" {word} {value:,}" for word, name in limits.items() if (value := getattr(info, name, None)) is not None]
    return words[type(info).__name__] + "".join(said)


def _comment(kind: type, name: str) -> str:
    found = re.search(rf"^    {name}: .*  # (.*)$", inspect.getsource(kind), re.MULTILINE)
    return MEANING.get(f"{kind.__name__}.{name}", found[1] if found else "")


# What the name of a key does not say, and what no comment in config.py does.
MEANING = {
    "ProjectSection.name": "of the project and of its endpoint",
    "ProjectSection.task": "what kind of examples",
    "ProjectSection.seed": "for everything random",
    "LabelsSection.names": "the classes, in the order of every probability array",
    "LabelsSection.parents": "the label tree: class or node -> its parent node",
    "ImageSection.max_pixels": "larger files are refused from their header",
    "QuerySection.strategy": "margin, entropy, least_confidence, typical or random",
    "QuerySection.diversity": "candidates per chosen example; 1 takes the top scores as they are",
    "AggregateSection.method": "see [beliefs](../explanation/beliefs.md)",
    "AggregateSection.smoothing": "imagined answers per annotator and class, most of them right",
    "TrainSection.steps": "optimizer steps at least",
    "TrainSection.epochs": "passes over the data at least",
    "TrainSection.batch_size": "examples per step",
    "TrainSection.lr": "largest learning rate; `auto` finds it by a range test",
    "TrainSection.weight_decay": "decoupled, but for sgd",
    "TrainSection.bootstrap": "how far the model's own opinion fills in what answers leave open",
    "TrainSection.width": "channels of the first stage",
    "TrainSection.folds": "networks for out-of-fold predictions",
    "TrainSection.augment": "turn, move and scale training images a little",
    "CheckSection.eps": "sizes of the attack, as a share of a pixel's range",
    "CheckSection.attack_steps": "gradient steps of each attack",
    "CheckSection.attack_examples": "how many examples are attacked",
    "CheckSection.gates": "check -> what it must reach; see [gates](../how-to/gates-in-ci.md)",
    "ServeSection.host": "the address to listen on",
    "ServeSection.max_body": "bytes of a request at most",
    "MonitorSection.share": "a class above this share of the window is looked at by itself",
    "MonitorSection.window": "captures per look",
    "RunSection.rounds": "rounds at most",
}


def fit_napoleon(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """``coef_:`` is no link, and ``X, y:`` are two names, not a type and a name."""
    for i, line in enumerate(lines):
        if found := re.match(r"^( +)(\w+(?:, \w+)*): ", line):
            names = re.sub(r"_(?=,|$)", r"\\_", found[2].replace(", ", ","))
            lines[i] = f"{found[1]}{names}: {line[found.end() :]}"


def shorten_types(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """What autodoc spells out, as people call it: ``ndarray``, ``ArrayLike``; what makes a default, as ``...``."""
    like = r"~?[\w.]*_Buffer \| .*?complex \| bytes \| str\]"
    array = r"~?[\w.]*ndarray\[tuple\[~?[\w.]*Any, \.\.\.\], ~?[\w.]*dtype\[[^\[\]]*(?:\[[^\]]*\])?\]\]"

    def short(text: str | None) -> str | None:
        return text and re.sub(array, "ndarray", re.sub(like, "ArrayLike", text)).replace("<factory>", "...")

    return short(signature), short(returned)


def setup(app: Sphinx) -> None:
    """Write the pages that are made, where they changed, before they are read."""
    app.connect("autodoc-process-docstring", fit_napoleon, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten_types)
    folder = HERE / "reference"
    for name, text in (("commands.md", commands_page()), ("configuration.md", settings_page())):
        path = folder / name
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
