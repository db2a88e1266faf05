"""What the ranks of ``test_agreement`` do."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import time
import weakref

import pytest
import torch
import torch.distributed as dist

from rlsync.errors import PlacementError, RlsyncError
from rlsync.transport.collectives import agreed, gather_bytes
from tests.deadlines import HANG_S

CPU = torch.device("cpu")


def disagree() -> None:
    """Errors of ours and of others, on one rank, reach all of them; and afterwards the group still works."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    fail_on_rank_one(PlacementError("two names"), PlacementError)
    fail_on_rank_one(ValueError("seven"), RlsyncError if rank == 0 else ValueError)
    fail_on_rank_one(OSError(28, "full"), RlsyncError if rank == 0 else OSError)
    with agreed(device=CPU):
        pass
    assert gather_bytes(b"x" * rank, device=CPU) == [b"", b"x"]
    dist.destroy_process_group()


def fail_on_rank_one(failure: Exception, seen: type[Exception]) -> None:
    with pytest.raises(seen) as caught:
        enter(failure)
    assert dist.get_rank() == 1 or ("rank 1" in str(caught.value) and str(failure) in str(caught.value))


def enter(failure: Exception) -> None:
    with agreed(device=CPU):
        if dist.get_rank() == 1:
            raise failure


def fail_beside_a_process() -> None:
    """With a child that is ended where an interpreter ends, as vLLM ends those of an engine, and then the process, as with vLLM."""
    atexit.register(os._exit, 0)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(HANG_S,))
    child.start()
    weakref.finalize(child, child.kill)
    raise RuntimeError("it was this")
