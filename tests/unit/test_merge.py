"""Adapters added to weights where no kernel does: what is found out before one is taken, and what is computed without."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch

from rlsync.copy import merge
from rlsync.copy.merge import merged
from tests.deadlines import HANG_S
from tests.gpu.test_merge_cuda import SCALING, Case, assert_rounded_once, drawn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "case", [Case(12, 20, 3, (4, 6, -2), count=3), Case(12, 20, 3), Case(12, 20, 3, count=2, transposed=True)], ids=str
)
def test_without_cuda_torch_merges_in_fp32_and_rounds_once(monkeypatch, case, dtype):
    def kernel():
        raise AssertionError("Triton was imported")

    monkeypatch.setattr(merge, "_kernel", kernel)
    weights, factors = drawn(case, dtype, dtype, torch.device("cpu"))
    merge.compile_ahead(weights, factors).join(HANG_S)
    for found, weight, of_one in zip(merged(weights, factors, SCALING), weights, factors, strict=True):
        assert_rounded_once(found, weight, of_one)


def test_nothing_is_merged_of_nothing():
    assert merged([], [], SCALING) == []


def test_no_kernel_is_taken_where_there_is_no_triton(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not merge._fuses.__wrapped__(torch.device("cuda", 0)) and not caplog.records


def test_where_triton_does_not_run_it_is_said_why(monkeypatch, caplog):
    def kernel():
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(merge, "_kernel", kernel)
    with caplog.at_level(logging.WARNING):
        assert not merge._fuses.__wrapped__(torch.device("cuda", 0))
    (record,) = caplog.records
    assert "cuda:0" in record.getMessage() and "Failed to find C compiler" in record.getMessage()


def test_no_kernel_is_taken_on_gpus_whose_tensor_cores_take_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert not merge._fuses.__wrapped__(torch.device("cuda", 0))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_holds_in_tritons_interpreter():
    program, variables = [sys.executable, "-m", "tests.interpreted_merge"], {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(program, env=variables, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("INTERPRETED") == 2 and "INDEPENDENT" in run.stdout and "FOLLOWED" in run.stdout
