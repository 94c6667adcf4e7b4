"""What the image does when it starts: run the application, serve its model, show its manifests, hand out its files.

This file is the container's entry point (``python3 -m trilobe.infrastructure.packaging.entry``). For ``show`` and
``extract`` it needs Python alone, so that they work on a base that has nothing else.

==============================  =====================================================================
words                           what happens
==============================  =====================================================================
(none)                          the ``command`` of ``app.json`` takes this process over
``serve ...``                   the packaged model is served on all interfaces, port 8080, to who has a token
``show [app] [pkg]``            the manifests go to stdout
``extract``                     files are copied to what is mounted at ``/var/run/holoscan/export``
anything else                   appended to ``command``
==============================  =====================================================================

``serve`` is also how Amazon SageMaker starts a container that hosts a model, and port 8080 where it asks; or else the
port of ``SAGEMAKER_BIND_TO_PORT``, as the containers of one endpoint share their ports.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trilobe.errors import DataError, NotFoundError, StorageError, TrilobeError, UsageError

EXPORT = "var/run/holoscan/export"
_FOLDERS = {"HOLOSCAN_INPUT_PATH": "input", "HOLOSCAN_OUTPUT_PATH": "output"}
SAGEMAKER = ("SAGEMAKER_BIND_TO_PORT", "SAGEMAKER_SAFE_PORT_RANGE")  # by either a container knows that it is there


def arguments(command: str | Sequence[str]) -> list[str]:
    """A manifest's command as arguments; it may be a shell command, a list, or (as once written) a list in a string.

    >>> arguments("python3 -m app 'a b'") == arguments('["python3", "-m", "app", "a b"]')
    True
    """
    if isinstance(command, str) and command.startswith("["):
        try:
            command = json.loads(command)
        except ValueError as e:
            raise DataError(f"the command {command!r}", expected="a shell command, or a list of words") from e
    try:
        words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    except ValueError as e:
        raise DataError(f"the command {command!r}: {e}", expected="a shell command") from e
    if not words:
        raise DataError("an empty command", expected="a shell command")
    return words


def command_line(app: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """What to run: the manifest's command, in which folders that the environment names take the place of its own.

    >>> app = {"command": "app /var/holoscan/input/", "environment": {"HOLOSCAN_INPUT_PATH": "/var/holoscan/input/"}}
    >>> command_line(app, {"HOLOSCAN_INPUT_PATH": "/data"})
    ['app', '/data']
    """
    own = app.get("environment") or {}
    moved = {own[name]: environ[name] for name in _FOLDERS if name in own and environ.get(name)}
    words = [moved.get(word, word) for word in arguments(app.get("command") or "")]
    return [sys.executable, *words[1:]] if words[0] in ("python", "python3") else words


def show(which: Sequence[str], manifests: Mapping[str, Path]) -> str:
    """The manifests named in ``which`` (both where it is empty) as text.

    >>> show(["xyz"], {})
    Traceback (most recent call last):
    trilobe.errors.UsageError: show xyz; expected show, show app, or show pkg
    """
    if odd := [name for name in which if name not in ("app", "pkg")]:
        raise UsageError(f"show {odd[0]}", expected="show, show app, or show pkg")
    return "".join(_text(manifests[name]) for name in which or ("app", "pkg"))


def extract(sources: Mapping[str, Sequence[Path]], export: Path) -> list[Path]:
    """Copy the application's parts to ``export``: those of ``app``, ``config``, ``models``, ``docs`` that are folders
    there, or all of them where none is. Returns the folders filled.

    Raises :class:`~trilobe.errors.NotFoundError` where nothing is mounted there, and
    :class:`~trilobe.errors.StorageError` where one may not write.
    """
    if not export.is_dir():
        raise NotFoundError(
            f"nothing is mounted at {export}",
            expected="a folder of the host",
            hint="run it with: -v /a/folder:/var/run/holoscan/export",
        )
    wanted = [name for name in sources if (export / name).is_dir()] or list(sources)
    try:
        for name in wanted:
            (export / name).mkdir(exist_ok=True)
            for source in sources[name]:
                if source.is_dir():
                    shutil.copytree(source, export / name, dirs_exist_ok=True, symlinks=True)
                elif source.is_file():
                    shutil.copy2(source, export / name / source.name)
    except OSError as e:
        raise StorageError(f"could not write to {export}: {e}", expected="a folder the container may write to") from e
    return [export / name for name in wanted]


def serving(pkg: Mapping[str, Any], models: Path, work: Path, environ: Mapping[str, str]) -> list[str]:
    """The command that serves the packaged model, with the settings and the state in the folder ``work``.

    On SageMaker they are in its folder ``sagemaker``: HTTP alone is spoken, on the one port that the host names. Of the
    others that a container may take there (``SAGEMAKER_SAFE_PORT_RANGE``) none is needed, and no client reaches them.

    >>> pkg, environ = {"models": [{"path": "net"}]}, {"SAGEMAKER_BIND_TO_PORT": "8081"}
    >>> serving(pkg, Path("models"), Path("work"), environ)[3:]
    ['serve', 'models/net', '--project', 'work/sagemaker', '--port', '8081']
    """
    listed = pkg.get("models") or []
    if len(listed) != 1:
        raise UsageError(f"serve, in a package of {len(listed)} models", expected="exactly one")
    project = work / "sagemaker" if any(environ.get(name) for name in SAGEMAKER) else work
    port = environ.get(SAGEMAKER[0])
    words = [sys.executable, "-m", "trilobe", "serve", str(models / listed[0]["path"]), "--project", str(project)]
    return words + (["--port", port] if port else [])


def main(
    words: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
    run: Callable[[str, list[str]], Any] = os.execvp,
) -> int:
    """Do what ``words`` say (table above); ``root`` is where the image's files lie. Returns the exit code."""

    def place(variable: str, default: str) -> Path:
        return root / environ.get(f"HOLOSCAN_{variable}", default).lstrip("/")

    app, pkg = place("APP_MANIFEST_PATH", "etc/holoscan/app.json"), place("PKG_MANIFEST_PATH", "etc/holoscan/pkg.json")
    models, work = place("MODEL_PATH", "opt/holoscan/models"), place("WORKDIR", "var/holoscan")
    verb, rest = (words[0], list(words[1:])) if words else ("", [])
    try:
        if verb == "show":
            sys.stdout.write(show(rest, {"app": app, "pkg": pkg}))
            return 0
        if verb == "extract":
            code, config = place("APPLICATION", "opt/holoscan/app"), place("CONFIG_PATH", "var/holoscan/app.yaml")
            docs = place("DOCS", "opt/holoscan/docs")
            sources = {"app": [code], "config": [app, pkg, config], "models": [models], "docs": [docs]}
            sys.stdout.writelines(f"{folder}\n" for folder in extract(sources, root / EXPORT))
            return 0
        if verb == "serve":
            command = serving(_parsed(pkg), models, work, environ) + rest
        else:
            command = command_line(_parsed(app), environ) + list(words)
        _run(command, run)
        return 0
    except TrilobeError as e:
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
        return e.exit_code


def _run(command: list[str], run: Callable[[str, list[str]], Any]) -> None:
    try:
        run(command[0], command)
    except OSError as e:
        raise NotFoundError(f"{command[0]} cannot be run: {e.strerror}", expected="a program of the image") from e


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise NotFoundError(f"no manifest at {path} ({e})", expected="what packaging wrote there") from e


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError as e:
        raise DataError(f"{path} is no manifest ({e})", expected="what packaging wrote there") from e
    if not isinstance(found, dict):
        raise DataError(f"{path} is no manifest", expected="what packaging wrote there")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
