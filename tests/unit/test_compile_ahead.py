"""Kernels that are compiled beside other work, with a compiler that has no GPU."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from rlsync.copy import cuda
from rlsync.errors import ConfigError


def test_who_needs_a_kernel_that_is_being_compiled_waits_for_it(monkeypatch):
    goes_on, begun, compiled = threading.Event(), threading.Event(), []

    class RawKernel:
        def __init__(self, source: str, name: str, options: tuple[str, ...]) -> None:
            self.options = options

        def compile(self) -> None:
            begun.set()
            assert goes_on.wait(60)
            compiled.append(self.options)

    cupy = SimpleNamespace(RawKernel=RawKernel, cuda=SimpleNamespace(Device=lambda index: contextlib.nullcontext()))
    monkeypatch.setattr(cuda, "_cupy", lambda: cupy)
    monkeypatch.setattr(cuda, "_usable", lambda device: torch.device("cuda", 3))
    cuda._compiled_once.cache_clear()
    try:
        ahead = cuda.compile_ahead(torch.device("cuda"))
        assert begun.wait(60)
        threading.Timer(0.05, goes_on.set).start()
        kernels = [cuda._compiled(summed, 3) for summed in (False, True)]
        ahead.join(60)
        assert [kernel.options for kernel in kernels] == compiled and len(compiled) == 2
    finally:
        cuda._compiled_once.cache_clear()


def test_what_keeps_a_kernel_from_being_compiled_is_told_to_who_needs_it(monkeypatch):
    def missing() -> None:
        raise ConfigError("CUDA copies need cupy")

    monkeypatch.setattr(cuda, "_cupy", missing)
    monkeypatch.setattr(cuda, "_usable", lambda device: torch.device("cuda", 3))
    cuda.compile_ahead(torch.device("cuda")).join(60)
    with pytest.raises(ConfigError, match="need cupy"):
        cuda._compiled(False, 3)
