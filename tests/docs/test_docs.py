"""The documentation does what it says: its blocks run, its pages are complete, its links lead somewhere.

In every page and in the README, blocks of ``console`` and ``python`` run from top to bottom in one temporary folder
(those of ``sh`` and ``toml`` do not). In it stands ``photos/``, a folder of cats and dogs, and at the keyboard sits a
person who can tell them apart. The lines shown as output of a command, and a ``text`` block right after a ``python``
block, must come in that order; any number stands for any number, any id for any id, and ``...`` for anything. A
``python`` block that begins with the name of a file is saved instead of run.
"""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from support.warm import ASK, warm
from trilobe import errors
from trilobe.cli import VERBS
from trilobe.config import Config
from trilobe.loop import collecting

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MADE = {"commands.md", "configuration.md"}  # written by docs/conf.py when the documentation is built
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if p.name not in MADE]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHELL = r"""
set -eo pipefail
python() {
    if [[ $WARM && $1 != - && $1 != -c ]]; then "$PYTHON" -I -S -c "$ASK" "$WARM" "$@"; else "$PYTHON" "$@"; fi
}
trilobe() { python -m trilobe "$@" && if [[ $1 == init && $STEPS ]]; then shorten; fi; }
shorten() { echo "$STEPS" >> "$(ls -t trilobe.toml */trilobe.toml 2>/dev/null | head -1)"; }
"""
STEPS = "[train]\nsteps = 60\n"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "COLUMNS": "140", "NO_COLOR": "1", "OMP_NUM_THREADS": "1",
               "ASK": ASK, "WARM": "", "STEPS": ""}  # fmt: skip
SHARED = ("PIL.Image", "alembic.command", "onnxscript", "scipy.optimize", "scipy.stats", "sklearn.datasets",
          "sqlalchemy", "torch._dynamo", "trilobe.cli.commands")  # fmt: skip


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown page."""
    fence = re.compile(r"^```([a-z]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 1) for m in fence.finditer(text)]


def script(block: str) -> str:
    """The commands of a console block, without those that install or build."""
    lines = [line[2:] for line in block.splitlines() if line.startswith(("$ ", "> "))]
    return "\n".join(line for line in lines if not line.startswith("make"))


def shown(block: str) -> list[str]:
    """The output that a console block shows."""
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith(("$ ", "> "))]
    return lines if script(block) else []


def masked(line: str) -> str:
    """A line in which numbers and ids are all alike, and so is the space between columns.

    >>> masked("bundle 6bf09b3b4671:  8 files, 1.5e-07 KiB") == masked("bundle 0bf09b3b467f: 11 files, 0.3 KiB")
    True
    """
    line = re.sub(r"\b[0-9a-f]{6,}\b|\d+(\.\d+)?(e[-+]\d+)?", "#", line)
    return " ".join(line.split())


def missing_line(wanted: list[str], came: str) -> str | None:
    """The first line of ``wanted`` that does not come, in its order, in the output ``came``.

    >>> missing_line(["a 1", "c ..."], "a 2\\nb\\nc d"), missing_line(["c", "a"], "a\\nc")
    (None, 'a')
    """
    lines = iter([masked(line) for line in came.splitlines()])
    for line in wanted:
        pattern = ".*".join(re.escape(masked(part)) for part in line.split("..."))
        pattern = pattern.replace(r"\ .*", ".*").replace(r".*\ ", ".*")
        if not any(re.fullmatch(r"\s*" + pattern + r"\s*", other) for other in lines):
            return line
    return None


def run_shell(commands: str, folder: Path, seconds: float = 600, **more: str) -> str:
    """Run commands at a terminal where somebody answers what is asked about ``photos/``; their output."""
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(["bash", "-c", SHELL + commands], cwd=folder, env=ENVIRONMENT | more, stdin=terminal,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    os.close(terminal)
    clock = threading.Timer(seconds, process.kill)
    clock.start()
    said = []
    with process:
        assert process.stdout
        for line in process.stdout:
            if "\x1b[48;" not in line:  # a picture, drawn with colors
                said.append(re.sub(r"(empty = stop\)) ", r"\1\n", line))
            if asked := re.search(r"photos/(cat|dog)-\d+\.png: ", line):
                os.write(keyboard, f"{asked[1]}\n".encode())
    clock.cancel()
    os.close(keyboard)
    assert process.returncode == 0, f"exit code {process.returncode} of\n{commands}\n{''.join(said)}"
    return "".join(said)


def take_photos(folder: Path) -> None:
    """Cats have stripes that go up, dogs have stripes that go across."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    stripes = np.tile(np.array([40, 210], dtype=np.uint8).repeat(3), (12, 2))
    for i in range(24):
        for name, image in (("cat", stripes), ("dog", stripes.T)):
            noisy = np.clip(np.roll(image, i, (0, 1)) + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{name}-{i:02d}.png")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where programs start quickly."""
    with warm(tmp_path_factory.mktemp("quick"), SHARED, ENVIRONMENT) as address:
        yield address


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    take_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for project in {path.parents[2] for path in tmp_path.glob("**/.trilobe/endpoints/*")}:
        run_shell(f"trilobe serve --stop --project '{project}'", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the tutorial takes a minute of computing, on a busy machine several
@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(page: Path, folder: Path, quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README runs as it does for a reader. Other pages save the time that importing takes; those that say how to do
    one thing also train for fewer steps than is usual, as how good the model is does not matter there."""
    more = {} if page.name == "README.md" else {"WARM": quick}
    if page.parent.name == "how-to":
        more["STEPS"] = STEPS
        monkeypatch.setattr(collecting, "TEMPLATE", f"{collecting.TEMPLATE}\n{STEPS}")
    names: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page.read_text("utf-8")):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.language == "console" and (commands := script(block.text)):
            missing = missing_line(shown(block.text), came := run_shell(commands, folder, **more))
            assert missing is None, f"{where} shows {missing!r}, but what came is\n{came}"
        if block.language == "text" and printed:
            missing = missing_line(block.text.splitlines(), printed)
            assert missing is None, f"{where} shows {missing!r}, but what came is\n{printed}"
        printed = ""
        if block.language == "python" and (saved := re.match(r"# (\w+\.py)\n", block.text)):
            Path(saved[1]).write_text(block.text, "utf-8")
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
            printed = out.getvalue()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_run_and_are_short(example: Path, folder: Path, quick: str) -> None:
    assert len(example.read_text("utf-8").splitlines()) < 60
    said = run_shell(f"python '{example}'", folder, WARM=quick)
    promised = re.search(r'^Prints:\n\n(.*?)^"""', example.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert promised, f"{example.name} does not say what it prints"
    assert (missing := missing_line(promised[1].splitlines(), said)) is None, f"{missing!r} is not in\n{said}"


def text_of(*parts: str) -> str:
    return (DOCS.joinpath(*parts)).read_text("utf-8")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_documented(verb: str) -> None:
    written = "\n".join(p.read_text("utf-8") for p in PAGES if p.parent.name != "reference")
    assert re.search(rf"\btrilobe {verb}\b", written), f"no page uses trilobe {verb}"
    assert re.search(rf"(autofunction:: trilobe\S*\.|^#+ ){verb}$", text_of("reference", "verbs.md"), re.MULTILINE)


# Rooms that a page of the reference shows under another name, or that are nobody's to call.
UNLISTED = (
    "cli", "demos", "loop", "algorithms.fit.", "algorithms.parallel.lane", "infrastructure.store.migrations",
    "infrastructure.store.records", "infrastructure.store.schema",
)  # fmt: skip


def test_every_module_has_a_reference() -> None:
    pages = "\n".join(p.read_text("utf-8") for p in (DOCS / "reference").glob("*.md"))
    listed = set(re.findall(r":: trilobe\.([\w.]+)", pages))
    source = ROOT / "src" / "trilobe"
    names = [".".join(p.relative_to(source).with_suffix("").parts) for p in source.rglob("*.py")]
    lost = [
        name
        for name in (name.removesuffix(".__init__") for name in names)
        if not name.startswith(("__", *UNLISTED))
        and not re.fullmatch(r"tasks\.\w+\.(data|metrics|model|report)", name)  # the same parts in every task
        and not any(f"{entry}.".startswith(f"{name}.") for entry in listed)
    ]
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_code_fits_the_page(page: Path) -> None:
    """What is shown as code is read without scrolling; what a program said is shown as it said it."""
    width = int(re.findall(r"^WIDTH = (\d+)", (DOCS / "conf.py").read_text("utf-8"), re.MULTILINE)[0])
    for block in blocks(page.read_text("utf-8")):
        said = shown(block.text) if block.language == "console" else []
        long = [line for line in block.text.splitlines() if len(line) > width and line not in said]
        assert long == [] or block.language in ("", "text"), (
            f"{page.name}:{block.line} is wider than {width} characters"
        )


def errors_of(kind: type[errors.TrilobeError]) -> Iterator[type[errors.TrilobeError]]:
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield below
            yield from errors_of(below)


def test_every_error_is_documented() -> None:
    page = text_of("reference", "errors.md")
    assert [e.__name__ for e in errors_of(errors.TrilobeError) if f"`{e.__name__}`" not in page] == []


def test_the_made_pages_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(DOCS))
    import conf  # type: ignore[import-not-found]

    settings, commands = conf.settings_page(), conf.commands_page()
    keys = [f"{name}.{key}" for name, kind in conf._types(Config).items() for key in conf._types(kind)]
    assert len(keys) > 30
    for key in keys:
        row = re.search(rf"^\| `{re.escape(key)}` \| .+ \| .+ \| (.+) \|$", settings, re.MULTILINE)
        assert row, f"{key} is not in the settings, or without a word of explanation"
    for verb in VERBS:
        assert f"\n## {verb}\n" in commands
        assert f"trilobe {verb} [OPTIONS]" in commands


def anchors(page: Path) -> set[str]:
    """The names that headings can be linked by, as GitHub and MyST make them."""
    titles = re.findall(r"^#{1,3} (.+)$", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists() or path.name in MADE, f"{page.name} links to {target}, which is not there"
        if anchor and path.suffix == ".md" and path.name not in MADE:
            assert anchor in anchors(path), f"{page.name} links to {target}; {path.name} has {sorted(anchors(path))}"


def test_every_page_can_be_reached() -> None:
    listed = {t.resolve() for p in PAGES for block in blocks(p.read_text("utf-8")) for t in _toctree(p, block)}
    lost = [str(p.relative_to(DOCS)) for p in PAGES if p.resolve() not in listed and p.name != "index.md"]
    assert lost == []


def _toctree(page: Path, block: Block) -> list[Path]:
    if f"```{{toctree}}\n{block.text}" not in page.read_text("utf-8"):
        return []
    names = [line.strip() for line in block.text.splitlines() if line.strip() and not line.startswith(":")]
    return [path for name in names for path in page.parent.glob(f"{name}.md")]
