"""Settings: each wrong thing is named by its key, with what came and what would have been right."""

from pathlib import Path

import msgspec
import pytest

from trilobe.config import FILE, Config, as_dict, load, parse
from trilobe.errors import ConfigError, NotFoundError

HEAD = '[project]\nname = "signs"\n'


def test_the_defaults() -> None:
    config = parse(HEAD)
    assert config.project.name == "signs" and config.project.task == "image_classification"
    assert config.check.gates == {"parity": 1e-4} and config.check.eps == (0.02, 0.05, 0.1)
    assert config.aggregate.method == "dawid_skene" and config.train.steps == 300


def test_every_key_can_be_set() -> None:
    """What is written is read back, for every key of every section."""
    config = parse(HEAD)
    text = ""
    for section in Config.__struct_fields__:
        text += f"[{section}]\n"
        for key, value in as_dict(getattr(config, section)).items():
            if not isinstance(value, dict):
                text += f"{key} = {msgspec.json.encode(value).decode()}\n"
    assert parse(text) == config


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('[query]\nn = "many"', 'query.n = "many"; expected `int`'),
        ("[query]\nn = true", "query.n = true; expected `int`"),
        ("[query]\nn = 2000-01-01", 'query.n = "2000-01-01"; expected `int`'),
        ("[query]\nn = 0", "query.n = 0; expected `int` >= 1"),
        ("[query]\nannotators = [1]", "query.annotators.0 = 1; expected `str`"),
        ("[serve]\nport = 70000", "serve.port = 70000; expected `int` <= 65535"),
        ("[serve]\ncapture = 1.5", "serve.capture = 1.5; expected `float` <= 1.0"),
        ("[monitor]\nalpha = 0", "monitor.alpha = 0; expected `float` > 0.0"),
        ("[train]\nlr = nan", "train.lr = NaN; expected `float` > 0.0"),
        ("[train]\nlr = inf", "train.lr = Infinity; expected `float` <= 1000000000.0"),
        ("[train]\nbatch_size = 1", "train.batch_size = 1; expected `int` >= 2"),
        ("[train]\naugment = 1", "train.augment = 1; expected `bool`"),
        ("[check]\neps = [0.1, 2.0]", "check.eps.1 = 2.0; expected `float` <= 1.0"),
        ('[check.gates]\nparity = "no"', 'check.gates = {"parity": "no"}; expected `float`'),
        (
            '[aggregate]\nmethod = "vote"',
            "aggregate.method = \"vote\"; expected one of 'dawid_skene', 'one_coin', 'majority_vote', 'model'",
        ),
        ('[labels]\nnames = ["a", 1]', "labels.names.1 = 1; expected `str`"),
        ("[[query]]\nn = 1", 'query = [{"n": 1}]; expected a table'),
    ],
)
def test_a_wrong_value(toml: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(HEAD + toml)
    assert str(caught.value) == f"trilobe.toml: {message}\n  next: edit trilobe.toml"


@pytest.mark.parametrize(
    ("toml", "problem", "hint"),
    [
        ('[query]\nstratgy = "margin"', "unknown key query.stratgy; expected one of", "did you mean 'strategy'?"),
        ("[qery]\nn = 1", "unknown key qery; expected one of project, labels", "did you mean 'query'?"),
        ("[train]\nzzz = 1", "unknown key train.zzz; expected one of steps, epochs", "edit trilobe.toml"),
        ("[labels.foo]\nx = 1", "unknown key labels.foo; expected one of names, parents", "edit trilobe.toml"),
        ("sed = 1", "unknown key project.sed; expected one of name", "did you mean 'seed'?"),
    ],
)  # fmt: skip
def test_an_unknown_key(toml: str, problem: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(HEAD + toml)
    assert problem in str(caught.value) and caught.value.hint == hint


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("", "project is missing"),
        ("[project]\nseed = 1", "project.name is missing"),
        ("project = 1", "project = 1; expected a table"),
        ("[project]\nname = 1", "project.name = 1; expected `str`"),
        ('[project]\nname = ""', 'project.name = ""; expected `str` matching regex'),
        ('[project]\nname = "../up"', 'project.name = "../up"; expected `str` matching regex'),
        ('[project]\nname = "a\\n"', 'project.name = "a\\n"; expected `str` matching regex'),
        ('[project]\nname = "a"\ntask = "chess"', "project.task = \"chess\"; expected one of 'image_classification'"),
        ("[project]\nname = \n[run]", "(at line 2, column 8); expected valid TOML"),
        ('[project]\nname = "a"\nname = "b"\n[run]', "(at line 3, column 11); expected valid TOML"),
    ],
)
def test_a_project_without_a_usable_name(toml: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(toml, "signs.toml")
    assert message in str(caught.value) and str(caught.value).startswith("signs.toml: ")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", r"labels.names has 0 class\(es\); expected at least two"),
        ('names = ["a"]', r"labels.names has 1 class\(es\); expected at least two"),
        ('names = ["a", "b", "a"]', r"\[labels\]: the label space names \['a'\] twice"),
        ('names = ["a", "b"]\nparents = {a = "x", x = "a"}', r"\[labels\]: the label tree has a cycle through"),
        ('names = ["a", "b"]\nparents = {c = "x"}', r"\[labels\]: the label tree gives 'c' a parent"),
    ],
)
def test_labels_that_are_no_label_space(labels: str, message: str) -> None:
    config = parse(HEAD + "[labels]\n" + labels)
    with pytest.raises(ConfigError, match=message) as caught:
        config.space  # noqa: B018
    assert FILE in caught.value.hint


def test_a_label_space_with_its_tree() -> None:
    space = parse(HEAD + '[labels]\nnames = ["cat", "dog", "car"]\nparents = {cat = "animal", dog = "animal"}').space
    assert space.names == ("cat", "dog", "car") and space.mask(["animal"]).tolist() == [True, True, False]


def test_load(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no trilobe.toml in .*; expected a Trilobe project\n  next: trilobe init"):
        load(tmp_path)
    file = tmp_path / FILE
    file.write_text(HEAD)
    assert load(tmp_path).project.name == "signs"
    file.write_bytes(b"\xef\xbb\xbf" + HEAD.encode())
    assert load(tmp_path).project.name == "signs", "a byte order mark is no reason to refuse"
    with pytest.raises(NotFoundError):
        load(file)  # a file is no folder
    file.write_bytes(HEAD.encode() + b'[labels]\nnames = ["\xe9", "b"]')
    with pytest.raises(ConfigError, match=r"trilobe.toml is not UTF-8: .* at byte 44"):
        load(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_errors_of_a_file_name_its_path(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(HEAD + "[run]\ngoal = 95")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path / FILE}: run.goal = 95; expected `float` <= 1.0\n  next: edit {tmp_path / FILE}"
    )


@pytest.mark.parametrize("name", ["", "?", "a|b", "not:a", " a", "a "])
def test_a_class_nobody_could_answer_with_is_refused(name: str) -> None:
    settings = parse(f'[project]\nname = "p"\n[labels]\nnames = ["b", "{name}"]')
    with pytest.raises(ConfigError, match="a class called"):
        _ = settings.space
