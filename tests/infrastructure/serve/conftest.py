"""Servers of small bundles in processes of their own."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.lines import SCRIPT
from trilobe.infrastructure import endpoint

TESTS = str(Path(__file__).parents[2])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., endpoint.Endpoint]]:
    """Start servers of lines in processes of their own; all are stopped at the end."""
    folders: list[Path] = []

    def begin(bundle: Path, settings: str = "", extra: str = "", name: str = "endpoint") -> endpoint.Endpoint:
        folder = tmp_path / name
        endpoint.deploy(folder, bundle)
        script = SCRIPT.format(here=TESTS, settings=settings, extra=extra)
        folders.append(folder)
        return endpoint.start(folder, "lines", [sys.executable, "-W", "error", "-c", script, str(folder)], timeout=30)

    yield begin
    for folder in folders:
        endpoint.stop(folder)
