"""Two engines and an actor of threads, connected over the real channel, for claims that ask for them by these names."""

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
