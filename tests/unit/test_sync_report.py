"""Claims about the numbers of a sync: what SyncReport and SyncHealth give a metrics log, and that each is explained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from rlsync.copy.speed import copy_gb_per_s
from rlsync.errors import WeightSyncError
from rlsync.sync import SyncReport
from rlsync.sync.report import PHASES, SyncHealth

PAGE = Path(__file__).parents[2] / "docs/metrics.md"


def report(**changes: Any) -> SyncReport:
    fields: dict[str, Any] = {
        "version": 7, "sinks": ("direct", "direct+layerwise"), "transport": "gloo+shm", "verify": "sampled", "bytes": 3 * 10**9,
        "bytes_by_link": {"same device": 0, "same host": 2 * 10**9, "other host": 10**9}, "redundancy": {"a": 1.0, "b": 1.5},
        "num_buckets": 12, "seconds": 2.0, "pause_s": 0.1, "begin_s": 0.2, "fill_s": 0.3, "transfer_s": 1.4, "wait_s": 0.4, "pull_s": 0.5,
        "verify_s": 0.6, "finalize_s": 0.7, "commit_s": 0.8, "resume_s": 0.9, "extra_bytes": 64, "engine_s": {"0": 1.0},
    }  # fmt: skip
    return SyncReport(**fields | changes)


def test_metrics_tell_the_floor_where_the_link_was_measured() -> None:
    numbers = report(link_gb_per_s=6.0).metrics()
    assert (numbers["sync/gb_per_s"], numbers["sync/floor_s"], numbers["sync/floor_ratio"]) == (1.5, 0.5, 4.0)
    assert not {"sync/floor_s", "sync/floor_ratio", "sync/link_gb_per_s"} & report().metrics().keys()


def test_metrics_name_sinks_transports_links_and_failures() -> None:
    numbers = report(failures={"transfer": 2, "pause": 1}, engines_dirty=1).metrics()
    assert {name for name in numbers if name.startswith(("sync/sink_", "sync/transport_"))} == {
        "sync/sink_direct", "sync/sink_layerwise", "sync/transport_gloo", "sync/transport_shm",
    }  # fmt: skip
    assert numbers["sync/bytes_same_host"] == 2e9 and numbers["sync/max_redundancy"] == 1.5
    assert (numbers["sync/failures"], numbers["sync/failures_transfer"], numbers["sync/failures_verify"]) == (3, 2, 0)
    assert numbers["sync/engines_dirty"] == 1 and numbers["time/sync_weights"] == 2.0
    assert all(isinstance(value, int | float) for value in numbers.values())


def test_a_report_crosses_the_channel() -> None:
    sent = report(link_gb_per_s=3.5, failures={"begin": 1})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=SyncReport) == sent


def test_every_number_is_explained_on_its_page() -> None:
    explained = set(re.findall(r"^\| `([\w/]+)` \|", PAGE.read_text().partition("\n# ")[0], re.MULTILINE))
    sinks = ("direct", "layerwise", "loaders")
    numbers = report(sinks=sinks, link_gb_per_s=1.0).metrics()
    families = {f"sync/failures_{phase}" for phase in PHASES} | {n for n in numbers if n.startswith(("sync/sink_", "sync/transport_"))}
    assert families <= numbers.keys()
    named = {"sync/failures_PHASE", "sync/sink_NAME", "sync/transport_NAME"}
    assert explained == numbers.keys() - families | named


def test_health_counts_failures_and_remembers_dirty_engines() -> None:
    health = SyncHealth()
    assert health.metrics()["sync/engines_dirty"] == 0 == health.metrics()["sync/failures"]
    health.failed(WeightSyncError(phase="verify", cause="a flipped bit"), ["0", "1"])
    health.failed(OSError("no memory"), ["1"])
    assert health.dirty == {"0", "1"}
    health.committed(["1"])
    numbers = health.metrics()
    assert (numbers["sync/engines_dirty"], numbers["sync/failures"]) == (1, 2)
    assert (numbers["sync/failures_verify"], numbers["sync/failures_transfer"]) == (1, 1)
    assert numbers.keys() <= report().metrics().keys(), "the same names as in a report"


@pytest.mark.parametrize("nbytes", [1, 4096, 70 * 2**20])
def test_a_copy_is_timed_and_leaves_memory_alone(nbytes: int) -> None:
    memory = torch.full((nbytes,), 3, dtype=torch.uint8)
    speed = copy_gb_per_s(memory)
    # Memory moves between 0.1 and 10,000 GB/s wherever this runs; less are the few bytes, of which the call is all.
    assert 0 < speed < 1e4 and (nbytes < 10**6 or speed > 0.1)
    assert bool((memory == 3).all())
