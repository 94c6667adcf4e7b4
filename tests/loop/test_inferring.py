"""``infer``: the endpoint's numbers without the endpoint, on whatever files there are, and again after a crash."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trilobe import loop
from trilobe.errors import BundleError, DataError, NotFoundError, StorageError, StoreBusy, UsageError
from trilobe.infrastructure.bundle import REQUIRED_FILES, write_bundle
from trilobe.infrastructure.client import Client
from trilobe.types import Bundle

WORDS = ["we", "fly", "from", "New", "York", "to", "Rome", "🙂", "on", "Monday", ",", "or", "v2.3", "of", "Zürich"]
SPECS: dict[str, dict[str, Any]] = {
    "image_classification": {"version": "resize.v1", "height": 8, "width": 8, "channels": 1},
    "text_classification": {"version": "words.v1", "buckets": 1024, "n_chars": 16, "max_tokens": 100},
    "entity_recognition": {"version": "words.v1", "buckets": 1024, "n_chars": 16, "max_tokens": 40},
}
NAMES = {
    "image_classification": ["bar", "cross", "dot"],
    "text_classification": ["good", "bad"],
    "entity_recognition": ["O", "B-CITY", "I-CITY", "B-DAY", "I-DAY"],
}


def made(task: str, folder: Path) -> Bundle:
    """A bundle with a network that has learned nothing: its numbers are as good as any."""
    import torch

    from trilobe.algorithms.export import to_onnx
    from trilobe.algorithms.weights import to_safetensors
    from trilobe.tasks import get
    from trilobe.types import LabelSpace

    space = LabelSpace(tuple(NAMES[task]), scheme="BIO" if task == "entity_recognition" else "")
    module = get(task).network(SPECS[task], space, 4, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for p in module.parameters():  # far from the beginning, where all classes are alike
            p.data += torch.randn_like(p) * 0.3
    sample = np.ones((1, 1, 8, 8) if task == "image_classification" else (1, 3, 17), np.float32)
    files = dict.fromkeys(REQUIRED_FILES, b"{}") | {
        "weights.safetensors": to_safetensors(module.state_dict()),
        "model.onnx": to_onnx(module, sample, free=get(task).free_axes),
        "preprocessing.json": json.dumps(SPECS[task]).encode(),
        "labels.json": json.dumps({"names": space.names, "parents": {}, "scheme": space.scheme}).encode(),
        "calibration.json": b'{"temperature": 1.3}',
    }
    return write_bundle(folder, files, "m1", {"task": task, "project": "p"})


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {task: made(task, folder / task) for task in SPECS}


@pytest.fixture
def images(bundles: dict[str, Bundle]) -> Path:
    return bundles["image_classification"].path


@pytest.fixture
def texts(bundles: dict[str, Bundle]) -> Path:
    return bundles["text_classification"].path


@pytest.fixture
def entities(bundles: dict[str, Bundle]) -> Path:
    return bundles["entity_recognition"].path


def sentences(n: int, seed: int = 0) -> list[str]:
    """Texts of very unequal length."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, min(90, 1 + int(rng.lognormal(2, 1))))) for _ in range(n)]


def pixels(n: int, size: tuple[int, ...] = (9, 7), seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, *size), dtype=np.uint8))


def photos(folder: Path, n: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for i, p in enumerate(pixels(n, seed=seed)):
        Image.fromarray(p).save(folder / f"{i:03}.png")
    return folder


def rows(out: Path) -> list[dict[str, Any]]:
    """All answers, in order."""
    lines = b"".join(part.read_bytes() for part in sorted(out.glob("part-*.jsonl"))).split(b"\n")
    return [json.loads(line) for line in lines if line]


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a result, but for the lock."""
    return {p.name: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != "run.lock"}


def failed(out: Path) -> dict[str, str]:
    lines = (out / "failed.jsonl").read_text("utf-8").splitlines()
    return {row["name"]: row["problem"] for row in map(json.loads, lines)}


# --- the same numbers as the endpoint


@pytest.mark.slow
@pytest.mark.parametrize("task", SPECS)
def test_the_same_numbers_as_the_endpoint(task: str, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Alone, in one request, in requests that the server joins, in a file, with any batch: bit for bit."""
    (tmp_path / "in").mkdir()
    items: list[Any]
    if task == "image_classification":
        items = [p[:, :, None] for p in pixels(40)]
        np.save(tmp_path / "in" / "a.npy", np.stack(items))
        sent = [{"image": i[None]} for i in items]
    else:
        items = sentences(40)
        lines = "".join(json.dumps({"text": t}) + "\n" for t in items)
        (tmp_path / "in" / "a.jsonl").write_text(lines, "utf-8")
        sent = [{"text": np.array([t.encode()], dtype=object)} for t in items]
    for batch in (1, 7, 32):
        loop.infer(bundles[task], tmp_path / "in", tmp_path / f"out-{batch}", batch=batch)
    assert contents(tmp_path / "out-1") == contents(tmp_path / "out-7") == contents(tmp_path / "out-32")
    told = rows(tmp_path / "out-7")
    want = np.array([row["proba"] for row in told])
    assert want.shape[0] == 40 and len({tuple(row) for row in want}) > 30
    labels = ["CITY", "DAY"] if task == "entity_recognition" else NAMES[task]
    loop.init(tmp_path / "p", labels=labels, task=task)
    endpoint = loop.serve(str(bundles[task].path), tmp_path / "p", background=True)
    try:

        def ask(inputs: Any) -> dict[str, np.ndarray]:
            with Client(endpoint.url, endpoint.name) as client:
                return client.call(inputs)

        with ThreadPoolExecutor(8) as many:  # the server computes together what comes together
            alone = list(many.map(ask, sent))
        together = ask({name: np.concatenate([s[name] for s in sent]) for name in sent[0]})
        first = raw(endpoint.url, endpoint.name, sent[0])
    finally:
        loop.serve(project=tmp_path / "p", stop=True)
    for proba in (together["proba"], np.concatenate([a["proba"] for a in alone])):
        assert proba.dtype == np.float32 and np.array_equal(proba, want.astype(np.float32))
        assert np.array_equal(proba.astype(np.float64), want), "nothing was rounded on the way"
    part = next((tmp_path / "out-7").glob("part-*")).read_bytes()
    assert first["proba"] in part.split(b"\n")[0], "the same digits"
    if task == "entity_recognition":
        assert sum(len(row["entities"]) for row in told) > 40
        for row, answer, text in zip(part.split(b"\n"), alone, items, strict=False):
            assert answer["entities"][0] in row
            assert all(text[e["start"] : e["end"]] == e["text"] for e in json.loads(row)["entities"])
    else:
        assert [row["label"] for row in told] == [labels[i] for i in want.argmax(axis=1)]
        assert [row["confidence"] for row in told] == want.max(axis=1).tolist()


def test_a_network_whose_rows_depend_on_their_company_computes_them_alone(images: Path, tmp_path: Path) -> None:
    """A network of the user's own may take the mean over a batch; what is said of an image is still its own."""
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])
    y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["all"], keepdims=1, axes=[0, 1, 2, 3]),
        helper.make_node("Mul", ["x", "all"], ["shaded"]),
        helper.make_node("Flatten", ["shaded"], ["flat"]),
        helper.make_node("Slice", ["flat", "from", "to", "axis"], ["logits"]),
    ]
    whole = [helper.make_tensor(n, TensorProto.INT64, [1], [v]) for n, v in (("from", 0), ("to", 3), ("axis", 1))]
    graph = helper.make_graph(nodes, "g", [x], [y], whole)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    files = {name: (images / name).read_bytes() for name in REQUIRED_FILES} | {"model.onnx": model}
    bundle = write_bundle(tmp_path / "own", files, "m2", {"task": "image_classification", "project": "p"})
    np.save(tmp_path / "a.npy", np.stack(pixels(9, (8, 8, 1))))
    for batch in (1, 4):
        loop.infer(bundle, tmp_path / "a.npy", tmp_path / f"out-{batch}", batch=batch)
    assert contents(tmp_path / "out-1") == contents(tmp_path / "out-4")


def raw(url: str, name: str, inputs: dict[str, np.ndarray]) -> dict[str, bytes]:
    """The numbers of a JSON answer as they stand in it."""
    said = [
        {"name": k, "shape": v.shape, "datatype": "BYTES" if v.dtype == object else "UINT8",
         "data": [e.decode() for e in v] if v.dtype == object else v.ravel().tolist()}
        for k, v in inputs.items()
    ]  # fmt: skip
    body = json.dumps({"inputs": said}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v2/models/{name}/infer", body)) as reply:
        text = reply.read()
    found = {}
    for output in json.loads(text)["outputs"]:
        data = json.dumps(output["data"], separators=(",", ":")).encode()
        found[output["name"]] = data if data in text else text  # as it came, not as Python would write it
    return found


ALONE = """
import sys
import trilobe
told = trilobe.infer(sys.argv[1], sys.argv[2], sys.argv[3])
heavy = {"torch", "transformers", "onnx", "onnxscript", "sklearn"} & set(sys.modules)
print(told.n, told.n_failed, sorted(heavy))
"""


def test_without_torch_and_without_a_project(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    photos(tmp_path / "in", 3)
    (tmp_path / "t.jsonl").write_text('{"text": "to Rome"}\n')
    for task, source in (("image_classification", "in"), ("text_classification", "t.jsonl"),
                         ("entity_recognition", "t.jsonl")):  # fmt: skip
        command = [sys.executable, "-c", ALONE, bundles[task].path, source, task]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout == f"{3 if source == 'in' else 1} 0 []\n"


# --- what is read


def test_images_of_every_kind(images: Path, tmp_path: Path) -> None:
    """Files, a table of pixels and an archive of the same pictures say the same."""
    folder = photos(tmp_path / "in", 5)
    direct = loop.infer(images, folder, tmp_path / "direct")
    assert (direct.n, direct.n_failed, direct.n_kept, direct.path) == (5, 0, 0, tmp_path / "direct")
    want = {row["name"]: row["proba"] for row in rows(tmp_path / "direct")}
    assert list(want) == [f"{i:03}.png" for i in range(5)]
    arrays = np.stack([p[:, :, None] for p in pixels(5)])
    (tmp_path / "shards").mkdir()
    np.save(tmp_path / "shards" / "a.npy", arrays[:2])
    np.savez(tmp_path / "shards" / "b.npz", image=arrays[2:], other=np.zeros(9))
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        with tarfile.open(tmp_path / "shards" / f"c{suffix}", mode) as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, f"x/{path.name}")
                tar.addfile(tarfile.TarInfo(f"x/{path.stem}.cls"))
    loop.infer(images, tmp_path / "shards", tmp_path / "out", batch=2)
    found = {row["name"]: row["proba"] for row in rows(tmp_path / "out")}
    values = list(want.values())
    assert found == {
        **{f"a.npy#{i + 1}": values[i] for i in range(2)},
        **{f"b.npz#{i + 1}": values[i + 2] for i in range(3)},
        **{f"c.tar/x/{name}": value for name, value in want.items()},
        **{f"c.tar.gz/x/{name}": value for name, value in want.items()},
    }


def test_images_of_other_sizes_and_colors(images: Path, tmp_path: Path) -> None:
    """As in training: what is gray stays gray, color becomes it, every size is resized."""
    from trilobe.infrastructure.bundle import open_bundle
    from trilobe.statistics import softmax
    from trilobe.tasks import get
    from trilobe.tasks.image_classification.data import decode

    (tmp_path / "in").mkdir()
    sizes: list[tuple[int, ...]] = [(9, 7), (30, 30, 3), (9, 7), (1, 1), (5, 60, 3), (9, 7, 4)]
    for i, size in enumerate(sizes):
        Image.fromarray(pixels(1, size, seed=i)[0]).save(tmp_path / "in" / f"{i}.png")
    loop.infer(images, tmp_path / "in", tmp_path / "out")
    task, bundle = get("image_classification"), open_bundle(images)
    run = dict(task.servable(bundle).pipeline.steps)["model"]
    for i, row in enumerate(rows(tmp_path / "out")):
        x = task.encode([decode((tmp_path / "in" / f"{i}.png").read_bytes())], SPECS["image_classification"])
        proba = softmax(run({"x": x})["logits"], 1.3).astype(np.float32)
        assert row["proba"] == proba[0].tolist()


def test_texts_of_every_kind(texts: Path, tmp_path: Path) -> None:
    said = sentences(6)
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    for i, text in enumerate(said):
        (source / "deep" / f"{i}.txt").write_text(text, "utf-8")
    with (source / "t.csv").open("w", encoding="utf-8-sig", newline="") as f:
        csv.writer(f).writerows([["Id", "Text", "x"], *([f"id-{i}", t, "1"] for i, t in enumerate(said))])
    with (source / "t.tsv").open("w", encoding="utf-8", newline="") as f:
        csv.writer(f, delimiter="\t").writerows([["text"], *([t] for t in said)])
    lines = [json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(said)]
    (source / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    np.save(source / "t.npy", np.array(said))
    with tarfile.open(source / "t.tar", "w") as tar:
        tar.add(source / "deep", "deep")
    (source / "readme.md").write_text("left alone")
    told = loop.infer(texts, source, tmp_path / "out")
    assert (told.n, told.n_failed) == (36, 0)
    found = rows(tmp_path / "out")
    by_name = {row["name"]: row for row in found}
    assert list(by_name)[::35] == ["t.csv#1", "deep/5.txt"] and len(by_name) == 36
    assert by_name["t.csv#2"]["id"] == "id-1" and by_name["t.jsonl#3"]["id"] == 1 and "id" not in by_name["t.tsv#1"]
    for i in range(6):
        others = (f"deep/{i}.txt", f"t.csv#{i + 1}", f"t.tsv#{i + 1}", f"t.jsonl#{2 * i + 1}", f"t.npy#{i + 1}",
                  f"t.tar/deep/{i}.txt")  # fmt: skip
        assert len({tuple(by_name[name]["proba"]) for name in others}) == 1


def test_another_column_and_lines(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,message\n1,to Rome\n")
    assert loop.infer(texts, tmp_path / "t.csv", tmp_path / "o1", column="message").n == 1
    (tmp_path / "d.txt").write_bytes("one\r\n\n  \nfour 🙂".encode())
    loop.infer(texts, tmp_path / "d.txt", tmp_path / "o2", lines=True)
    assert [row["name"] for row in rows(tmp_path / "o2")] == ["d.txt#1", "d.txt#4"]
    loop.infer(texts, tmp_path / "d.txt", tmp_path / "o3")
    assert [row["name"] for row in rows(tmp_path / "o3")] == ["d.txt"]


def test_a_long_document_counts_from_its_beginning(entities: Path, tmp_path: Path) -> None:
    text = ". ".join(sentences(30))
    (tmp_path / "long.txt").write_text(text, "utf-8")
    loop.infer(entities, tmp_path / "long.txt", tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert len(row["entities"]) > 10 and all(text[e["start"] : e["end"]] == e["text"] for e in row["entities"])


def test_formats(texts: Path, entities: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "to Rome, \\"again\\"", "id": "a,b"}\n{"text": "no"}\n')
    loop.infer(texts, tmp_path / "t.jsonl", tmp_path / "csv", format="csv")
    loop.infer(texts, tmp_path / "t.jsonl", tmp_path / "jsonl")
    (part,) = (tmp_path / "csv").glob("part-*.csv")
    table = list(csv.DictReader(io.StringIO(part.read_text("utf-8"))))
    assert list(table[0]) == ["name", "id", "label", "confidence", "proba.good", "proba.bad"]
    for row, other in zip(table, rows(tmp_path / "jsonl"), strict=True):
        assert [float(row["proba.good"]), float(row["proba.bad"])] == other["proba"]
        assert (row["name"], row["id"], row["label"]) == (other["name"], other.get("id", ""), other["label"])
    loop.infer(entities, tmp_path / "t.jsonl", tmp_path / "spans", format="csv")
    (part,) = (tmp_path / "spans").glob("part-*.csv")
    loop.infer(entities, tmp_path / "t.jsonl", tmp_path / "spans-jsonl")
    table = list(csv.DictReader(io.StringIO(part.read_text("utf-8"))))
    for row, other in zip(table, rows(tmp_path / "spans-jsonl"), strict=True):
        assert json.loads(row["entities"]) == other["entities"]
    with pytest.raises(UsageError, match="finds no entities"):
        loop.infer(texts, tmp_path / "t.jsonl", tmp_path / "x", format="comprehend")


# --- what cannot be read


def test_what_cannot_be_read_is_told_and_stops_nothing(images: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 4)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:60])
    (folder / "gone.png").symlink_to(folder / "001.png")
    np.save(folder / "floats.npy", np.zeros((2, 8, 8, 1)))
    np.savez(folder / "other.npz", x=np.zeros(3))
    np.savez(folder / "uneven.npz", image=np.uint8(3))
    (folder / "pickle.npy").write_bytes(b"\x80\x04garbage")
    with tarfile.open(folder / "t.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(folder / "000.png", "a.png")
        tar.add(folder / "001.png", "b.png")
    whole = (folder / "t.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[:560])
    (folder / "short.tar").write_bytes(whole[:1024])
    (folder / "no.tar").write_bytes(b"x" * 600)
    told = loop.infer(images, folder, tmp_path / "out")
    why = failed(tmp_path / "out")
    assert {name: text.split(";")[0][:20] for name, text in why.items()}.keys() == {
        "empty.png", "text.png", "cut.png", "floats.npy#1", "floats.npy#2", "other.npz", "uneven.npz", "pickle.npy",
        "cut.tar", "short.tar", "no.tar",
    }  # fmt: skip
    assert why["empty.png"] == "an empty file" and why["text.png"].startswith("not an image")
    assert "float64" in why["floats.npy#1"] and "image" not in why["other.npz"] and "pickle" in why["pickle.npy"]
    good = {row["name"] for row in rows(tmp_path / "out")}
    assert good == {"000.png", "001.png", "002.png", "003.png", "gone.png", "t.tar/a.png", "t.tar/b.png",
                    "short.tar/a.png"}  # fmt: skip
    assert (told.n, told.n_failed) == (len(good) + len(why), len(why))


def test_rows_that_cannot_be_read(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = [b'{"text": "fine"}', b"{", b'{"other": 1}', b'{"text": 7}', b'["text"]', b'{"text": "\xff"}',
             b'{"text": " "}', b'{"text": "a\\u0000b"}', b"[" * 100_000, b'{"text": "\\ud800"}',
             b'{"text": "last"}']  # fmt: skip
    (tmp_path / "in" / "a.jsonl").write_bytes(b"\n".join(lines))
    table = [b"text,x", b"fine,1", b"short", b"\xff,1", b'"a"b,2', b" ,3", b'"two\nlines",4', b'"open,5\nnever closed']
    (tmp_path / "in" / "b.csv").write_bytes(b"\n".join(table))
    (tmp_path / "in" / "c.csv").write_text("a,b\n1,2\n")
    (tmp_path / "in" / "d.csv").write_text("")
    told = loop.infer(texts, tmp_path / "in", tmp_path / "out")
    assert [row["name"] for row in rows(tmp_path / "out")] == ["a.jsonl#1", "a.jsonl#11", "b.csv#1", "b.csv#6"]
    why = failed(tmp_path / "out")
    assert set(why) == {
        *(f"a.jsonl#{i}" for i in range(2, 11)),
        *(f"b.csv#{i}" for i in (2, 3, 4, 5, 7)),
        "c.csv",
        "d.csv",
    }
    assert why["b.csv#3"] == "line 4 is not UTF-8" and "line 3 has 1 cells" in why["b.csv#2"]
    assert told.n == 4 + len(why)
    with pytest.raises(DataError, match=r"a.jsonl#2: not JSON"):
        loop.infer(texts, tmp_path / "in", tmp_path / "strict", strict=True)
    assert not list((tmp_path / "strict").glob("part-*"))


def test_nothing_can_be_read(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 1 inputs could be answered(.|\n)*failed.jsonl"):
        loop.infer(texts, tmp_path / "t.txt", tmp_path / "out")
    assert failed(tmp_path / "out") == {"t.txt": "an empty text"}
    (tmp_path / "t.txt").write_text("now")
    assert loop.infer(texts, tmp_path / "t.txt", tmp_path / "out").n_failed == 0
    assert not (tmp_path / "out" / "failed.jsonl").exists(), "what failed before does no longer"


def test_one_bad_row_of_a_batch_spoils_no_other(images: Path, tmp_path: Path) -> None:
    """Where the pipeline refuses a batch, its rows are tried alone."""
    from trilobe.errors import ServeError
    from trilobe.infrastructure.batch import results
    from trilobe.infrastructure.pipeline import Pipeline, Servable, TensorSpec
    from trilobe.infrastructure.records import Record

    def root(data: Any) -> Any:
        if (data["x"] < 0).any():
            raise ValueError("negative")
        return {"y": np.sqrt(data["x"])}

    x, y = TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,))
    servable = Servable(Pipeline([("root", root)]), (x,), (y,), {"x": np.ones(1, np.float32)})
    records = [Record("f", {"x": np.float32(v)}, i) for i, v in enumerate((4, -1, float("nan"), 9))]
    said = list(results(servable, records, lambda r: r.value, batch=4))
    assert [s["y"].item() for s in (said[0][1], said[3][1])] == [2.0, 3.0]
    assert isinstance(said[1][1], ServeError) and "negative" in said[1][1].problem
    assert isinstance(said[2][1], DataError) and "not finite" in said[2][1].problem


@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        ({"source": "nowhere"}, NotFoundError, "no file or folder"),
        ({"source": "readme.md"}, NotFoundError, "nothing in .* can be read"),
        ({"source": "."}, NotFoundError, "nothing in .* can be read"),
        ({"source": ""}, UsageError, "no source was named; expected a path, or one in HOLOSCAN_INPUT_PATH"),
        ({"out": "."}, UsageError, "which is read"),
        ({"batch": 0}, UsageError, "batch = 0"),
        ({"lines": True}, UsageError, "lines of text files"),
        ({"bundle": "abc"}, NotFoundError, "no bundle 'abc'.*no trilobe.toml"),
        ({"bundle": ""}, NotFoundError, "no bundle was named, and no trilobe.toml"),
        ({"bundle": "empty"}, BundleError, "there is no bundle at empty"),
    ],
)
def test_calls_that_cannot_work(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readme.md").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=problem):
        loop.infer(**{"bundle": images, "source": ".", "out": "out", **arguments})
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_an_unknown_task(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", dict.fromkeys(REQUIRED_FILES, b"{}"), "m", {"task": "music"})
    with pytest.raises(BundleError, match="for the task 'music'"):
        loop.infer(bundle, tmp_path, tmp_path / "out")


def test_where_one_cannot_write(images: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file cannot be made"):
        loop.infer(images, folder, tmp_path / "file")


# --- again, after a crash, beside others


def test_again_only_what_is_missing(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilobe.loop.inferring.PART", 4)
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(10)))
    (source / "b.jsonl").write_text('{"text": "to Rome"}\n{}\n')
    first = loop.infer(texts, source, out)
    assert (first.n, first.n_failed, first.n_kept) == (12, 1, 0)
    before = contents(out)
    parts = sorted(out.glob("part-*"))
    assert [len(p.read_text().splitlines()) for p in parts] == [4, 4, 2, 1]
    again = loop.infer(texts, source, out)
    assert (again.n, again.n_failed, again.n_kept) == (12, 1, 12) and contents(out) == before
    parts[1].unlink()
    (out / "failed.jsonl").unlink()
    (out / f"{parts[0].name}.0123abcd.part").write_text("half")
    once_more = loop.infer(texts, source, out)
    assert (once_more.n, once_more.n_failed, once_more.n_kept) == (12, 1, 8) and contents(out) == before


def test_inputs_that_changed(texts: Path, tmp_path: Path) -> None:
    """Parts of inputs that are no longer there go; what else lies in the folder stays."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.jsonl").write_text(json.dumps({"text": f"text {i}"}))
    loop.infer(texts, source, out)
    (out / "mine.txt").write_text("mine")
    before = contents(out)
    (source / "1.jsonl").write_text(json.dumps({"text": "another"}))
    told = loop.infer(texts, source, out)
    assert (told.n, told.n_kept) == (3, 2)
    after = contents(out)
    assert len(after) == len(before) and after["mine.txt"] == b"mine" and len(set(before) - set(after)) == 1
    (source / "2.jsonl").unlink()
    loop.infer(texts, source, out)
    assert len(list(out.glob("part-*"))) == 2


def test_other_results_are_not_overwritten(images: Path, texts: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 2)
    (folder / "a.txt").write_text("to Rome")
    loop.infer(images, folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    for arguments, problem in (
        ({"bundle": texts}, "bundle = "),
        ({"source": tmp_path / "in" / "000.png"}, "source = "),
        ({"format": "csv"}, "format = 'jsonl', not 'csv'"),
    ):
        with pytest.raises(UsageError, match=f"results of another run: {problem}"):
            loop.infer(**{"bundle": images, "source": folder, "out": tmp_path / "out", **arguments})
    (tmp_path / "out" / ".infer" / "settings.json").write_text("{")
    with pytest.raises(UsageError, match=r"settings.json is damaged"):
        loop.infer(images, folder, tmp_path / "out")
    (tmp_path / "out" / ".infer" / "settings.json").write_bytes(before["settings.json"])
    assert contents(tmp_path / "out") == before


def test_results_inside_what_is_read(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "to Rome"}\n')
    for _ in range(2):
        assert loop.infer(texts, tmp_path, tmp_path / "out").n == 1


SLOW = """
import sys, time
from trilobe import loop
from trilobe.infrastructure.pipeline import Servable
import trilobe.loop.inferring as inferring
inferring.PART = 5
run = Servable.run
def slow(self, inputs):
    time.sleep(0.02)
    return run(self, inputs)
Servable.run = slow
print("ready", flush=True)
told = loop.infer(sys.argv[1], sys.argv[2], sys.argv[3], batch=2)
print(told.n, told.n_kept)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilobe.loop.inferring.PART", 5)
    source = tmp_path / "in"
    source.mkdir()
    lines = [json.dumps({"text": t}) for t in sentences(120)]
    lines[::13] = ["{}"] * len(lines[::13])
    (source / "a.jsonl").write_text("\n".join(lines))
    loop.infer(texts, source, tmp_path / "whole")
    want = contents(tmp_path / "whole")
    killed = 0
    for i, after in enumerate((0.02, 0.06, 0.1, 0.15, 0.2)):
        out = tmp_path / f"out-{i}"
        command = [sys.executable, "-c", SLOW, texts, source, out]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout and child.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 20
            while not list(out.glob("part-*")) and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(after)
            child.send_signal(signal.SIGKILL)
        there = len(list(out.glob("part-*.jsonl")))
        killed += there < 24
        told = loop.infer(texts, source, out)
        assert told.n == 120 and told.n_kept == 5 * there and contents(out) == want
    assert killed >= 3


def test_a_second_process_is_refused(texts: Path, tmp_path: Path) -> None:
    from trilobe.infrastructure.batch import writing

    (tmp_path / "a.jsonl").write_text('{"text": "to Rome"}\n')
    with writing(tmp_path / "out", ".jsonl", {}), pytest.raises(StoreBusy, match="'trilobe infer' is running"):
        loop.infer(texts, tmp_path / "a.jsonl", tmp_path / "out")


FULL = """
import resource, sys
from trilobe import loop
from trilobe.errors import DiskFull
import trilobe.loop.inferring as inferring
inferring.PART = 2
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
try:
    loop.infer(sys.argv[1], sys.argv[2], sys.argv[3])
except DiskFull as e:
    print(e)
"""


def test_a_full_disk(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": "to Rome", "id": i}) for i in range(5)]
    lines[3] = json.dumps({"text": "to Rome", "id": "x" * 3000})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-c", FULL, texts, tmp_path / "a.jsonl", tmp_path / "out", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no space left to write" in done.stdout and "next:" in done.stdout
    assert len(list((tmp_path / "out").glob("part-*"))) == 1, "what was whole is kept"
    monkeypatch.setattr("trilobe.loop.inferring.PART", 2)
    assert loop.infer(texts, tmp_path / "a.jsonl", tmp_path / "out").n_kept == 2


def test_memory_does_not_grow_with_the_input(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilobe.loop.inferring.PART", 50)

    def peak(n: int) -> int:
        path = tmp_path / f"{n}.jsonl"
        path.write_text((json.dumps({"text": "to Rome " * 40, "more": "x" * 8000}) + "\n") * n)
        tracemalloc.start()
        loop.infer(texts, path, tmp_path / f"out-{n}")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    small, large = peak(100), peak(600)
    assert large < 1.3 * small + 2**18, f"{small:,} bytes for 100 inputs, {large:,} for 600"


# --- the command


def test_the_command(images: Path, tmp_path: Path, trilobe: Any) -> None:
    folder = photos(tmp_path / "in", 3)
    (folder / "no.png").write_bytes(b"no")
    said = trilobe("infer", images, folder, tmp_path / "out", "--batch", 2, "--json")
    assert said.code == 0 and {k: said.json[k] for k in ("n", "n_failed", "n_kept")} == {
        "n": 4,
        "n_failed": 1,
        "n_kept": 0,
    }
    said = trilobe("infer", images, folder, tmp_path / "strict", "--strict", "--json")
    assert said.code == 1 and said.json["problem"].startswith("no.png: not an image")
    said = trilobe("infer", images, folder, tmp_path / "x", "--format", "xml")
    assert said.code == 2


def test_by_id_in_a_project(tiny: Any, images: Path, tmp_path: Path, trilobe: Any) -> None:
    from trilobe.infrastructure.bundle import open_bundle

    folder = photos(tmp_path / "in", 2)
    with pytest.raises(NotFoundError, match="expected the path of a bundle, or its id inside a project"):
        loop.infer("", folder, tmp_path / "out", project=tiny.folder)
    with loop.opened(tiny.folder) as p:
        from trilobe.types import Model

        p.store.add_model(Model("m1", "image_classification", p.space, "w", {}, {}))
        p.store.add_bundle(open_bundle(images))
    for name in ("", open_bundle(images).id[:6]):
        said = trilobe("infer", name, folder, tmp_path / f"out{name}", "--project", tiny.folder)
        assert said.code == 0, said.err
        assert len(rows(tmp_path / f"out{name}")) == 2


def test_as_a_monai_application_package(images: Path, tmp_path: Path) -> None:
    """The command of a package needs no words: the environment says where everything is."""
    photos(tmp_path / "in", 2)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "pets").symlink_to(images)
    environment = {**os.environ, "HOLOSCAN_INPUT_PATH": f"{tmp_path}/in/", "HOLOSCAN_OUTPUT_PATH": f"{tmp_path}/out/",
                   "HOLOSCAN_MODEL_PATH": f"{tmp_path}/models/"}  # fmt: skip
    command = [sys.executable, "-m", "trilobe", "infer"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in rows(tmp_path / "out")] == ["000.png", "001.png"]
    (tmp_path / "models" / "other").symlink_to(images)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "2 bundles in" in done.stderr


def test_it_says_how_fast_it_goes(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilobe.loop.inferring.REMARK", 0.0)
    (tmp_path / "a.jsonl").write_text('{"text": "to Rome"}\n' * 50)
    said: list[tuple[str, int, int]] = []
    with loop.listening(lambda message, done=0, total=0: said.append((message, done, total))):
        loop.infer(texts, tmp_path / "a.jsonl", tmp_path / "out")
    remarks = [m for m, _, total in said if not total]
    assert remarks and all("of about 50 inputs, " in m and "a second, " in m and m.endswith(" s left") for m in remarks)
    assert said[-1] == ("inferring", 50, 50)


# --- properties

LINE = st.one_of(
    st.text(max_size=30).map(lambda t: json.dumps({"text": t}).encode()),
    st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")),
    st.sampled_from([b"", b'{"text": "to Rome", "id": 7}', b"null", b'{"text": null}']),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(LINE, max_size=12), st.integers(1, 5))
def test_every_line_is_answered_or_failed(
    bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], batch: int
) -> None:
    folder, texts = tmp_path_factory.mktemp("any"), bundles["text_classification"]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    try:
        told = loop.infer(texts, folder / "a.jsonl", folder / "out", batch=batch)
    except DataError as e:
        assert "none of" in str(e)
    else:
        bad = failed(folder / "out") if told.n_failed else {}
        names = [row["name"] for row in rows(folder / "out")]
        assert (
            len(names) + len(bad)
            == told.n
            == sum(bool(line.strip()) for line in [lines[0].removeprefix(b"\xef\xbb\xbf"), *lines[1:]])
        )
        assert not set(names) & set(bad)
