"""Folders that are made locally from a recipe: once, complete or absent, and never over what somebody else put there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlsync.errors import ConfigError

_RECIPE = "recipe.json"


def make_once(folder: Path, recipe: Mapping[str, Any], make: Callable[[Path], None], *, key: str) -> bool:
    """Fill ``folder`` by ``make`` unless it holds this very recipe already; returns whether it was made now. Runs may ask side by side.

    Args:
        recipe: everything the content depends on, as JSON holds it.
        make: called with an empty folder, which becomes ``folder`` when it returns.
        key: names the folder in the error.

    Raises:
        ConfigError: ``folder`` holds something that this function did not make.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(folder.name + ".lock")):
        return _make_once(folder, recipe, make, key)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is here under the same name; ``path`` is an empty file, which stays."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_once(folder: Path, recipe: Mapping[str, Any], make: Callable[[Path], None], key: str) -> bool:
    made, wanted = folder / _RECIPE, json.dumps(recipe, sort_keys=True)
    if made.is_file() and made.read_text() == wanted:
        return False
    if folder.exists() and any(folder.iterdir()):
        if not made.is_file():
            raise ConfigError(f"{key} {folder} exists and was not made by rlsync; name another folder or remove it")
        shutil.rmtree(folder)
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    make(staging)
    (staging / _RECIPE).write_text(wanted)
    if folder.exists():
        folder.rmdir()
    # An interrupted run leaves only the staging folder.
    staging.rename(folder)
    return True
