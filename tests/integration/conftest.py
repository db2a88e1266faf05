"""Engines that test files share; see ``tiny_engines``. Under xdist such files run in one lane (``SHARED`` of ``tests.conftest``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rlsync.engine.handles.local import Engine
    from tests.integration.tiny_engines import Answers, TwoRanks

# What they are made of is imported late, because most files do without.


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders by name."""
    from tests.integration.tiny_engines import save_folders

    return save_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_engines(tiny_folders: dict[str, Path]) -> Iterator[dict[str, Engine]]:
    """Engines by name, each of which a test may kill only after all others that need it."""
    from tests.integration.tiny_engines import started_engines

    with started_engines(tiny_folders) as engines:
        yield engines


@pytest.fixture(scope="session")
def tiny_answers(tiny_engines: dict[str, Engine]) -> dict[str, Answers]:
    """What engines ``a`` and ``b`` answer before any sync; a file that wants it asks for it before its first one."""
    from tests.integration.tiny_engines import GREEDY, PROMPTS

    return {name: tiny_engines[name].generate(PROMPTS, GREEDY) for name in ("a", "b")}


@pytest.fixture
def two_ranks() -> Iterator[Callable[..., TwoRanks]]:
    """Makes pairs of actor ranks for engines, with the tensors of a folder; they end with the test."""
    from tests.integration.tiny_engines import TwoRanks

    made: list[TwoRanks] = []

    def make(engines: Sequence[Engine], folder: Path, **settings: Any) -> TwoRanks:
        made.append(TwoRanks(list(engines), folder, **settings))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()
