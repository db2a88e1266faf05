"""Negative controls of claims about caches: an engine's syncs forget fewer of them than they should."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from rlsync.engine.compat import engine as compat
from rlsync.engine.handles.local import Engine


def keep_caches(patch: pytest.MonkeyPatch, engine: Engine, *, prefix: bool) -> None:
    """Keep what was computed of pictures and sounds, and with ``prefix`` the prefix cache, too."""
    run_update = compat.run_update

    async def run(*arguments: Any, keeps_caches: bool, **others: Any) -> bool:
        return await run_update(*arguments, keeps_caches=True, **others)

    patch.setattr(engine, "_reset_media_caches", partial(asyncio.sleep, 0))
    if prefix:
        patch.setattr(compat, "run_update", run)
