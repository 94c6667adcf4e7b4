"""Images of bundles and applications: what is where, the same twice, and nothing that cannot run is written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobe.config import parse
from trilobe.errors import BundleError, DataError, UsageError
from trilobe.infrastructure.bundle import write_bundle as write_folder
from trilobe.infrastructure.packaging import image as images
from trilobe.infrastructure.packaging.application import Application, Flow, Operator
from trilobe.infrastructure.packaging.image import write_application, write_bundle
from trilobe.infrastructure.packaging.installed import Package, compiled, serving, tree
from trilobe.infrastructure.packaging.map import read_app, read_pkg
from trilobe.infrastructure.packaging.resources import Resources, resource
from trilobe.types import Bundle

NAME = "Digits_2"


def test_what_is_where(bundle: Bundle, tmp_path: Path, unpack: Callable[[Path], Any]) -> None:
    digest = write_bundle(bundle, tmp_path / "image", resources=Resources(cpu=2))
    image = unpack(tmp_path / "image")
    assert image.digest == digest
    models = {k: v for k, v in image.files.items() if k.startswith("opt/holoscan/models/")}
    assert models == {f"opt/holoscan/models/{NAME}/{p.name}": p.read_bytes() for p in bundle.path.iterdir()}
    assert (
        image.files["opt/holoscan/app/trilobe/__init__.py"] == Path(sys.modules["trilobe"].__file__ or "").read_bytes()
    )
    lines = image.files["opt/holoscan/app/requirements.txt"].decode().splitlines()
    assert any(line.startswith("onnxruntime==") for line in lines) and not any("torch" in line for line in lines)
    app, pkg = (read_app if k == "app" else read_pkg for k in ("app", "pkg"))
    manifest = app(image.files["etc/holoscan/app.json"])
    assert manifest.command == (
        f"python3 -m trilobe infer /opt/holoscan/models/{NAME} /var/holoscan/input/ /var/holoscan/output/"
    )
    packed = pkg(image.files["etc/holoscan/pkg.json"])
    assert packed.models[0].name == NAME and packed.resources.cpu == 2  # type: ignore[union-attr]
    bill = json.loads(image.files[f"opt/holoscan/docs/{NAME}.cdx.json"])
    assert bill["metadata"]["component"]["version"] == bundle.id
    settings = parse(image.files["var/holoscan/trilobe.toml"].decode())
    assert settings.project.task == "image_classification" and settings.serve.port == 8080
    assert settings.serve.tokens == "/etc/trilobe/tokens.json" and not settings.serve.open
    assert not any(name.endswith("tokens.json") for name in image.files), "it comes with the container, not the image"
    for folder in ("", "/input", "/output", "/logs", "/.trilobe", "/sagemaker/.trilobe"):
        assert image.members[f"var/holoscan{folder}"].uid == 65532


def test_what_it_starts_with_and_says_of_itself(bundle: Bundle, tmp_path: Path, unpack: Callable[[Path], Any]) -> None:
    write_bundle(bundle, tmp_path / "image")
    image = unpack(tmp_path / "image")
    config = image.config["config"]
    assert config["Entrypoint"] == ["python3", "-m", "trilobe.infrastructure.packaging.entry"]
    assert config["User"] == "65532" and config["WorkingDir"] == "/var/holoscan/"
    assert "PYTHONPATH=/opt/holoscan/app/:/opt/holoscan/packages/" in config["Env"]
    assert "ORT_DISABLE_TELEMETRY=1" in config["Env"], "the runtime would keep a database on how it is used"
    manifest = read_app(image.files["etc/holoscan/app.json"])
    assert {f"{k}={v}" for k, v in manifest.environment.items()} <= set(config["Env"])
    said = image.manifest["annotations"]
    assert said["org.opencontainers.image.title"] == NAME == said["org.opencontainers.image.title"]
    assert said["org.opencontainers.image.version"] == manifest.version == f"0.0.0+{bundle.id}"
    assert "without a Python interpreter" in said["org.opencontainers.image.description"]
    assert b"without a Python interpreter" in image.files["opt/holoscan/docs/README.md"]
    assert config["Labels"] == {**said, "com.amazonaws.sagemaker.capabilities.accept-bind-to-port": "true"}
    (described,) = image.index["manifests"]
    assert described["annotations"] == {"org.opencontainers.image.ref.name": bundle.id}


def test_the_same_digest_here_there_and_in_another_process(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = write_bundle(bundle, tmp_path / "image")
    assert write_bundle(bundle, tmp_path / "image.tar") == digest
    script = f"""
import sys
from pathlib import Path
from trilobe.infrastructure.bundle import open_bundle
from trilobe.infrastructure.packaging.image import write_bundle
print(write_bundle(open_bundle(Path({str(bundle.path)!r})), Path({str(tmp_path / "there")!r})))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == digest
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert write_bundle(bundle, tmp_path / "dated") != digest
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH = 'yesterday'"):
        write_bundle(bundle, tmp_path / "never")


def test_bytecode_is_the_same_wherever_it_is_made(tmp_path: Path) -> None:
    """From another folder, with another seed of hashes, and with other modules loaded, which share their constants."""
    import trilobe

    home = Path(trilobe.__file__).parent
    copied = shutil.copytree(home, tmp_path / "trilobe", ignore=shutil.ignore_patterns("__pycache__"))
    here = {name: read() for name, read in compiled(tree(home)).items() if name.endswith(".pyc")}
    script = f"""
import hashlib, sys, scipy.special, sqlalchemy, onnxruntime
from pathlib import Path
from trilobe.infrastructure.packaging.installed import compiled, tree
for name, read in compiled(tree(Path({str(copied)!r}))).items():
    if name.endswith(".pyc"):
        print(hashlib.sha256(read()).hexdigest(), name)
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "".join(f"{hashlib.sha256(data).hexdigest()} {name}\n" for name, data in here.items())
    assert len(here) > 100


def test_what_runs_is_the_bytecode(tmp_path: Path) -> None:
    """It is not compiled again, though its source is older, newer or another by the clock; traces name the source."""
    files = compiled({"kept.py": lambda: b"def f():\n    return 1 / 0\nvalue = 'from bytecode'\n"})
    for name, read in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(read())
    os.utime(tmp_path / "kept.py", (2e9, 2e9))
    script = "import kept, traceback; print(kept.value, kept.f.__code__.co_filename)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    run = [sys.executable, "-v", "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert done.stdout == f"from bytecode {tmp_path / 'kept.py'}\n"
    assert f"kept.{sys.implementation.cache_tag}.pyc matches" in done.stderr or "code object from" in done.stderr
    (tmp_path / "kept.py").write_text("value = 'from source'")
    done = subprocess.run([sys.executable, "-c", "import kept; print(kept.value)"], capture_output=True, text=True,
                          check=True, env=environment, cwd=tmp_path)  # fmt: skip
    assert done.stdout == "from bytecode\n", "unchecked: nothing is read twice at a start"


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_source_compiles_or_is_left_alone(source: bytes) -> None:
    made = compiled({"pkg/a.py": lambda: source, "pkg/tests/a.py": lambda: b"", "a.py": lambda: b"", "b.txt": bytes})
    assert made["pkg/a.py"]() == source and not any("tests/__pycache__" in name for name in made)
    assert sum(name.endswith(".pyc") for name in made) in (1, 2)


def test_two_packagings_of_one_model_are_one_image(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SOURCE_DATE_EPOCH not even the time a bundle was made differs."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    files = {p.name: p.read_bytes() for p in bundle.path.iterdir() if p.name != "manifest.json"}
    made = [write_folder(tmp_path / name / "b", files, "m1", {"project": NAME}) for name in "ab"]
    assert len({write_bundle(b, tmp_path / f"{i}.tar") for i, b in enumerate(made)}) == 1


def test_a_signature_travels_along(bundle: Bundle, tmp_path: Path, unpack: Callable[[Path], Any]) -> None:
    (tmp_path / "bundle.sig").write_bytes(b"s" * 64)
    write_bundle(bundle, tmp_path / "image")
    assert unpack(tmp_path / "image").files[f"opt/holoscan/models/{NAME}.sig"] == b"s" * 64


def test_a_bundle_that_would_do_harm_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    files = {p.name: p.read_bytes() for p in bundle.path.iterdir() if p.name != "manifest.json"}
    erasing = write_folder(tmp_path / "erasing", {**files, ".wh..wh..opq": b""}, "m1", {"project": NAME})
    with pytest.raises(UsageError, match=r"\.wh\.\.wh\.\.opq"):
        write_bundle(erasing, tmp_path / "image")
    for name in ("../../etc", "a/b", "", ".hidden", "x" * 129, "a b"):
        odd = replace(bundle, manifest={**bundle.manifest, "project": name or " "})
        with pytest.raises(UsageError, match="expected letters, digits"):
            write_bundle(odd, tmp_path / "image")
    (bundle.path / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        write_bundle(bundle, tmp_path / "image")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "erasing"]


def test_on_a_base_with_installed_packages(
    bundle: Bundle, tmp_path: Path, base: Path, unpack: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [p for p in serving() if p.name in ("trilobe", "msgspec")]
    monkeypatch.setattr(images, "serving", lambda: small)  # all of them would take ten seconds
    monkeypatch.setattr(sys, "version_info", type("V", (), {"major": 3, "minor": 11}))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    write_bundle(bundle, tmp_path / "image", base, packages=True)
    image = unpack(tmp_path / "image")
    assert image.files["usr/bin/python3"] and "opt/holoscan/packages/msgspec/__init__.py" in image.files
    assert "PATH=/base/bin" in image.config["config"]["Env"]
    assert "built on a base image" in image.manifest["annotations"]["org.opencontainers.image.description"]
    with pytest.raises(UsageError, match="packages without a base"):
        write_bundle(bundle, tmp_path / "never", packages=True)
    monkeypatch.setattr(sys, "version_info", type("V", (), {"major": 3, "minor": 12}))
    with pytest.raises(DataError, match=r"has Python 3\.11\.9 on amd64; expected Python 3\.12(.|\n)*python:3\.12-slim"):
        write_bundle(bundle, tmp_path / "never", base, packages=True)
    assert not (tmp_path / "never").exists()


# Applications --------------------------------------------------------------------------------------------------------

MODULE = """
from pathlib import Path
from trilobe.infrastructure.packaging.application import Application, Operator
from trilobe.infrastructure.packaging.resources import resource
from packaged_app.words import MORE

@resource(cpu=2, memory="2Gi")
class Copy(Operator):
    def compute(self, input: Path, output: Path, models: Path) -> None:
        (output / "copy").write_text((input / "a").read_text() + MORE + ",".join(p.name for p in models.iterdir()))

class App(Application):
    name, version, requirements = "copier", "1.2.0", ["rich>=13"]
    def compose(self):
        return [Copy()]
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "source" / "packaged_app"
    folder.mkdir(parents=True)
    for name, text in (("__init__", ""), ("words", "MORE = '!'"), ("app", MODULE)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder.parent))
    import importlib

    yield importlib.import_module("packaged_app.app").App()
    for name in [n for n in sys.modules if n.startswith("packaged_app")]:
        del sys.modules[name]


def test_an_application_runs_from_its_image(
    app: Application, bundle: Bundle, tmp_path: Path, unpack: Callable[[Path], Any]
) -> None:
    """Unpacked elsewhere, its command runs with the image's code alone: not with the modules it was made from."""
    app.package(tmp_path / "image", [bundle])
    image = unpack(tmp_path / "image")
    assert image.manifest["annotations"]["org.opencontainers.image.version"] == "1.2.0"
    assert read_pkg(image.files["etc/holoscan/pkg.json"]).resources.memory == "2Gi"
    assert image.files["opt/holoscan/app/requirements.txt"].endswith(b"rich>=13\n")
    root = image.write(tmp_path / "root")
    (root / "var/holoscan/input/a").write_text("a")
    command = read_app(image.files["etc/holoscan/app.json"]).command.replace("/var/", f"{root}/var/").split()
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}/opt/holoscan/app",
        "HOLOSCAN_MODEL_PATH": f"{root}/opt/holoscan/models",
    }
    subprocess.run([sys.executable, *command[1:]], check=True, env=environment, cwd=root / "var/holoscan")
    assert (root / "var/holoscan/output/copy").read_text() == f"a!{NAME}"
    assert write_application(app, tmp_path / "again.tar", [bundle]) == image.digest


class Here(Operator):
    def compute(self) -> None: ...


@resource(cpu=3)
class InAModule(Application):
    def compose(self) -> Flow:
        return [Here()]


def test_an_application_in_one_module(tmp_path: Path, unpack: Callable[[Path], Any]) -> None:
    write_application(InAModule(), tmp_path / "image")
    image = unpack(tmp_path / "image")
    (own,) = [k for k, v in image.files.items() if v == Path(__file__).read_bytes()]
    assert own.startswith("opt/holoscan/app/")
    assert ":InAModule" in read_app(image.files["etc/holoscan/app.json"]).command
    assert "var/holoscan/trilobe.toml" not in image.files, "nothing to serve"


def test_two_models_of_one_name(bundle: Bundle, tmp_path: Path, unpack: Callable[[Path], Any]) -> None:
    files = {p.name: p.read_bytes() for p in bundle.path.iterdir() if p.name != "manifest.json"}
    other = write_folder(tmp_path / "other", {**files, "labels.json": b"[]"}, "m2", {"project": NAME})
    write_application(InAModule(), tmp_path / "image", [bundle, other])
    pkg = read_pkg(unpack(tmp_path / "image").files["etc/holoscan/pkg.json"])
    assert [m.name for m in pkg.models] == [f"{NAME}-{b.id}" for b in (bundle, other)]


def test_an_application_that_is_in_no_file(tmp_path: Path) -> None:
    class Local(Application):
        def compose(self) -> Flow:
            return [Here()]

    with pytest.raises(UsageError, match=r"Local is not in a module(.|\n)*save it and import it"):
        write_application(Local(), tmp_path / "image")

    class Broken(Application):
        def compose(self) -> Flow:
            return []

    with pytest.raises(UsageError, match="without operators"):
        write_application(Broken(), tmp_path / "image")
    assert not list(tmp_path.iterdir())


def test_grpc_is_spoken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "serving", lambda: [Package("trilobe", "1", ()), Package("grpcio", "1", ())])
    settings = tomllib.loads(images._settings("a", "image_classification", images.ports()))["serve"]
    assert (settings["grpc"], settings["grpc_port"]) == (True, 8001)
    monkeypatch.setattr(images, "serving", lambda: [Package("trilobe", "1", ())])
    assert "grpc" not in tomllib.loads(images._settings("a", "image_classification", images.ports()))["serve"]
