"""Composes the receiver of an engine worker: the lowest place that may know both engine and transport."""

from __future__ import annotations

from typing import Any

from rlsync.engine.worker import Receiver
from rlsync.sync.inlets import open_inlet
from rlsync.transport.shm import shm_domain


def make_receiver(config: Any, vllm_config: Any, device: Any, model: Any) -> Receiver:
    """vLLM's factory call for backend ``rlsync``, in each worker when its model is loaded."""
    return Receiver(config, vllm_config, device, model, open_inlet=open_inlet, domain=shm_domain)
