"""The tree drawn at the top of errors.py is the tree of classes; an error keeps its three parts wherever it goes."""

import copy
import inspect
import pickle
import re

import pytest

from trilobe import errors
from trilobe.errors import TrilobeError

CLASSES = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, TrilobeError)]


def drawn() -> dict[str, str]:
    """Each name in the drawing, with the name it hangs under."""
    above: list[str] = []
    found = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ((?:[│ ]   |[├└]── )*)([A-Z]\w+)", line):
            depth = len(match[1]) // 4
            above[depth:] = [match[2]]
            found[match[2]] = above[depth - 1] if depth else "Exception"
    return found


def test_the_drawing_is_the_tree() -> None:
    assert drawn() == {c.__name__: c.__base__.__name__ for c in CLASSES}


def test_exit_codes_are_those_drawn() -> None:
    codes = dict(re.findall(r"([A-Z]\w+) +exit code (\d)", errors.__doc__ or ""))
    assert codes == {"TrilobeError": "1", "UsageError": "2", "CheckFailed": "3"}
    for c in CLASSES:
        nearest = next(a.__name__ for a in c.__mro__ if a.__name__ in codes)
        assert c.exit_code == int(codes[nearest])


@pytest.mark.parametrize("error", CLASSES)
def test_the_three_parts(error: type[TrilobeError]) -> None:
    assert str(error("it broke")) == "it broke"
    assert str(error("it broke", expected="it whole")) == "it broke; expected it whole"
    assert str(error("it broke", hint="mend it")) == "it broke\n  next: mend it"
    whole = error("it broke", expected="it whole", hint="mend it")
    assert str(whole) == "it broke; expected it whole\n  next: mend it"
    for same in (pickle.loads(pickle.dumps(whole)), copy.copy(whole)):
        assert (type(same), str(same), same.problem) == (error, str(whole), "it broke"), "as between processes"
    with pytest.raises(TypeError):
        error("it broke", "it whole")  # type: ignore[misc]


def test_every_error_says_what_it_is_for() -> None:
    assert all(c.__doc__ and c.__doc__ != c.__base__.__doc__ for c in CLASSES)
