"""The two manifests of a MONAI Application Package 1.0 (MAP): ``app.json`` and ``pkg.json``.

Written as the specification has them (Project-MONAI/monai-deploy, guidelines/monai-application-package.md, 1.0.0);
read also as the packager of the MONAI Deploy App SDK wrote them (models as a mapping, ``output.formats``, a command
that is JSON in a string, null probes) and in the kebab-case of version 0.1.0.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from trilobe import __version__
from trilobe.errors import DataError, NotFoundError
from trilobe.infrastructure.packaging.entry import arguments
from trilobe.infrastructure.packaging.resources import Resources

APP, PKG = "etc/holoscan/app.json", "etc/holoscan/pkg.json"
ROOT, MODELS, DOCS, WORK = "/opt/holoscan/app/", "/opt/holoscan/models/", "/opt/holoscan/docs/", "/var/holoscan/"
ENVIRONMENT = {
    "HOLOSCAN_INPUT_PATH": f"{WORK}input/",
    "HOLOSCAN_OUTPUT_PATH": f"{WORK}output/",
    "HOLOSCAN_WORKDIR": WORK,
    "HOLOSCAN_MODEL_PATH": MODELS,
    "HOLOSCAN_CONFIG_PATH": f"{WORK}app.yaml",
    "HOLOSCAN_APP_MANIFEST_PATH": f"/{APP}",  # the specification's table says app.config here, its text app.json
    "HOLOSCAN_PKG_MANIFEST_PATH": f"/{PKG}",
    "HOLOSCAN_DOCS": DOCS,
    "HOLOSCAN_LOGS": f"{WORK}logs/",
}
API = "1.0.0"
T = TypeVar("T")
_OLD_NAMES = {"HOLOSCAN_DOCS_PATH": "HOLOSCAN_DOCS", "HOLOSCAN_LOGS_PATH": "HOLOSCAN_LOGS"}


class _Struct(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    pass


class Probe(_Struct, frozen=True):
    """How a host finds out that a service is ready, or alive."""

    type: str
    command: list[str] | None = None
    port: int | None = None
    path: str | None = None
    initial_delay_seconds: int = 1
    period_seconds: int = 10
    timeout_seconds: int = 1
    failure_threshold: int = 3


class Input(_Struct, frozen=True):
    """Where the application reads, relative to its working directory, and what."""

    formats: list[Any]
    path: str = "input/"


class Output(_Struct, frozen=True):
    """Where it writes, and what."""

    format: Any
    path: str = "output/"


class AppManifest(_Struct, frozen=True):
    """``app.json``: how the application is run. ``timeout`` is in seconds, 0 for none.

    >>> app = AppManifest(command="python3 -m app", input=Input(formats=[]), output=Output(format={}))
    >>> read_app(to_json(app)) == app
    True
    """

    command: str
    input: Input
    output: Output
    type: str = "application"
    environment: dict[str, str] = {}
    api_version: str = "0.0.0"
    version: str = "0.0.0"
    sdk: str | None = None
    sdk_version: str = "0.0.0"
    timeout: int = 0
    working_directory: str = WORK
    readiness: Probe | None = None
    liveness: Probe | None = None


class PackagedModel(_Struct, frozen=True):
    """A model by name; ``path`` is relative to the folder of models, and the name where it is not given."""

    name: str
    path: str | None = None


class PkgManifest(_Struct, frozen=True):
    """``pkg.json``: what the package holds and what it needs.

    >>> read_pkg(b'{"application-root": "/opt/monai/app", "models": {"net": "/m/net"}}').models[0].path
    '/m/net'
    """

    application_root: str = ROOT
    model_root: str = MODELS
    models: list[PackagedModel] = []
    resources: Resources = Resources()
    api_version: str = "0.0.0"
    version: str = "0.0.0"


def manifests(
    command: str,
    models: Sequence[str],
    resources: Resources,
    version: str,
    formats: tuple[Any, Any] = ("file", "file"),
) -> tuple[AppManifest, PkgManifest]:
    """Both manifests of an application that we package: what it runs, which models, what it needs.

    ``version`` is a semantic version; ``formats`` say what is read and written.

    >>> app, pkg = manifests("python3 -m app", ["digits"], Resources(cpu=2), "1.2.0")
    >>> (app.environment["HOLOSCAN_INPUT_PATH"], pkg.models[0].name)
    ('/var/holoscan/input/', 'digits')
    """
    app = AppManifest(
        command=command, environment=dict(ENVIRONMENT), api_version=API, version=version,
        sdk="trilobe", sdk_version=__version__,
        input=Input(formats=[{"format": formats[0]}]), output=Output(format={"format": formats[1]}),
    )  # fmt: skip
    listed = [PackagedModel(name=name, path=name) for name in models]
    return app, PkgManifest(models=listed, resources=resources, api_version=API, version=version)


def to_json(manifest: AppManifest | PkgManifest) -> bytes:
    """A manifest as its file, without what was not said.

    >>> b"gpuMemory" in to_json(PkgManifest())
    False
    """
    return msgspec.json.format(msgspec.json.encode(_said(msgspec.to_builtins(manifest))), indent=2) + b"\n"


def read_app(data: bytes) -> AppManifest:
    """``app.json`` in any known spelling. Raises :class:`~trilobe.errors.DataError`.

    >>> read_app(b"{}")
    Traceback (most recent call last):
    trilobe.errors.DataError: app.json: Object missing required field `command`; expected the manifest of a MAP
    """
    raw = _parsed("app.json", data)
    environment = raw.pop("environment", {})
    raw = _camel(raw)
    if isinstance(environment, dict):
        environment = {_OLD_NAMES.get(name, name): value for name, value in environment.items()}
    raw["environment"] = environment
    if isinstance(raw.get("output"), dict):
        raw["output"].setdefault("format", raw["output"].pop("formats", {}))
    if isinstance(raw.get("input"), dict):
        raw["input"].setdefault("formats", [])
    if isinstance(command := raw.get("command"), list) or (isinstance(command, str) and command.startswith("[")):
        raw["command"] = shlex.join(arguments(command))
    return _converted("app.json", raw, AppManifest)


def read_pkg(data: bytes) -> PkgManifest:
    """``pkg.json`` in any known spelling. Raises :class:`~trilobe.errors.DataError`.

    >>> read_pkg(b'{"resources": {"cpu": 2, "gpu-memory": "4Gi"}}').resources.gpu_memory
    '4Gi'
    """
    raw = _parsed("pkg.json", data)
    models, resources = raw.pop("models", []), raw.pop("resources", {})
    raw = _camel(raw)
    raw["models"] = [{"name": k, "path": v} for k, v in models.items()] if isinstance(models, dict) else models
    if isinstance(resources, dict):  # the names of fragments are people's own
        fragments = resources.pop("fragments", None) or {}
        resources = {**_camel(resources), "fragments": {name: _camel(needed) for name, needed in fragments.items()}}
    return _converted("pkg.json", {**raw, "resources": resources}, PkgManifest)


def read_folder(folder: Path) -> tuple[AppManifest, PkgManifest]:
    """Both manifests from a folder: ``/etc/holoscan``, or ``config/`` as ``extract`` fills it.

    >>> read_folder(Path("nowhere"))
    Traceback (most recent call last):
    trilobe.errors.NotFoundError: no app.json in nowhere; expected the manifests of a MAP
    """
    found = []
    for name in ("app.json", "pkg.json"):
        try:
            found.append((folder / name).read_bytes())
        except OSError as e:
            raise NotFoundError(f"no {name} in {folder}", expected="the manifests of a MAP") from e
    return read_app(found[0]), read_pkg(found[1])


def _parsed(name: str, data: bytes) -> dict[str, Any]:
    try:
        raw: dict[str, Any] = _said(msgspec.json.decode(data, type=dict[str, Any]))
        return raw
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise DataError(f"{name}: {e}", expected="the manifest of a MAP") from e


def _converted(name: str, raw: Mapping[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(raw, kind, strict=False)
    except msgspec.ValidationError as e:
        raise DataError(f"{name}: {e}", expected="the manifest of a MAP") from e


def _said(value: Any) -> Any:
    """Without what is null."""
    if isinstance(value, dict):
        return {k: _said(v) for k, v in value.items() if v is not None}
    return [_said(v) for v in value] if isinstance(value, list) else value


def _camel(value: Any) -> Any:
    """kebab-case keys, those of version 0.1.0, as camelCase."""
    if isinstance(value, dict):
        return {re.sub(r"-([a-z])", lambda m: m[1].upper(), k): _camel(v) for k, v in value.items()}
    return [_camel(v) for v in value] if isinstance(value, list) else value
