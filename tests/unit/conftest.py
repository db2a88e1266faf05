"""What several unit tests ask for by name: two engines and an actor of threads, connected over the real channel; a machine without GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.thread_actors import Actors
from tests.thread_engines import ThreadEngine


@pytest.fixture
def engines() -> list[ThreadEngine]:
    return [ThreadEngine("e0"), ThreadEngine("e1")]


@pytest.fixture
def actors(engines: list[ThreadEngine]) -> Iterator[Actors]:
    made = Actors(engines)
    made.connect()
    yield made
    made.close()


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--check`` finds no GPU, wherever it runs."""
    monkeypatch.setattr("workers.check.count_gpus", lambda: 0)
