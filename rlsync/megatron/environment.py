"""Variables that the process of an actor rank must have before torch and CUDA start in it. Imports neither."""

from __future__ import annotations

import os

from rlsync.layout.topology import Topology


def rank_environment(topology: Topology) -> dict[str, str]:
    """Variables for the processes of all ranks of a topology; those that this process has itself stay as they are, but for threads.

    With CUDA_DEVICE_MAX_CONNECTIONS=1 a GPU starts kernels in the order in which the host issued them, so that the collectives of tensor
    and context parallelism begin before the matrix products that are to hide them. Megatron-LM's own command line demands it there.

    With NVTE_USE_CUTLASS_GROUPED_GEMM=1 TransformerEngine (2.8 and later) multiplies by all experts of a layer in one kernel on Hopper, and
    sums up in fp32 as ever. By itself it calls cuBLAS for each expert, for which the GPU waits.
    """
    # Large pages for tensors of the host: what a checkpoint gathers there is several times the model.
    wanted = {"THP_MEM_ALLOC_ENABLE": "1", "NVTE_USE_CUTLASS_GROUPED_GEMM": "1"}
    if topology.tp_size > 1 or topology.cp_size > 1:
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return {"OMP_NUM_THREADS": "1", **{name: os.environ.get(name, value) for name, value in wanted.items()}}
