"""The claims of ``tests/gpu/test_merge_cuda.py`` about the kernel that merges adapters, held to Triton's interpreter: no GPU, no compiler.

A program, because Triton looks at TRITON_INTERPRET when it is imported. Not of bfloat16: the interpreter multiplies its bits as integers,
and cuts it off where a GPU rounds (Triton 3.6 and 3.9). It is slow: other dtypes than float32 have a few cases, and what is merged side by
side or again is one of each kind of rank and layout. Prints what it has seen.
"""

from __future__ import annotations

import contextlib

import torch

from rlsync.copy import merge
from tests.gpu import test_merge_cuda as claims
from tests.gpu.test_merge_cuda import Case


def main() -> None:
    claims.CUDA = torch.device("cpu")
    # The interpreter takes tensors of the host.
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc,return-value]
    merge._fuses = lambda device: True  # type: ignore[assignment]
    interpreted = [dtypes for dtypes in claims.DTYPES if torch.bfloat16 not in dtypes]
    assert merge._fused_form(torch.ones(16, 16), merge.Factors(torch.ones(16, 16), torch.ones(16, 16), None, None)) is not None
    for dtypes in interpreted:
        for case in claims.CASES[:: 1 if dtypes[1] == torch.float32 else 7]:
            claims.assert_sums_are_rounded_once(case, dtypes)
        print("INTERPRETED", *dtypes)
    # Rank in one step and in several; rows that are padding; several that are alike; elsewhere in memory.
    steps, padded, several, offset = (
        Case(65, 129, 33),
        Case(72, 96, 16, (60, -12)),
        Case(40, 72, 100, count=3),
        Case(96, 160, 16, layout="offset"),
    )
    claims.assert_independent((torch.float32, torch.float32), (steps, padded, several, offset))
    print("INDEPENDENT")
    claims.assert_followed((torch.float32, torch.float32), (several, Case(40, 24, 5, transposed=True, count=2)))
    print("FOLLOWED")


if __name__ == "__main__":
    main()
