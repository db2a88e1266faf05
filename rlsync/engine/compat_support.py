"""What the installed vLLM supports, for ``rlsync doctor``. Starts no engine."""

from __future__ import annotations

import inspect
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.engine.async_llm import AsyncLLM

from rlsync.engine import compat, compat_faults


def supported(backend: str) -> dict[str, Any]:
    """Facts by name.

    ``version``; ``platform``: cpu, cuda, ...; ``backend_loaded``: vLLM's plug-ins, loaded as in a worker, have registered
    ``backend``; ``takes_version``: an engine can be told which version it serves (vLLM >= 0.27); ``can_sleep``; ``heals``: reload
    of packed experts is set right; ``shm_prefixes``: where its workers put shared memory.
    """
    load_general_plugins()
    compat_faults.heal()
    return {
        "version": compat.vllm_version(),
        "platform": str(current_platform.device_type),
        "backend_loaded": backend in WeightTransferEngineFactory._registry,
        "takes_version": "weight_version" in inspect.signature(AsyncLLM.finish_weight_update).parameters,
        "can_sleep": compat.can_sleep(),
        "shm_prefixes": list(compat.SHM_PREFIXES),
    }
