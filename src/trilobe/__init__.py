"""Trilobe: from unlabeled examples to a model in production that people can trust, and back when it fails.

This room holds the version and the lazy public names, nothing else: ``import trilobe`` loads no numpy, no torch and
no database. The verbs live in :mod:`trilobe.loop`, the nouns in :mod:`trilobe.types`, each lobe in its own folder.

>>> import trilobe
>>> trilobe.LabelSpace(("cat", "dog")).index("dog")
1
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NOUNS = {
    *("Answer", "Belief", "Bundle", "Capture", "Endpoint", "Evidence", "Example", "Finding", "LabelSpace", "Model"),
    *("Question", "Response", "Span"),
}
_VERBS = {
    *("init", "add", "query", "label", "aggregate", "train", "evaluate", "check", "package", "serve", "infer"),
    *("deliver", "monitor", "explain", "plan", "run", "report", "show", "export", "token"),
}

__all__ = sorted({"TrilobeError", "__version__", "demo", *_NOUNS, *_VERBS})


def __getattr__(name: str) -> Any:
    """Import a noun or a verb the first time somebody asks for it (PEP 562)."""
    if name == "TrilobeError":
        return import_module("trilobe.errors").TrilobeError
    if name == "demo":
        return import_module("trilobe.demos").demo
    if name in _NOUNS:
        return getattr(import_module("trilobe.types"), name)
    if name in _VERBS:
        return getattr(import_module("trilobe.loop"), name)
    raise AttributeError(f"module 'trilobe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
