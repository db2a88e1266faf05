"""Claims about the variables that ranks start with."""

from __future__ import annotations

import pytest

from rlsync.layout.topology import Topology
from rlsync.megatron.environment import rank_environment

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
GROUPED = "NVTE_USE_CUTLASS_GROUPED_GEMM"


@pytest.mark.parametrize(
    ("topology", "connections"),
    [(Topology(), None), (Topology(dp_size=2, ep_size=2), None), (Topology(tp_size=2), "1"), (Topology(cp_size=2), "1")],
)
def test_ranks_whose_collectives_are_to_overlap_start_kernels_in_order(
    topology: Topology, connections: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CONNECTIONS, raising=False)
    assert rank_environment(topology).get(CONNECTIONS) == connections
    monkeypatch.setenv(CONNECTIONS, "8")
    assert rank_environment(topology).get(CONNECTIONS) in ("8", None), "what the user says holds"


def test_experts_are_multiplied_by_one_kernel_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GROUPED, raising=False)
    assert rank_environment(Topology())[GROUPED] == "1"
    monkeypatch.setenv(GROUPED, "0")
    assert rank_environment(Topology())[GROUPED] == "0"
