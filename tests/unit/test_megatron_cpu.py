"""The substitutions that let Megatron run without CUDA: asked for, not imported; whole process; torch itself stays honest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.deadlines import HANG_S

REPO = Path(__file__).resolve().parents[2]

SCRIPT = """
import threading, torch
from rlsync.megatron import cpu
plain = torch.cuda.current_device
import megatron.core.optimizer
assert torch.cuda.current_device is plain, "import changes nothing"
assert torch.zeros(1).type() == "torch.FloatTensor"

assert cpu.enable_cpu()
substituted = torch.cuda.current_device, torch.Tensor.type
assert cpu.enable_cpu()
assert (torch.cuda.current_device, torch.Tensor.type) == substituted, "a second call changes nothing"

assert torch.cuda.current_device() == torch.device("cpu")
assert not torch.cuda.is_available()
assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
assert torch.zeros(1).type(torch.int64).dtype is torch.int64
try:
    torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError):
    pass
else:
    raise SystemExit("torch outside of Megatron must not pretend")

def scale():
    from megatron.core.optimizer.grad_scaler import ConstantGradScaler
    made.append(ConstantGradScaler(8.0).scale)
made = []
thread = threading.Thread(target=scale)
thread.start()
thread.join()
assert made and made[0].device.type == "cpu", "works on every thread"

from megatron.core.tensor_parallel import get_cuda_rng_tracker
tracker = get_cuda_rng_tracker()
tracker.add("tracked", 3)
before = torch.get_rng_state()
with tracker.fork("tracked"):
    first = torch.rand(4)
assert torch.equal(torch.get_rng_state(), before), "fork leaves the default generator alone"
with tracker.fork("tracked"):
    assert not torch.equal(torch.rand(4), first), "and continues its own"
print("OK")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is substituted where CUDA is available")
def test_megatron_is_made_to_run_on_cpu_only_when_asked():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, cwd=REPO, timeout=HANG_S)
    assert done.stdout.strip().endswith("OK"), done.stdout + done.stderr
    assert "CPU RNG state changed" not in done.stderr
