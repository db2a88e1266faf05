"""Engines that test files share; see ``tiny_engines``. Under xdist such files run in one lane (``SHARED`` of ``tests.conftest``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rlsync.engine.handle import Engine

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
