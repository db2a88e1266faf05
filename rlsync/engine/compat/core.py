"""A whole weight update as one call of an engine's core, and as one of its workers.

vLLM has a call for each part of an update. Their messages and answers keep the two threads of a core that talk, and its client's event
loop, from the update itself, and resuming it is one more way there and back after the last answer. Only rlsync's own plug-in calls
these. Private names of vLLM (0.25.1, 0.32.0).
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from vllm.v1.engine.core import EngineCore

from rlsync.engine.compat.engine import UPDATE


def add_update() -> None:
    """Give the engine's core that this process is, if it is one, the call ``UPDATE``. Idempotent."""
    setattr(EngineCore, UPDATE, _update)


def _update(
    core: Any, update_info: dict[str, Any], weight_version: str, pause_mode: str | None, keeps_caches: bool, resumes: bool
) -> bool | Future[bool]:
    """One update: a pause, the workers' part, the version's label (vLLM >= 0.27), and a reset of the prefix cache.

    What fails leaves the engine paused. Kept requests are preempted by the reset: their keys and values are computed again.

    Args:
        pause_mode: of the pause; None where the engine has been paused before.
        keeps_caches: nothing is reset.
        resumes: let an engine that has no request in it go on.

    Returns whether it has been resumed; a future of it where requests came between, and the pause waits for them.
    """

    def rest() -> bool:
        if not core.is_scheduler_paused():
            raise RuntimeError("the engine is not paused, and would answer while its weights are written")
        core.collective_rpc(UPDATE, kwargs={"update_info": update_info})
        if hasattr(core, "set_weight_version"):
            core.set_weight_version(weight_version)
        if not keeps_caches and not core.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise RuntimeError("the engine could not reset its prefix cache: requests hold blocks of it")
        if not resumes or core.has_work():
            return False
        core.resume_scheduler()
        return True

    paused = None if pause_mode is None else core.pause_scheduler(pause_mode, False)
    if paused is None:
        return rest()
    done = Future[bool]()

    def go_on(paused: Future[None]) -> None:
        try:
            paused.result()
            done.set_result(rest())
        except Exception as error:
            done.set_exception(error)

    paused.add_done_callback(go_on)
    return done
