"""What vLLM hands to a worker with the two calls of a weight transfer. Plain data; vLLM makes it of the caller's dicts."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where to dial, and as whom. ``timeout_s`` bounds every phase.

    ``purpose`` is ``sync``; or ``inspect`` to tell hashes; or ``compare``: with ``attempt`` 0 to connect beside the connection
    that there may be, then with 1 to take buckets in and tell what they would change. The last two change nothing.
    """

    endpoint: str
    token: str
    run_id: str
    engine_id: str
    timeout_s: float
    purpose: str = "sync"
    attempt: int = 0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Which sync to join. Names, shapes and places were agreed on at connect; ``attempt`` counts the syncs since then."""

    version: int
    attempt: int
