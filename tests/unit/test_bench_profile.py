"""What a profile says of spans on a GPU: idle time, communication that nothing hides, kinds of kernels."""

from __future__ import annotations

import msgspec
import pytest
from rich.console import Console

from rlsync.bench.profile import Kernel, Phases, kind_of, summary
from rlsync.bench.training import show_profiles

GEMM, NCCL, OTHER = "nvjet_tst_256x128_64x4", "ncclDevKernel_AllGather_RING_LL", "at::native::vectorized_elementwise_kernel"


def test_idle_time_and_communication_alone_are_told_apart_from_what_runs_side_by_side():
    spans = [
        (NCCL, 4.0, 8.0),  # 4 to 6 beside the product, 6 to 8 alone
        (GEMM, 0.0, 6.0),
        (OTHER, 5.0, 5.5),  # inside of it
        (GEMM, 10.0, 11.0),  # behind 2 of nothing
        (NCCL, 10.2, 10.8),  # hidden
    ]
    found = summary(spans)
    assert found.seconds == pytest.approx(11e-6) and found.busy_s == pytest.approx(9e-6)
    assert found.exposed_communication_s == pytest.approx(2e-6)
    assert found.kinds == pytest.approx({"communication": 4.6e-6, "attention": 0, "matrix products": 7e-6, "copies": 0, "others": 0.5e-6})
    assert [kernel.name for kernel in found.kernels] == [GEMM, NCCL, OTHER]
    assert found.kernels[0] == Kernel(GEMM, 2, pytest.approx(7e-6))


def test_a_step_that_left_the_gpu_alone_has_no_profile():
    with pytest.raises(ValueError, match="nothing ran on the GPU"):
        summary([])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (GEMM, "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        (NCCL, "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused_add_mul_silu_0", "others"),
    ],
)
def test_kernels_have_kinds_by_their_names(name, kind):
    assert kind_of(name) == kind


def test_a_table_says_what_takes_the_time(capsys):
    profile = summary([(GEMM, 0.0, 6000.0), (NCCL, 8000.0, 9000.0)])
    phases = Phases(issued_s=0.011, passes_s=0.012, optimizer_s=0.003)
    found = msgspec.to_builtins({"profiles": {"train": profile}, "phases": phases})
    show_profiles(Console(width=200), found)
    told = capsys.readouterr().out
    assert "passes 12.0 ms, issued by the host in 11.0; optimizer 3.0 ms" in told
    (row,) = [line.split() for line in told.splitlines() if line.split()[:1] == ["train"]]
    assert row == ["train", "9.0", "2.0", "1.0", "1.0", "0.0", "6.0", "0.0", "0.0"]
