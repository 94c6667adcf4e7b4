"""Manifests of MONAI Application Packages: written as specified, read in every spelling; what the container does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.errors import DataError, NotFoundError
from trilobe.infrastructure.packaging import entry
from trilobe.infrastructure.packaging.map import (
    ENVIRONMENT,
    PackagedModel,
    PkgManifest,
    manifests,
    read_app,
    read_folder,
    read_pkg,
    to_json,
)
from trilobe.infrastructure.packaging.resources import Resources

APP, PKG = manifests("python3 -m app /var/holoscan/input/", ["net"], Resources(cpu=2, gpu=1, gpu_memory="4Gi"), "1.2.0")


def test_what_the_specification_demands_is_there() -> None:
    """Its tables "Application Manifest Fields", "Package Manifest Fields" and "Environment Variables"."""
    app, pkg = json.loads(to_json(APP)), json.loads(to_json(PKG))
    assert app["command"] and app["type"] == "application" and app["apiVersion"] == "1.0.0"
    assert isinstance(app["input"]["formats"], list) and app["output"]["format"]
    assert app["input"]["path"] == "input/" and app["output"]["path"] == "output/"
    assert app["workingDirectory"] == "/var/holoscan/" and app["timeout"] == 0 and app["version"] == "1.2.0"
    assert set(app["environment"]) == {
        f"HOLOSCAN_{name}" for name in ("INPUT_PATH", "OUTPUT_PATH", "WORKDIR", "MODEL_PATH", "CONFIG_PATH",
                                        "APP_MANIFEST_PATH", "PKG_MANIFEST_PATH", "DOCS", "LOGS")
    }  # fmt: skip
    assert pkg["applicationRoot"] == "/opt/holoscan/app/" and pkg["modelRoot"] == "/opt/holoscan/models/"
    assert pkg["models"] == [{"name": "net", "path": "net"}]
    needed = {"cpu": 2, "gpu": 1, "memory": "1Gi", "gpuMemory": "4Gi", "sharedMemory": "64Mi"}
    assert pkg["resources"] == {**needed, "fragments": {}}
    assert "null" not in to_json(APP).decode() + to_json(PKG).decode()


def test_round_trip() -> None:
    assert read_app(to_json(APP)) == APP
    assert read_pkg(to_json(PKG)) == PKG


SIZES = st.integers(1, 999).map("{}Mi".format)
RESOURCES = st.builds(
    Resources, cpu=st.integers(1, 64), gpu=st.integers(0, 8), memory=SIZES, memory_limit=st.none() | SIZES,
    fragments=st.dictionaries(st.text(max_size=9), st.builds(Resources, memory=SIZES), max_size=2),
)  # fmt: skip
MODELS = st.builds(PackagedModel, name=st.text(min_size=1), path=st.none() | st.text())


@given(st.builds(PkgManifest, models=st.lists(MODELS, max_size=3), resources=RESOURCES, version=st.text()))
def test_round_trip_of_any_package(pkg: PkgManifest) -> None:
    assert read_pkg(to_json(pkg)) == pkg


OLD_APP = {
    "apiVersion": "1.0.0", "command": '["python3", "/opt/holoscan/app/a b"]', "sdk": "monai-deploy", "timeout": None,
    "environment": {"HOLOSCAN_DOCS_PATH": "/d", "HOLOSCAN_LOGS_PATH": "/l", "OWN-name": "1"},
    "input": {"path": "input/", "formats": None}, "output": {"path": "output/", "formats": None},
    "readiness": None, "liveness": None, "sdkVersion": "3.0.0", "version": "1.0", "workingDirectory": "/var/holoscan/",
}  # fmt: skip
OLD_PKG = {
    "apiVersion": "1.0.0", "applicationRoot": "/opt/holoscan/app", "modelRoot": "/opt/holoscan/models",
    "models": {"spleen": "/opt/holoscan/models/spleen"}, "platformConfig": "dgpu", "version": "1.0",
    "resources": {"cpu": 1, "gpu": 1, "memory": "1Gi", "gpuMemory": "6Gi"},
}  # fmt: skip
OLDEST_APP = {
    "api-version": "0.1.0", "command": "run", "working-directory": "/w", "sdk-version": "0.5",
    "input": {"formats": [{"data": "dicom"}]}, "output": {"format": {}},
    "liveness": {"type": "tcp", "port": 80, "initial-delay-seconds": 5},
}  # fmt: skip


def test_as_the_old_packager_wrote_it() -> None:
    """holoscan-cli up to 4.2: a command in a string, null probes, models as a mapping, other names of variables."""
    app, pkg = read_app(json.dumps(OLD_APP).encode()), read_pkg(json.dumps(OLD_PKG).encode())
    assert app.command == "python3 '/opt/holoscan/app/a b'" and app.readiness is None and app.timeout == 0
    assert app.environment == {"HOLOSCAN_DOCS": "/d", "HOLOSCAN_LOGS": "/l", "OWN-name": "1"}
    assert pkg.models == [PackagedModel(name="spleen", path="/opt/holoscan/models/spleen")]
    assert pkg.resources == Resources(gpu=1, gpu_memory="6Gi")


def test_as_version_0_1_0_spelled_it() -> None:
    app = read_app(json.dumps(OLDEST_APP).encode())
    assert (app.api_version, app.working_directory, app.sdk_version) == ("0.1.0", "/w", "0.5")
    assert app.liveness is not None and app.liveness.initial_delay_seconds == 5
    resources = {"gpu-memory": "2Gi", "memory-limit": "3Gi", "fragments": {"a-b": {"shared-memory": "1Gi"}}}
    pkg = read_pkg(json.dumps({"application-root": "/a", "model-root": "/m", "resources": resources}).encode())
    assert (pkg.application_root, pkg.model_root) == ("/a", "/m")
    assert pkg.resources.gpu_memory == "2Gi" and pkg.resources.memory_limit == "3Gi"
    assert pkg.resources.fragments["a-b"].shared_memory == "1Gi", "the names that people gave stay theirs"


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{" * 9999, b"\xff", b'{"command": 3}', b'{"command": "a \\" b", "x": 1}']
)
def test_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(DataError, match=r"app\.json"):
        read_app(data)
    if not data.startswith(b'{"'):
        with pytest.raises(DataError, match=r"pkg\.json"):
            read_pkg(data)


# The container -------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, data in {
        "etc/holoscan/app.json": to_json(APP), "etc/holoscan/pkg.json": to_json(PKG), "opt/holoscan/app/a.py": b"a",
        "opt/holoscan/models/net/model.onnx": b"onnx", "opt/holoscan/docs/README.md": b"# doc",
        "var/holoscan/.trilobe/nothing": b"",
    }.items():  # fmt: skip
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "root"


@pytest.fixture
def call(root: Path) -> Callable[..., tuple[int, list[list[str]]]]:
    def call(*words: str, **environ: str) -> tuple[int, list[list[str]]]:
        ran: list[list[str]] = []
        code = entry.main(words, {**ENVIRONMENT, **environ}, root, lambda program, command: ran.append(command))
        return code, ran

    return call


def test_show(root: Path, call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show") == (0, [])
    assert capsys.readouterr().out.encode() == to_json(APP) + to_json(PKG)
    call("show", "pkg")
    assert capsys.readouterr().out.encode() == to_json(PKG)
    assert call("show", "all")[0] == 2 and "expected show, show app" in capsys.readouterr().err
    (root / "etc/holoscan/app.json").unlink()
    assert call("show")[0] == 2 and "no manifest at" in capsys.readouterr().err
    assert call()[0] == 2


def test_extract(root: Path, call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    export = root / entry.EXPORT
    assert call("extract")[0] == 2 and "nothing is mounted" in capsys.readouterr().err
    (export / "models").mkdir(parents=True)
    (export / "config").mkdir()
    assert call("extract")[0] == 0
    found = {str(p.relative_to(export)) for p in export.rglob("*") if p.is_file()}
    assert found == {"models/net/model.onnx", "config/app.json", "config/pkg.json"}
    assert read_folder(export / "config") == (APP, PKG)
    for name in ("models", "config"):
        (export / name).rename(root / name)
    call("extract")
    found = {str(p.relative_to(export)) for p in export.rglob("*") if p.is_file()}
    assert found == {"models/net/model.onnx", "config/app.json", "config/pkg.json", "app/a.py", "docs/README.md"}
    with pytest.raises(NotFoundError, match=r"no app\.json"):
        read_folder(export / "docs")


def test_it_runs_the_command(root: Path, call: Any) -> None:
    assert call()[1] == [[sys.executable, "-m", "app", "/var/holoscan/input/"]]
    assert call("--fast")[1] == [[sys.executable, "-m", "app", "/var/holoscan/input/", "--fast"]]
    moved = call(HOLOSCAN_INPUT_PATH="/data/in")[1]
    assert moved == [[sys.executable, "-m", "app", "/data/in"]], "a host may give other folders"
    serve = [sys.executable, "-m", "trilobe", "serve", f"{root}/opt/holoscan/models/net"]
    assert call("serve", "--port", "0")[1] == [[*serve, "--project", f"{root}/var/holoscan", "--port", "0"]]
    hosted = [*serve, "--project", f"{root}/var/holoscan/sagemaker"]
    assert call("serve", SAGEMAKER_BIND_TO_PORT="8081")[1] == [[*hosted, "--port", "8081"]]
    assert call("serve", SAGEMAKER_SAFE_PORT_RANGE="23000-23999")[1] == [hosted], "on 8080, as its settings say"
    assert call("serve", SAGEMAKER_BIND_TO_PORT="")[1] == [[*serve, "--project", f"{root}/var/holoscan"]]


def test_a_program_that_is_not_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = json.loads(to_json(APP))
    for command, said in (("/no/program", "/no/program cannot be run"), ("", "empty command"), ("a 'b", "No closing")):
        (root / "etc/holoscan/app.json").write_text(json.dumps({**app, "command": command}))
        assert entry.main([], ENVIRONMENT, root) in (1, 2)
        assert said in capsys.readouterr().err
    (root / "etc/holoscan/app.json").write_text("[]")
    assert entry.main([], ENVIRONMENT, root) == 1 and "is no manifest" in capsys.readouterr().err


def test_serving_needs_one_model(root: Path, call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pkg = json.loads(to_json(PKG))
    (root / "etc/holoscan/pkg.json").write_text(json.dumps({**pkg, "models": []}))
    assert call("serve")[0] == 2 and "0 models; expected exactly one" in capsys.readouterr().err
