"""The claims of ``tests/gpu/test_merge_cuda.py`` about the kernel that merges adapters, held to Triton's interpreter: no GPU, no compiler.

A program, because Triton looks at TRITON_INTERPRET when it is imported. Not of bfloat16: the interpreter multiplies its bits as integers,
and cuts it off where a GPU rounds (Triton 3.6 and 3.9). Prints what it has seen.
"""

from __future__ import annotations

import contextlib

import torch

from rlsync.copy import merge
from tests.gpu import test_merge_cuda as claims


def main() -> None:
    claims.CUDA = torch.device("cpu")
    # The interpreter takes tensors of the host.
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc,return-value]
    merge._fuses = lambda device: True  # type: ignore[assignment]
    interpreted = [dtypes for dtypes in claims.DTYPES if torch.bfloat16 not in dtypes]
    assert merge._fused_form(torch.ones(16, 16), merge.Factors(torch.ones(16, 16), torch.ones(16, 16), None, None)) is not None
    for dtypes in interpreted:
        # Of float32 all; it is slow.
        for case in claims.CASES[:: 1 if dtypes[1] == torch.float32 else 3]:
            claims.assert_sums_are_rounded_once(case, dtypes)
        print("INTERPRETED", *dtypes)
    claims.assert_independent((torch.float32, torch.float32))
    print("INDEPENDENT")
    claims.assert_followed((torch.float32, torch.float32))
    print("FOLLOWED")


if __name__ == "__main__":
    main()
