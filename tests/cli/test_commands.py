"""The command line is the library: same names, same arguments, same results; what goes where, and the exit codes."""

import csv
import inspect
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from trilobe import loop
from trilobe.cli import VERBS, main
from trilobe.cli.commands import command, read_docstring

NOUNS = {"Project", "listening", "opened"}  # exported for programs, no verbs
FUNCTIONS = {n for n in loop.__all__ if n not in NOUNS and inspect.isfunction(getattr(loop, n))}


def function(verb: str) -> Any:
    from trilobe.demos import demo

    return demo if verb == "demo" else getattr(loop, verb)


def in_a_process(*args: Any, **more: Any) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "trilobe", *map(os.fspath, args)]
    return subprocess.run(command, capture_output=True, timeout=120, **more)


# --- parity


def test_every_verb_is_a_command_and_no_other() -> None:
    assert set(VERBS) == FUNCTIONS | {"demo"}


@pytest.mark.parametrize("verb", VERBS)
def test_same_parameters_all_explained(verb: str) -> None:
    made, signature = command(verb), inspect.signature(function(verb))
    assert [p.name for p in made.params if p.name != "as_json"] == list(signature.parameters)
    _, args, example = read_docstring(inspect.getdoc(function(verb)) or "")
    assert set(args) == set(signature.parameters), "the docstring explains each argument"
    assert f"trilobe {verb}" in example
    names = list(signature.parameters)
    for i, p in enumerate(made.params):
        is_argument = i < names.index("project")
        assert isinstance(p, click.Argument if is_argument else click.Option), p.name
        if isinstance(p, click.Option):
            assert p.help, f"--{p.name} has no help"


@pytest.mark.parametrize("verb", VERBS)
def test_defaults_are_those_of_the_function(verb: str) -> None:
    """Nothing given on the command line means what nothing given in Python means."""
    for p in command(verb).params:
        parameter = inspect.signature(function(verb)).parameters.get(p.name or "")
        if parameter is None or parameter.default is inspect.Parameter.empty:
            continue
        default = p.get_default(click.Context(command(verb)))
        assert default == parameter.default or (default is None and parameter.default in ((), None, "")), p.name


@pytest.mark.parametrize("verb", VERBS)
def test_help(trilobe, verb: str) -> None:
    said = trilobe(verb, "--help")
    assert said.code == 0 and "Example:\n  " in said.out.replace("\n    ", "\n  ")
    assert "--json" in said.out and "``" not in said.out
    first = re.split(r"(?<=\.)\s", (inspect.getdoc(function(verb)) or "").replace("``", ""), maxsplit=1)[0]
    told = VERBS[verb].rstrip(".").split(":")[0].split(",")[0]
    assert first.split()[0].rstrip(",") == told.split()[0], "the list of commands begins as the verb's own words do"


def test_the_list_of_commands_is_in_the_order_of_the_loop(trilobe) -> None:
    said = trilobe("--help")
    at = [said.out.index(f"\n  {verb} ") for verb in VERBS]
    assert at == sorted(at) and "First steps" in said.out


def test_options_that_python_has(trilobe, tiny) -> None:
    said = trilobe("query", "-p", tiny.folder, "-n", 3, "--answers", 1, "--seed", 5, "--strategy", "random", "--json")
    assert said.code == 0 and len(said.json) == 3
    assert "--promote / --no-promote" in trilobe("run", "--help").out


# --- exit codes, and what goes where


def test_the_whole_loop_by_commands(trilobe, tmp_path: Path, template) -> None:
    folder = tmp_path / "my projéct"
    pool, test = (template.folder.parent / part for part in ("pool", "test"))
    said = trilobe("init", "--project", folder, "--labels", "bar, cross,dot", "--json")
    assert (said.code, said.json) == (0, str(folder / "trilobe.toml"))
    (folder / "trilobe.toml").write_text((template.folder / "trilobe.toml").read_text())
    assert len(trilobe("add", pool, "-p", folder, "--json").json["added"]) == 60
    said = trilobe("add", test, "-p", folder, "--split", "test", "--labels", "folders")
    assert said.out == "30 added, 30 with their true label\n"
    said = trilobe("run", "-p", folder, template.table(tmp_path / "answers.csv"), "--goal", 0.5, "--json")
    assert said.code == 0, said.err
    assert said.json["outcome"] in ("goal", "budget") and said.json["bundle"]["id"], "run promotes, as in Python"
    assert trilobe("show", "-p", folder, "--json").json["bundles"] == [said.json["bundle"]["id"]]
    for verb in (
        ["query", "-n", 2],
        ["aggregate"],
        ["train"],
        ["evaluate"],
        ["check"],
        ["package"],
        ["report"],
        ["show"],
    ):
        said = trilobe(*verb, "-p", folder)
        assert said.code == 0 or (verb[0] == "query" and said.code == 1), (verb, said.err)


def test_0_done_1_error_2_usage_3_a_gate(trilobe, trained, tmp_path: Path) -> None:
    folder = trained.folder
    assert trilobe("show", "-p", folder).code == 0
    assert trilobe("query", "-p", folder, "-n", 0).code == 2
    assert trilobe("query", "-p", folder, "-n", "many").code == 2
    assert trilobe("show", "-p", tmp_path / "nowhere").code == 2
    failed = trilobe("check", "-p", folder, "--gates", "ece=0.0,accuracy=0.1", "--json")
    assert failed.code == 3 and [e["passed"] for e in failed.json if e["check"] == "ece"] == [False]
    trained.set("check", "gates", "{ece = 0.0}")
    assert trilobe("package", "-p", folder).code == 3
    said = trilobe("package", "-p", folder, "--allow-failed", "--json")
    assert said.code == 0 and said.json["manifest"]["gates_passed"] is False


def test_an_error_is_json_on_stdout_and_words_on_stderr(trilobe, tmp_path: Path) -> None:
    loop.init(tmp_path, labels=["a", "b"])
    said = trilobe("query", "-p", tmp_path, "--json")
    assert said.code == 1
    assert said.json == {
        "error": "NotEnoughData",
        "problem": "the pool is empty",
        "expected": "examples to ask about",
        "next": f"trilobe add --project {tmp_path} FOLDER",
    }
    assert "NotEnoughData: the pool is empty; expected examples" in said.err and "next: trilobe add" in said.err
    assert trilobe("query", "-p", tmp_path).out == ""


@pytest.mark.parametrize("args", [["query", "-n", "many"], ["query", "--nope"], ["qery"], ["add"]])
def test_a_wrong_call_is_json_as_well(trilobe, args: list[str]) -> None:
    said = trilobe(*args, "--json")
    assert said.code == 2 and said.json["error"] == "UsageError" and said.json["problem"] in said.err
    assert trilobe(*args).out == ""


def test_the_nearest_command(trilobe) -> None:
    said = trilobe("qury")
    assert said.code == 2 and "no command 'qury'. Did you mean 'query'?" in said.err
    assert "See trilobe --help" in trilobe("zzz").err


@pytest.mark.parametrize("value", ["ece", "ece=low", "=", "accuracy=0.9;ece=0.1"])
def test_gates_that_are_no_numbers(trilobe, trained, value: str) -> None:
    said = trilobe("check", "-p", trained.folder, "--gates", value)
    assert said.code == 2 and "name=number" in said.err


def test_a_table_is_all_there_is_on_stdout(trained) -> None:
    done = in_a_process("export", "labels", "--project", trained.folder, "--to", "-")
    assert done.returncode == 0
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode())))
    assert len(rows) == 21 and done.stdout.count(b"\n") == 22, "not even an empty line more"
    model = in_a_process("export", "model", "--project", trained.folder)
    with loop.opened(trained.folder) as p:
        assert model.stdout == p.store.blobs.get(p.store.recorded(f"onnx/{p.store.model().id}"))


def test_json_and_a_table_cannot_share_stdout(trilobe, trained, tmp_path: Path) -> None:
    said = trilobe("export", "labels", "-p", trained.folder, "--json")
    assert said.code == 2 and said.json["error"] == "UsageError" and "--to FILE" in said.json["expected"]
    to = tmp_path / "l.csv"
    assert trilobe("export", "labels", "-p", trained.folder, "--to", to, "--json").json == str(to)


def test_labels_from_a_file_with_refusals(trilobe, tiny, tmp_path: Path) -> None:
    id_ = tiny.examples("pool")[0].id
    (tmp_path / "a.csv").write_text(f"example,annotator,label\n{id_},ann,bar\nnobody,ann,bar\n")
    said = trilobe("label", tmp_path / "a.csv", "-p", tiny.folder)
    assert said.code == 0 and said.out == "1 new answers, 1 rows refused, 0 questions open\n"
    assert "refused" in said.err and ":3:" in said.err and "no example called 'nobody'" in said.err
    said = trilobe("label", tmp_path / "a.csv", "-p", tiny.folder, "--json")
    assert (said.json["new"], said.json["known"]) == (0, 1)


def test_label_without_a_terminal(trilobe, tiny) -> None:
    trilobe("query", "-p", tiny.folder, "-n", 1)
    said = trilobe("label", "-p", tiny.folder, input="dot\n")
    assert said.code == 2 and "no terminal to ask at" in said.err


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    """Through real processes, with every stream in strict UTF-8, as a pipe in a script has it."""
    project = tmp_path / "p"
    assert in_a_process("init", "--project", project, "--labels", "a,b").returncode == 0
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(raw, "wb") as f:  # noqa: PTH123
        Image.new("L", (8, 8), 9).save(f, "PNG")
    with open(os.fsencode(tmp_path) + b"/br\xffken.png", "wb") as f:  # noqa: PTH123
        f.write(b"nonsense")
    done = in_a_process("add", tmp_path, "--project", project, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (id_,), (refused,) = told["added"], told["refused"]
    assert os.fsencode(refused).endswith(b"br\xffken.png"), "the bytes can be had back"
    assert b"ken.png: not an image" in b" ".join(done.stderr.split())
    for args in (["show", id_], ["show", id_, "--json"], ["query"], ["export", "questions"], ["report"]):
        done = in_a_process(*args, "--project", project)
        assert done.returncode == 0, (args, done.stderr)
        done.stdout.decode("utf-8")


# --- what the machine does to us


def full_disk(limit: int) -> Any:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize("limit", [0, 40_000])
def test_a_full_disk_while_adding(tiny, tmp_path: Path, limit: int) -> None:
    """No file may grow beyond ``limit`` bytes: nothing goes in, and the same command works once there is room."""
    before = tiny.state()
    Image.effect_noise((300, 300), 90).save(tmp_path / "new.png")
    args = ["add", tmp_path / "new.png", "--project", tiny.folder, "--json"]
    done = in_a_process(*args, preexec_fn=full_disk(limit))
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["error"] == "DiskFull" or not limit, told  # where the store cannot even be opened, SQLite says less
    assert tiny.state() == before
    again = in_a_process(*args)
    assert again.returncode == 0 and len(json.loads(again.stdout)["added"]) == 1


def test_a_full_disk_while_training(tiny, tmp_path: Path) -> None:
    tiny.set("train", "width", "24")  # weights that do not fit below the limit
    loop.label(tiny.table(tmp_path / "a.csv"), tiny.folder)
    before = tiny.state()
    done = in_a_process("train", "--project", tiny.folder, "--json", preexec_fn=full_disk(60_000))
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["error"] == "DiskFull" and "free some space" in told["next"], told
    assert tiny.state() == before
    assert in_a_process("train", "--project", tiny.folder).returncode == 0


def test_two_runs_at_once(trilobe, tiny) -> None:
    from trilobe.infrastructure.store import run_lock

    with run_lock(tiny.folder / ".trilobe", "trilobe run"):
        done = in_a_process("run", "--project", tiny.folder, "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["error"] == "StoreBusy" and f"process {os.getpid()}" in told["problem"]


def test_an_alarm_is_3(trilobe, trained, monkeypatch: pytest.MonkeyPatch) -> None:
    from trilobe.cli.words import exit_code
    from trilobe.infrastructure.monitor import Window

    assert [exit_code(Window(60, verdict, "")) for verdict in ("alarm", "ok", "too_few")] == [3, 0, 0]


def test_ctrl_c_says_that_nothing_is_lost(trilobe, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from trilobe.loop import choosing

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(choosing, "select", interrupted)
    said = trilobe("query", "-p", tiny.folder)
    assert said.code == 130 and "what was acknowledged is kept" in said.err


def test_help_is_fast_and_light() -> None:
    code = "import sys; from trilobe.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"numpy", "torch", "sqlalchemy", "trilobe.loop"}


def test_the_group_is_the_entry_point() -> None:
    assert isinstance(main, click.Group) and main.name == "main"
