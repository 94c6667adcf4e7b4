"""From the start of a process to its first right answer: our server as a process and as an image, and five others.

``PEERS=FOLDER python run.py [--quick] [--rounds N] [--fresh] [--to FILE]``. The peers, the network, its answers and how
each is asked are those of ``serve-peers``. In each round every server is started once, in another order, and asked
every 10 ms until it answers rightly. Samples are kept in ``samples.local`` as they come: an interrupted run goes on.
``python run.py --table`` prints the table of result.json.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / name) for name in ("serve-peers", "serve-peers/peers", "")]

import common  # noqa: E402
import model  # noqa: E402
import net  # noqa: E402
import numpy as np  # noqa: E402
import ours  # noqa: E402
import run as peers  # noqa: E402  (that of serve-peers)
import wires  # noqa: E402
from serving import Call, Machine, free_port, running  # noqa: E402

from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle  # noqa: E402
from trilobe.infrastructure.packaging import image, oci  # noqa: E402
from trilobe.types import Bundle  # noqa: E402

LIBRARY, COMMAND, IMAGE = "trilobe, as a library", "trilobe serve", "trilobe, its image"
OURS = (LIBRARY, COMMAND, IMAGE)
AS_PEERS = ("MLServer, no batches", "MLServer, its defaults, JSON", "LitServe, no batches", "BentoML, no batches",
            "KServe SDK", "Triton, Python backend, no batches")  # fmt: skip
FIGURES = ("startup_s", "cpu_s", "pss_mb")


def _write_pixels(images: Any) -> Call:
    pixels = np.rint(images * 255).astype(np.uint8).reshape(-1, 28, 28, 1)
    tensor = {"name": "image", "shape": pixels.shape, "datatype": "UINT8", "data": pixels.ravel().tolist()}
    return Call(wires.INFER, json.dumps({"inputs": [tensor]}).encode(), {"Content-Type": "application/json"})


PIXELS = wires.Wire("v2 JSON, pixels", _write_pixels, wires.V2_JSON.read)


@dataclass(frozen=True)
class Runner:
    """A contender, the interpreter that runs it, its version, and where it keeps state: forgotten before each start."""

    contender: peers.Contender
    python: str
    version: str
    state: Path | None = None


# --- our own: a bundle of the image task, a project, an image ---------------------------------------------------------


def task_bundle(folder: Path) -> Bundle:
    """The small network as a bundle of the image task, from ``x`` to ``logits``: the softmax is the task's."""
    import onnx

    whole = onnx.load_model_from_string(model.small_cnn())
    graph = whole.graph
    graph.node.pop()
    graph.input[0].name = graph.node[0].input[0] = "x"
    graph.output[0].name = graph.node[-1].output[0] = "logits"
    onnx.checker.check_model(whole)
    files = dict.fromkeys(REQUIRED_FILES, b"{}") | {
        "model.onnx": whole.SerializeToString(deterministic=True),
        "preprocessing.json": json.dumps({"version": "resize.v1", "height": 28, "width": 28, "channels": 1}).encode(),
        "labels.json": json.dumps({"names": [str(i) for i in range(10)]}).encode(),
        "calibration.json": b'{"temperature": 1.0}',
    }
    return write_bundle(folder / "bundle", files, "cnn", {"project": "cnn", "task": "image_classification"})


def as_command(bundle: Bundle, folder: Path) -> Runner:
    """``trilobe serve`` of that bundle, in a project of its own."""
    project = folder / "project"
    project.mkdir()
    (project / "trilobe.toml").write_text('[project]\nname = "cnn"\ntask = "image_classification"\n')
    words = ("-m", "trilobe", "serve", str(bundle.path), "--project", str(project), "--port", "PORT")
    contender = peers.Contender(COMMAND, "", "trilobe", PIXELS, words)
    return Runner(contender, *peers.interpreter(contender), project / ".trilobe")


def as_image(bundle: Bundle, folder: Path) -> Runner:
    """The image of that bundle with all its packages, unpacked, its own command run as SageMaker does.

    Its base holds nothing: in place of a base's Python runs the one that this environment was made from.
    """
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    oci.write_image(folder / "base", [], {}, {}, tag="base", architecture=architecture)
    image.write_bundle(bundle, folder / "image", folder / "base", packages=True)
    manifest, config = oci.read_image(folder / "image", architecture)
    root = folder / "root"
    for layer in manifest["layers"]:
        with tarfile.open(folder / "image" / "blobs" / layer["digest"].replace(":", "/")) as tar:
            tar.extractall(root, filter="data")
    said = dict(line.split("=", 1) for line in config["config"]["Env"])
    placed = {k: ":".join(f"{root}{part}" for part in v.split(":")) for k, v in said.items() if v.startswith("/")}
    environment = {**said, **placed, "TRILOBE_OPEN": "1", "SAGEMAKER_BIND_TO_PORT": "PORT"}
    words = (*config["config"]["Entrypoint"][1:], "serve")
    contender = peers.Contender(IMAGE, "", "trilobe", PIXELS, words, tuple(environment.items()))
    python = str(Path(sys.base_prefix, "bin", "python3"))
    return Runner(contender, python, peers.interpreter(contender)[1], root / "var/holoscan/sagemaker/.trilobe")


def runners(folder: Path, quick: bool) -> tuple[list[Runner], dict[str, str]]:
    """Who takes part, and who does not and why."""
    bundle = task_bundle(folder)
    theirs = {c.name: c for c in peers.CONTENDERS}
    library = theirs[peers.OURS]
    chosen = [peers.Contender(LIBRARY, "", library.package, library.wire, library.words)]
    chosen += [] if quick else [theirs[name] for name in AS_PEERS]
    found = {c.name: peers.interpreter(c) for c in chosen}
    there = [Runner(c, *found[c.name]) for c in chosen if found[c.name][0]]
    skipped = {name: why for name, (python, why) in found.items() if not python}
    return [*there, as_command(bundle, folder), as_image(bundle, folder)], skipped


# --- samples --------------------------------------------------------------------------------------------------------


def start(runner: Runner, path: Path, truth: peers.Truth) -> dict[str, Any]:
    """Start one server; when it answers rightly, what that took; stop it."""
    if runner.state is not None:
        shutil.rmtree(runner.state, ignore_errors=True)
        runner.state.mkdir()
    one, port = runner.contender, free_port()
    words = {"MODEL": str(path), "BUNDLE": f"{path}.bundle", "PORT": str(port)}
    command = [runner.python, *(words.get(w, w) for w in one.words)]
    environment = {"PEER_MODEL": str(path), **{k: words.get(v, v) for k, v in one.environment}}
    machine, own = Machine.now(), time.process_time()
    with running(one.name, command, port, truth.answers(one), environment=environment) as server:
        spent, processes = server.cpu(), len(server.known)
        around = Machine.now().since(machine, spent + time.process_time() - own)
        found = {"startup_s": server.startup, "cpu_s": spent, "pss_mb": server.pss()}
        truth.check(one, port)
    return {**{k: round(v, 3) for k, v in found.items()}, "processes": processes, **around}


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """All rounds; what is in ``samples.local`` already is not measured again."""
    kept = HERE / ("quick.local" if chosen.quick else "samples.local")
    if chosen.fresh or chosen.quick:
        kept.unlink(missing_ok=True)
    samples = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "model.onnx"
        path.write_bytes(model.small_cnn())
        ours.make_bundle(Path(f"{path}.bundle"), model.small_cnn())
        images = (np.rint(model.images(32) * 255) / 255).astype(np.float32)  # as pixels, so that all see the same
        truth = peers.Truth(images, net.load(str(path))(images))
        wanted, skipped = runners(folder, chosen.quick)
        for runner in wanted:  # once unmeasured: from the disk to memory, and modules to bytecode
            if not all(any(s["name"] == runner.contender.name and s["round"] == r for s in samples)
                       for r in range(chosen.rounds)):  # fmt: skip
                start(runner, path, truth)
        for turn in range(chosen.rounds):
            for runner in random.Random(turn).sample(wanted, len(wanted)):
                name = runner.contender.name
                if any(s["name"] == name and s["round"] == turn for s in samples):
                    continue
                samples.append({"name": name, "round": turn, **start(runner, path, truth)})
                with kept.open("a") as out:
                    out.write(json.dumps(samples[-1]) + "\n")
                print(json.dumps(samples[-1]), file=sys.stderr)
    servers = {}
    for runner in wanted:
        of = sorted((s for s in samples if s["name"] == runner.contender.name), key=lambda s: s["round"])
        servers[runner.contender.name] = {
            **{key: middle([s[key] for s in of]) for key in FIGURES},
            "processes": statistics.median(s["processes"] for s in of),
            "foreign_cores": statistics.median(s["foreign_cores"] for s in of),
            "quiet": sum(s["quiet"] for s in of),
            "version": runner.version,
            "package": runner.contender.package,
        }
    return {"servers": servers, "against": against(samples), "skipped": skipped, "samples": samples}


# --- what it says ---------------------------------------------------------------------------------------------------


def middle(values: Sequence[float]) -> dict[str, float]:
    """The median, and the interval of order statistics that holds that of the population with at least 95%.

    Of fewer than six values no interval does: it is from the least to the greatest then.
    """
    ordered, n = sorted(values), len(values)
    tail, k = comb(n, 0) / 2**n, 0
    while 2 * (tail + comb(n, k + 1) / 2**n) <= 0.05:
        k += 1
        tail += comb(n, k) / 2**n
    return {"median": round(statistics.median(ordered), 3), "low": ordered[k], "high": ordered[n - 1 - k], "n": n}


def against(samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each figure of each server by that of our image in the same round (above 1: theirs is more)."""
    at = {(s["name"], s["round"]): s for s in samples}
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(s["name"] for s in samples):
        rounds = [r for n, r in at if n == name and (IMAGE, r) in at]
        if name != IMAGE:
            out[name] = {k: middle([round(at[name, r][k] / at[IMAGE, r][k], 3) for r in rounds]) for k in FIGURES}
    return out


def verdicts(servers: dict[str, Any]) -> dict[str, Any]:
    """What was asked of start-up and memory, of the image and of the command."""
    rows = {}
    for name in (COMMAND, IMAGE):
        for key, what, most in (("startup_s", "start-up (s)", 1.5), ("pss_mb", "memory (MB)", 120)):
            figure = servers[name][key]["median"]
            rows[f"{name}: {what}"] = {"figure": figure, "target": f"<= {most:g}", "met": figure <= most}
    return rows


def table(result: dict[str, Any]) -> str:
    """result.json as the tables of README.md."""

    def words(e: dict[str, float], digits: int = 2) -> str:
        return f"{e['median']:.{digits}f} [{e['low']:.{digits}f}, {e['high']:.{digits}f}]"

    rows = ["| server | version | s to the first right answer | CPU s until then | MB then | processes | "
            "others' cores meanwhile |", "|---" * 7 + "|"]  # fmt: skip
    for name, s in sorted(result["servers"].items(), key=lambda kv: kv[1]["cpu_s"]["median"]):
        cells = [name, s["version"], words(s["startup_s"]), words(s["cpu_s"]), words(s["pss_mb"], 0)]
        rows.append("| " + " | ".join([*cells, f"{s['processes']:g}", f"{s['foreign_cores']:.2f}"]) + " |")
    rows += ["", "Times our image, in the same round:", "", "| server | time | CPU | memory |", "|---" * 4 + "|"]
    times = sorted(result["against"].items(), key=lambda kv: kv[1]["cpu_s"]["median"])
    rows += [f"| {name} | {' | '.join(words(e[key]) for key in FIGURES)} |" for name, e in times]
    rows += [f"\nSkipped: {name} ({why})." for name, why in result["skipped"].items()]
    rows += ["", "| target | asked | measured | met |", "|---|---|---|---|"]
    rows += [
        f"| {key} | {v['target']} | {v['figure']:g} | {'yes' if v['met'] else '**no**'} |"
        for key, v in result["verdicts"].items()
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ours alone, one round, under a minute")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fresh", action="store_true", help="forget the samples kept so far")
    parser.add_argument("--table", action="store_true", help="print the table of result.json")
    parser.add_argument("--to", type=Path, help="write the result to this file instead of result.json")
    chosen = parser.parse_args()
    if chosen.table:
        print(table(json.loads((chosen.to or HERE / "result.json").read_text("utf-8"))))
        return
    chosen.rounds = 1 if chosen.quick else chosen.rounds
    found = measure(chosen)
    said = verdicts(found["servers"])
    others = {name: e for name, e in found["against"].items() if name not in OURS}
    nearest = min(others, key=lambda name: others[name]["startup_s"]["median"], default="")
    result = {
        "claim": "Our server, as a process and as an image, answers sooner after its start than others, in less memory",
        **found,
        "verdicts": said,
        "peers": {s["package"]: s["version"] for s in found["servers"].values() if s["package"] != "trilobe"},
        "ratio": others[nearest]["startup_s"]["median"] if nearest else None,
        "ratio_of": f"time from start to the first right answer, the soonest peer ({nearest}) over our image",
        "target": "; ".join(f"{k} {v['target']}" for k, v in said.items()),
        "met": all(v["met"] for v in said.values()),
        "versions": common.versions("numpy", "onnxruntime", "httptools"),
    }
    print(table(result))
    common.keep(__file__, result, chosen)


if __name__ == "__main__":
    main()
