"""Claims about the ring in host shared memory, on the real /dev/shm."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlsync.errors import ConfigError
from rlsync.transport.shm import SHM_DIR, Ring
from tests.deadlines import HANG_S


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in shared memory of this test alone: in /dev/shm itself, rings that other tests create would sweep the orphan first."""
    with tempfile.TemporaryDirectory(prefix="rlsync-test-", dir=SHM_DIR) as name:
        yield Path(name)


def attach(ring: Ring) -> Ring:
    return Ring.attach(ring.path, ring.token, ring.num_slots, ring.slot_bytes)


def test_bytes_written_through_one_mapping_are_read_through_another() -> None:
    ring = Ring.create(2, 1000)
    other = attach(ring)
    ring.slot(1)[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert other.slot(1)[:4].tolist() == [1, 2, 3, 4]
    assert other.slot(0).sum() == 0
    ring.close()
    other.close()


def test_memory_outlives_its_name() -> None:
    ring = Ring.create(1, 64)
    other = attach(ring)
    ring.seal()
    assert not ring.path.exists()
    ring.slot(0).fill_(7)
    assert other.slot(0).eq(7).all()
    ring.close()
    other.close()


def test_slot_keeps_its_address() -> None:
    ring = Ring.create(2, 64)
    assert ring.slot(1).data_ptr() == ring.slot(1).data_ptr() != ring.slot(0).data_ptr()
    ring.close()


def test_every_typed_view_has_a_storage_of_its_own() -> None:
    ring = Ring.create(1, 64)
    first, second = (ring.tensor(0, 16, (2, 3), torch.float32) for _ in range(2))
    assert first.data_ptr() == second.data_ptr()
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    assert ring.tensor(0, 0, (0, 3), torch.float32).shape == (0, 3)
    ring.close()


def test_tensors_stay_valid_after_close() -> None:
    ring = Ring.create(1, 64)
    slot = ring.slot(0)
    slot.fill_(5)
    ring.close()
    assert slot.eq(5).all()


def test_too_large_a_ring_names_free_and_needed_bytes_and_leaves_nothing() -> None:
    status = os.statvfs(SHM_DIR)
    free = status.f_bavail * status.f_frsize
    with pytest.raises(ConfigError, match=rf"{SHM_DIR} has \d+ bytes free, the ring needs \d+") as raised:
        Ring.create(2, free)
    assert "bucket_bytes" in str(raised.value)
    assert not list(SHM_DIR.glob(f"*rlsync-ring-{os.getpid()}-*"))


def test_attach_refuses_what_is_not_the_announced_ring(tmp_path: Path) -> None:
    ring = Ring.create(1, 64)
    with pytest.raises(ConfigError, match="not the ring of this run"):
        Ring.attach(ring.path, "0" * 32, ring.num_slots, ring.slot_bytes)
    with pytest.raises(ConfigError, match="was announced with"):
        Ring.attach(ring.path, ring.token, ring.num_slots + 1, ring.slot_bytes)
    ring.close()
    with pytest.raises(ConfigError, match="on one host"):
        Ring.attach(ring.path, ring.token, ring.num_slots, ring.slot_bytes)


def test_a_ring_whose_creator_was_killed_before_unlinking_is_swept_by_the_next(folder: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from rlsync.transport.shm import Ring; "
        "ring = Ring.create(1, 64, directory=Path(sys.argv[1])); print(ring.path, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=HANG_S, check=False)
    orphan = Path(killed.stdout.strip())
    assert orphan.exists()
    living = Ring.create(1, 64, directory=folder)
    assert not orphan.exists()
    third = Ring.create(1, 64, directory=folder)
    assert living.path.exists(), "a ring whose creator lives is left alone"
    living.close()
    third.close()
