"""What the benchmarks share: the command line, where peers live, intervals, versions, and the one way a result is kept.

Peers pin older libraries than Trilobe, so each is measured in whatever interpreter has it: this one, those given with
``--peer-python``, or those in ``TRILOBE_PEER_PYTHON``. Those interpreters import this file too, so Trilobe and numpy
are imported only inside the functions that need them.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUIET = os.environ | {"DO_NOT_TRACK": "1", "WHYLOGS_NO_ANALYTICS": "True", "OMP_NUM_THREADS": "1"}


def arguments(doc: str | None) -> argparse.Namespace:
    """``--quick``, ``--to``, ``--peer-python``; and hidden ``--child``: a script calls itself in a peer's process."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute; result.json stays as it is")
    parser.add_argument("--to", type=Path, help="write the result to this file instead of result.json")
    parser.add_argument("--peer-python", action="append", default=[], help="an interpreter that has a peer")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def data(name: str) -> Path:
    """A folder of real data, in ``TRILOBE_DATA``; it may be absent."""
    return Path(os.environ.get("TRILOBE_DATA", "data")) / name


def needed(*names: str) -> None:
    """End with a clear word where a data set is absent: what is needed, and how it is found."""
    if absent := [n for n in names if not data(n).exists()]:
        print(f"not run: no {', '.join(absent)} in {data('').resolve()}; TRILOBE_DATA names the folder of data sets")
        sys.exit(0)


def find_peer(module: str, given: Sequence[str], package: str = "") -> tuple[str, str]:
    """The first interpreter that can import ``module``, and the version of its package; ("", "") where none can."""
    more = [p for p in os.environ.get("TRILOBE_PEER_PYTHON", "").split(os.pathsep) if p]
    ask = f"import {module}; from importlib.metadata import version; print(version({package or module!r}))"
    for python in [sys.executable, *given, *more]:
        known = subprocess.run([python, "-W", "ignore", "-c", ask], capture_output=True, text=True, env=QUIET)
        if known.returncode == 0:
            return python, known.stdout.split()[-1]
    return "", ""


def ask_child(python: str, script: str, *words: str) -> Any:
    """What ``script --child words`` prints as its last line of JSON when ``python`` runs it."""
    command = [python, "-W", "ignore", script, "--child", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=QUIET, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def estimate(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """The mean of ``values`` and its 95% bootstrap interval: ``{"mean", "low", "high", "n"}``."""
    import numpy as np

    from trilobe.statistics import bootstrap_mean

    low, high = bootstrap_mean(values)
    rounded = {k: round(float(v), digits) for k, v in (("mean", np.mean(values)), ("low", low), ("high", high))}
    return rounded | {"n": len(values)}


def words(e: dict[str, float], scale: float = 1, digits: int = 1, unit: str = "") -> str:
    """An estimate as people read it: ``97.1% [96.6%, 97.5%]`` with ``scale=100, unit="%"``."""
    mean, low, high = (f"{scale * e[k]:.{digits}f}{unit}" for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def versions(*packages: str) -> dict[str, str]:
    """Of Trilobe, Python and the packages named."""
    from importlib.metadata import version

    import trilobe

    return {"trilobe": trilobe.__version__, "python": platform.python_version()} | {p: version(p) for p in packages}


def machine() -> str:
    """Cores and processor, in one line."""
    info = Path("/proc/cpuinfo")
    rows = (line.split(":", 1) for line in (info.read_text() if info.exists() else "").splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in rows}
    name = known.get("model name", platform.processor() or platform.machine())
    detail = [f"{word} {known[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in known]
    return f"{os.cpu_count()} cores, {', '.join([name, *detail])}"


def keep(script: str, result: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Add machine and date and write the result: beside ``script``, or to ``--to``; a quick one only to ``--to``."""
    whole = result | {"machine": machine(), "quick": chosen.quick, "date": datetime.date.today().isoformat()}
    path = chosen.to or (None if chosen.quick else Path(script).parent / "result.json")
    if path:
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"ratio {result['ratio']}, met: {result['met']}; peers: {result['peers']}", file=sys.stderr)
