"""The same seed gives the same questions and the same model, to the bit; another seed, others."""

import shutil
from pathlib import Path
from typing import Any

from trilobe import __version__, loop


def after_two_rounds(tiny: Any, name: str, seed: int) -> tuple[list[str], list[str]]:
    folder = tiny.folder.with_name(name)
    shutil.copytree(tiny.folder, folder)
    path = folder / "trilobe.toml"
    path.write_text(path.read_text().replace('name = "tiny"', f'name = "tiny"\nseed = {seed}'))
    loop.run(tiny.answer, folder, goal=2.0, rounds=2, promote=False)
    with loop.opened(folder) as p:
        return [m.id for m in p.store.models()], [q.example_id for q in p.store.questions() if q.round]


def test_same_seed_same_everything(tiny) -> None:
    assert after_two_rounds(tiny, "one", 5) == after_two_rounds(tiny, "two", 5)


def test_other_seed_other_questions_and_model(tiny) -> None:
    (models, questions), (others, other_questions) = after_two_rounds(tiny, "a", 1), after_two_rounds(tiny, "b", 2)
    assert set(questions) != set(other_questions)
    assert not set(models) & set(others)


def test_a_model_says_where_it_comes_from(trained) -> None:
    with loop.opened(trained.folder) as p:
        model = p.store.model()
        beliefs = loop.believing.unpack_beliefs(p.store.blobs.get(model.origin["beliefs"]))
        assert {b.example_id for b in beliefs} == {a.example_id for a in p.store.answers()} - {
            e.id for e in p.store.examples("test")
        }
    assert model.origin["code"] == f"trilobe {__version__}"
    assert model.origin["seed"] == 0
    assert model.origin["train"]["steps"] == 40
    assert (model.origin["n_examples"], model.origin["n_answers"]) == (len(beliefs), 21)


def test_training_again_finds_the_model(trained) -> None:
    before = trained.state()
    said: list[str] = []
    with loop.listening(lambda message, done=0, total=0: said.append(message)):
        model = loop.train(trained.folder)
    assert model.id == before["models"][-1] and trained.state() == before
    assert "already trained on exactly this" in said
    other = loop.train(trained.folder, seed=7)
    assert other.id != model.id and other.origin["seed"] == 7


def test_where_the_project_lies_does_not_matter(trained, tmp_path: Path) -> None:
    moved = tmp_path / "somewhere else" / "prøject"
    moved.parent.mkdir()
    trained.folder.rename(moved)
    with loop.opened(moved) as p:
        before = p.store.model().id
    assert loop.train(moved).id == before


def test_the_same_beliefs_are_the_same_bytes(trained) -> None:
    """Training is found again by the digest of its beliefs."""
    assert len({loop.aggregate(trained.folder).beliefs for _ in range(8)}) == 1
