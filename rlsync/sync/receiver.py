"""Composes the receiver of an engine worker: the lowest place that may know both engine and transport."""

from __future__ import annotations

from typing import Any

from rlsync.engine.worker import Receiver
from rlsync.transport.shm import Ring, shm_domain


def make_receiver(config: Any, vllm_config: Any, device: Any, model: Any) -> Receiver:
    """vLLM's factory call for backend ``rlsync``, in each worker when its model is loaded."""
    return Receiver(config, vllm_config, device, model, attach=Ring.attach, domain=shm_domain)
