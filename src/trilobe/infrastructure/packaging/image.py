"""What goes into an image: a bundle or an application, our code, pinned requirements, manifests, documents.

The layout is that of a MONAI Application Package. Each part is a layer of its own, so that two images share what they
have in common:

=========================================  ==========================================================
path                                       holds
=========================================  ==========================================================
``/opt/holoscan/packages``                 installed packages, if asked for
``/opt/holoscan/app``                      Trilobe's code, ``requirements.txt``, an application's own modules
``/opt/holoscan/models/NAME``              the bundle; beside it ``NAME.sig``, if it was signed
``/opt/holoscan/docs``                     how to run it, the license, the bill of materials
``/etc/holoscan``                          ``app.json``, ``pkg.json``
``/var/holoscan``                          working directory, and the settings of ``serve``; in ``sagemaker`` those
                                           that hold on Amazon SageMaker
=========================================  ==========================================================
"""

import inspect
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trilobe import __version__
from trilobe.errors import DataError, UsageError
from trilobe.infrastructure.bundle import MANIFEST, read_bytes, source_date
from trilobe.infrastructure.packaging import oci
from trilobe.infrastructure.packaging.application import Application
from trilobe.infrastructure.packaging.installed import code, compiled, files_of, licenses, requirements, serving, tree
from trilobe.infrastructure.packaging.map import APP, DOCS, ENVIRONMENT, MODELS, PKG, ROOT, WORK, manifests, to_json
from trilobe.infrastructure.packaging.oci import Entry, Layer
from trilobe.infrastructure.packaging.resources import Resources
from trilobe.infrastructure.packaging.sbom import sbom_json
from trilobe.infrastructure.packaging.signing import signature_path
from trilobe.types import Bundle

USER = 65532  # nobody in particular, as in distroless images
PACKAGES = "/opt/holoscan/packages/"
LISTENS = {"com.amazonaws.sagemaker.capabilities.accept-bind-to-port": "true"}  # see entry.serving
TOKENS = "/etc/trilobe/tokens.json"  # who may call the endpoint: not in the image, but mounted there
ENTRY = ["python3", "-m", "trilobe.infrastructure.packaging.entry"]
_PYTHON = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "ORT_DISABLE_TELEMETRY": "1"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")


@dataclass(frozen=True, slots=True)
class Contents:
    """What an image is made of, apart from what all of them hold."""

    name: str
    version: str
    command: str
    models: Mapping[str, Bundle]
    resources: Resources
    code: Mapping[str, Callable[[], bytes]]
    requirements: Sequence[str] = ()


def write_bundle(
    bundle: Bundle, path: Path, base: Path | None = None, packages: bool = False, resources: Resources | None = None
) -> str:
    """Write a bundle to ``path`` as an OCI image: a folder, or one file where the name ends in ``.tar``.

    Run without words, it is ``trilobe infer`` of the bundle from ``/var/holoscan/input`` to ``/var/holoscan/output``;
    with the word ``serve`` an endpoint on port 8080, which Amazon SageMaker may host.

    Args:
        bundle: an opened bundle.
        path: where to write; the same image there already is left as it is.
        base: an OCI layout whose layers come first. Without it the image holds no Python interpreter and does not run
            by itself.
        packages: put in the packages installed here that serving needs, for a base with Python of this version.
        resources: what it needs of a machine; 1 core and 1Gi by default.

    Returns:
        The digest of the image's manifest. The same arguments, the same digest.
    """
    name = model_name(bundle)
    command = f"python3 -m trilobe infer {MODELS}{name} {WORK}input/ {WORK}output/"
    return _write(
        Contents(name, f"0.0.0+{bundle.id}", command, {name: bundle}, resources or Resources(), {}),
        path, bundle.id, base, packages,
    )  # fmt: skip


def write_application(
    app: Application, path: Path, bundles: Sequence[Bundle] = (), base: Path | None = None, packages: bool = False
) -> str:
    """Write an application to ``path`` as an OCI image, with ``bundles`` as its models.

    Run without words, it goes from ``/var/holoscan/input`` to ``/var/holoscan/output``. The image holds the module
    that the class is from, or the whole package; what else it imports must be among the packages of the base.
    Raises :class:`~trilobe.errors.UsageError` for an application that cannot run, or that is in no file.
    """
    app.steps()
    module, files = source_of(type(app))
    command = f"python3 -m trilobe.infrastructure.packaging.application {module}:{type(app).__qualname__}"
    command += f" {WORK}input/ {WORK}output/"
    names = [model_name(b) for b in bundles]
    models = {n if names.count(n) == 1 else f"{n}-{b.id}": b for n, b in zip(names, bundles, strict=True)}
    contents = Contents(app.title, app.version, command, models, app.needs(), files, tuple(app.requirements))
    return _write(contents, path, re.sub(r"[^A-Za-z0-9_.-]", "-", app.version), base, packages)


def model_name(bundle: Bundle) -> str:
    """The name of a bundle's model: its project's.

    >>> model_name(Bundle("b1", Path("b1"), "m1", {"project": "../etc"}))
    Traceback (most recent call last):
    trilobe.errors.UsageError: the name '../etc'; expected letters, digits and _.- in at most 128 characters
    """
    return _checked(str(bundle.manifest.get("project") or "model"))


def source_of(kind: type) -> tuple[str, dict[str, Callable[[], bytes]]]:
    """The name of the module that a class is from, and its files by path: the module, or all of its package.

    Raises :class:`~trilobe.errors.UsageError` for a class of a notebook or an interactive session.
    """
    module = sys.modules[kind.__module__]
    file = getattr(module, "__file__", None)
    if not file or "<locals>" in kind.__qualname__:
        raise UsageError(
            f"{kind.__qualname__} is not in a module", expected="a class in a .py file", hint="save it and import it"
        )
    name = Path(file).stem if kind.__module__ == "__main__" else kind.__module__
    top = name.partition(".")[0]
    if top == "trilobe":
        return name, {}
    package = sys.modules.get(top)
    if package is not None and getattr(package, "__path__", None):
        return name, tree(Path(next(iter(package.__path__))))
    return name, {f"{name}.py": Path(inspect.getfile(kind)).read_bytes}


def _write(contents: Contents, path: Path, tag: str, base: Path | None, packages: bool) -> str:
    _checked(contents.name)
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    if packages:
        _expect_same_python(base, architecture)
    created = source_date(max((b.manifest["created_at"] for b in contents.models.values()), default=0.0))
    runs = "built on a base image" if base else "files without a Python interpreter, to be built upon"
    said = {
        "org.opencontainers.image.title": contents.name,
        "org.opencontainers.image.version": contents.version,
        "org.opencontainers.image.created": oci.timestamp(created),
        "org.opencontainers.image.description": f"{contents.name}, packaged by Trilobe {__version__}: {runs}",
        "io.trilobe.bundles": " ".join(b.id for b in contents.models.values()),
    }
    config = {
        "User": str(USER),
        "WorkingDir": WORK,
        "Entrypoint": ENTRY,
        "Env": {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{PACKAGES}", **_PYTHON},
        "ExposedPorts": {f"{port}/tcp": {} for port in ports().values()},
        "Labels": said | LISTENS,
    }
    return oci.write_image(
        path, list(_layers(contents, runs, packages)), config, said,
        tag=tag, base=base, architecture=architecture, created=created,
    )  # fmt: skip


def _layers(contents: Contents, runs: str, packages: bool) -> Iterator[Layer]:
    """From what changes least to what changes most."""
    needed = serving()[1:]
    if packages:
        placed = {f"{PACKAGES[1:]}{name}": place.read_bytes for name, place in files_of(needed)}
        yield Layer("installed packages", [Entry(name, read) for name, read in compiled(placed).items()])
    yield _layer(f"Trilobe {__version__}", ROOT, compiled(code()))
    listed = requirements(needed, contents.requirements).encode()
    yield _layer("the application", ROOT, {**compiled(contents.code), "requirements.txt": lambda: listed})
    for name, bundle in contents.models.items():
        files: dict[str, Callable[[], bytes]] = {MANIFEST: (bundle.path / MANIFEST).read_bytes}
        files |= {file: partial(read_bytes, bundle, file) for file in bundle.manifest["files"]}
        files = {f"{name}/{file}": read for file, read in files.items()}
        if (signature := signature_path(bundle.path)).is_file():
            files[f"{name}.sig"] = signature.read_bytes
        yield _layer(f"bundle {bundle.id}", MODELS, files)
    app, pkg = manifests(contents.command, list(contents.models), contents.resources, contents.version)
    written = {APP: to_json(app), PKG: to_json(pkg), f"{DOCS[1:]}README.md": _readme(contents, runs).encode()}
    written |= {f"{DOCS[1:]}{name}": data for name, data in licenses().items()}
    for name, bundle in contents.models.items():
        written[f"{DOCS[1:]}{name}.cdx.json"] = sbom_json(bundle)
        if len(contents.models) == 1:
            task = str(bundle.manifest.get("task", ""))
            written[f"{WORK[1:]}trilobe.toml"] = _settings(name, task, ports()).encode()
            written[f"{WORK[1:]}sagemaker/trilobe.toml"] = _settings(name, task, {"http": ports()["http"]}).encode()
    parts = ("", "input", "output", "logs", ".trilobe", "sagemaker", "sagemaker/.trilobe")
    folders = [Entry(f"{WORK[1:]}{part}".rstrip("/"), None, owner=USER) for part in parts]
    yield Layer("manifests and documents", [*folders, *(Entry(k, partial(bytes, v)) for k, v in written.items())])


def _layer(words: str, root: str, files: Mapping[str, Callable[[], bytes]]) -> Layer:
    return Layer(words, [Entry(root[1:] + name, read) for name, read in files.items()])


def ports() -> dict[str, int]:
    """Where the image's endpoint is spoken to: HTTP, where SageMaker and KServe look for it, and gRPC if that is
    installed here.

    >>> ports()["http"]
    8080
    """
    grpc = any(p.name == "grpcio" for p in serving())
    return {"http": 8080, **({"grpc": 8001} if grpc else {})}


def _settings(name: str, task: str, spoken: Mapping[str, int]) -> str:
    """``trilobe.toml`` of the working directory, for ``serve``; ``spoken`` says what is spoken on which port.

    A container is reached from outside or not at all, so it does not start without tokens unless it is told to.
    """
    lines = ["[project]", f'name = "{name}"', f'task = "{task}"', "", "[serve]", 'host = "0.0.0.0"']
    lines += [f'tokens = "{TOKENS}"']
    for kind, port in spoken.items():
        lines += [f"port = {port}"] if kind == "http" else [f"{kind} = true", f"{kind}_port = {port}"]
    return "\n".join(lines) + "\n"


def _readme(contents: Contents, runs: str) -> str:
    models = "".join(
        f"- {MODELS}{name}: bundle {b.id}, its model card is README.md there\n" for name, b in contents.models.items()
    )
    return f"""\
# {contents.name} {contents.version}

A MONAI Application Package made by Trilobe {__version__}: {runs}.

Run it over a folder; serve its model, if it has one; print its manifests; get its files:

    docker run -v ./in:/var/holoscan/input -v ./out:/var/holoscan/output IMAGE
    docker run -p 127.0.0.1:8080:8080 -v ./tokens.json:{TOKENS}:ro IMAGE serve
    docker run IMAGE show
    docker run -v ./files:/var/run/holoscan/export IMAGE extract

The endpoint answers who shows a token of tokens.json, which `trilobe token CLIENT --file tokens.json` writes and user
{USER} must be able to read (it holds digests only). TRILOBE_TOKENS names another place for it; with TRILOBE_OPEN=1 the
endpoint needs none and answers everybody, as on Amazon SageMaker, which asks callers itself and hosts this image as it
is.

What runs is `{contents.command}`. It needs Python 3.11 or newer and
the packages of {ROOT}requirements.txt. Containers run as user {USER}, who must be able to write to ./out.

{models}"""


def _expect_same_python(base: Path | None, architecture: str) -> None:
    """Installed packages are for one version of Python on one machine: the base must be alike."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if base is None:
        raise UsageError("packages without a base", expected=f"--base IMAGE, with Python {here}")
    _, config = oci.read_image(base, architecture)
    env = dict(line.partition("=")[::2] for line in config.get("config", {}).get("Env") or [])
    there = env.get("PYTHON_VERSION", here)  # as the official images say it
    if there.split(".")[:2] != here.split(".") or config.get("architecture") != architecture:
        raise DataError(
            f"the base has Python {there} on {config.get('architecture')}",
            expected=f"Python {here} on {architecture}, as the packages here are for",
            hint=f"skopeo copy docker://python:{here}-slim oci:base",
        )


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise UsageError(f"the name {name!r}", expected="letters, digits and _.- in at most 128 characters")
    return name
