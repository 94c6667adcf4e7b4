"""What is installed here and needed where a bundle is served: this package's own code, and what it depends on.

The list of packages is a walk of the requirements that distributions declare (``importlib.metadata``), without those
that only training needs: an endpoint imports none of them. Modules travel with their bytecode (:func:`compiled`).
"""

import marshal
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from trilobe.errors import StorageError

TRAINING = frozenset({"torch", "onnx", "onnxscript"})  # the only requirements that an endpoint does without
EXTRAS = ("grpc",)  # those that an endpoint uses where they are installed


class Package(NamedTuple):
    """An installed distribution; ``needs`` are the installed ones it requires, ``license`` as it says itself."""

    name: str
    version: str
    needs: tuple[str, ...]
    license: str = ""

    @property
    def purl(self) -> str:
        """Its package URL (PEP 503 name).

        >>> Package("PyYAML", "6.0", ()).purl
        'pkg:pypi/pyyaml@6.0'
        """
        return f"pkg:pypi/{normal(self.name)}@{self.version}"


def serving(root: str = "trilobe", without: frozenset[str] = TRAINING) -> list[Package]:
    """``root`` and, sorted by name, all installed packages that it needs, directly or not, but for ``without``.

    Of extras only those that serving has (:data:`EXTRAS`) are followed. Other conditions on platform or Python are
    taken as met where the package is installed: what does not apply here is not installed here.

    >>> found = {p.name for p in serving()}
    >>> ("msgspec" in found, "onnxruntime" in found, "torch" in found)
    (True, True, False)
    """
    found: dict[str, Package] = {}
    waiting = [root]
    while waiting:
        name = normal(waiting.pop())
        if name in found or name in without:
            continue
        try:
            known = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        needs = sorted({normal(n) for n in _required(known.requires or [])} - without)
        found[name] = Package(known.metadata["Name"], known.version, tuple(needs), _license(known))
        waiting += needs
    first = found.pop(normal(root), None)
    rest = [found[name] for name in sorted(found)]
    every = {normal(p.name) for p in rest}
    whole = [first, *rest] if first else rest
    return [p._replace(needs=tuple(n for n in p.needs if n in every)) for p in whole]


def requirements(packages: Sequence[Package], more: Sequence[str] = ()) -> str:
    """The packages as ``requirements.txt``, each at its version, and further lines.

    >>> requirements([Package("a", "1.0+cpu", ())], ["b>=2"])
    'a==1.0\\nb>=2\\n'
    """
    pinned = (f"{normal(p.name)}=={p.version.partition('+')[0]}" for p in packages)
    return "".join(f"{line}\n" for line in [*pinned, *more])


def code() -> dict[str, Callable[[], bytes]]:
    """The source of this package by path, each a function that reads it.

    >>> code()["trilobe/errors.py"]().startswith(b'"')
    True
    """
    import trilobe

    return tree(Path(trilobe.__file__).parent)


def licenses(root: str = "trilobe") -> dict[str, bytes]:
    """The license files of an installed package by name; none where it brought none.

    >>> list(licenses())
    ['LICENSE']
    """
    listed = metadata.distribution(root).files or []
    return {file.name: Path(str(file.locate())).read_bytes() for file in listed if "licenses" in file.parts}


def tree(folder: Path) -> dict[str, Callable[[], bytes]]:
    """The files of a Python package by path from the folder that holds it, without hidden and compiled ones."""
    files = {p.relative_to(folder.parent): p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".pyc"}
    return {
        name.as_posix(): p.read_bytes for name, p in files.items() if not any(s.startswith(".") for s in name.parts)
    }


def files_of(packages: Sequence[Package]) -> Iterator[tuple[str, Path]]:
    """Path in ``site-packages`` and place of every file of the packages, programs and compiled Python left out.

    Raises :class:`~trilobe.errors.StorageError` for a package whose installer left no list of its files.

    >>> any(path == "msgspec/__init__.py" for path, _ in files_of([p for p in serving() if p.name == "msgspec"]))
    True
    """
    for package in packages:
        listed = metadata.distribution(package.name).files
        if listed is None:
            raise StorageError(
                f"{package.name} {package.version} does not say which files it has",
                expected="packages that pip installed",
                hint="package in a virtual environment",
            )
        for file in sorted(listed, key=str):
            if ".." in file.parts or "__pycache__" in file.parts or file.suffix == ".pyc":
                continue
            yield file.as_posix(), Path(str(file.locate()))


def compiled(files: Mapping[str, Callable[[], bytes]]) -> dict[str, Callable[[], bytes]]:
    """Files by path, and beside each module its bytecode: an image on a read-only disk compiles it at every start else.

    What is in folders of tests is left as it is, and so is what this Python cannot compile.

    >>> sorted(compiled({"a/b.py": lambda: b"x = 1", "a/c.py": lambda: b"print 1", "a/d.txt": lambda: b""}))
    ['a/__pycache__/b.cpython-3...pyc', 'a/b.py', 'a/c.py', 'a/d.txt']
    """
    made = dict(files)
    for name, read in files.items():
        path = PurePosixPath(name)
        if path.suffix == ".py" and "tests" not in path.parts and (data := bytecode(name, read())):
            place = path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
            made[str(place)] = partial(bytes, data)
    return made


def bytecode(path: str, source: bytes) -> bytes | None:
    """A module as a ``.pyc`` for this version of Python, valid whatever the time of its source; None if it has errors.

    Hash-based and unchecked (PEP 552): found beside a source, it is what runs. The same bytes in every process: version
    2 of the format, as later ones say which objects the process happened to share. ``path`` may be relative, as import
    puts the real one in its place.

    >>> code = marshal.loads(bytecode("a.py", b"x = 6 * 7")[16:])
    >>> exec(code, found := {})
    >>> found["x"]
    42
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = compile(source, path, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):
        return None
    return MAGIC_NUMBER + b"\1\0\0\0" + source_hash(source) + marshal.dumps(code, 2)


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares it.

    >>> normal("Foo_Bar.baz")
    'foo-bar-baz'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _required(lines: Sequence[str]) -> Iterator[str]:
    """The names in requirement lines (PEP 508), without those of other extras."""
    for line in lines:
        what, _, condition = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", condition)
        if (not extra or extra[1] in EXTRAS) and (found := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", what)):
            yield found[0]


def _license(known: metadata.Distribution) -> str:
    said = known.metadata.get_all("License-Expression") or []
    classified = [c.split("::")[-1].strip() for c in known.metadata.get_all("Classifier") or [] if "License ::" in c]
    return next(iter([*said, *reversed(classified)]), "")
