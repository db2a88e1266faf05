"""The kernel that merges adapters, against sums in float64: rounded once, whatever lies beside, under every layout that weights have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from rlsync.copy import merge
from rlsync.copy.merge import Factors, MergeProgram, merged

CUDA = torch.device("cuda", 0)
SCALING = 1.75
# Of weights and of factors.
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


@dataclass(frozen=True)
class Case:
    """Weights that are alike, with their adapters.

    Attributes:
        projections: rows of each, one after the other and again until no rows are left; a negative number of rows are of none.
        layout: of weights and factors: beside each other in memory, with gaps between rows, or one element into their memory.
        transposed: factors are those of an embedding.
    """

    rows: int
    columns: int
    rank: int
    projections: tuple[int, ...] = ()
    count: int = 1
    layout: str = "plain"
    transposed: bool = False


CASES = [
    Case(64, 128, 16),
    Case(1, 1, 1),
    Case(200, 300, 7),
    Case(130, 264, 8),
    Case(65, 129, 33),
    # Queries, keys and values of two groups; gates and halves; and rows that are padding.
    Case(2 * (96 + 32 + 32), 256, 32, (96, 32, 32)),
    Case(2 * 100, 320, 8, (100, 100)),
    Case(120, 136, 24, (50, 30, -40)),
    Case(72, 96, 16, (60, -12)),
    Case(128, 128, 4, (5, 3, 1, 7)),
    Case(70, 200, 512),
    Case(64, 136, 100, (33, 31)),
    Case(48, 80, 16, (24, 24), count=12),
    Case(48, 81, 9, count=7),
    # Rank is summed up in several steps, whose size may not go by how many there are.
    Case(40, 72, 100, count=3),
    Case(96, 160, 16, layout="gaps"),
    Case(96, 160, 16, layout="offset"),
    Case(96, 160, 16, (40, 56), layout="offset", count=3),
    Case(300, 96, 16, transposed=True),
    Case(301, 97, 5, transposed=True, count=2),
]


def laid_out(tensor: torch.Tensor, layout: str, *, with_gaps: bool) -> torch.Tensor:
    """The same elements elsewhere in memory; what lies beside them is not finite."""
    rows, columns = tensor.shape
    gap, offset = 24 if layout == "gaps" and with_gaps else 0, 1 if layout == "offset" else 0
    memory = torch.full((rows * (columns + gap) + offset,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return memory[offset:].view(rows, columns + gap)[:, :columns].copy_(tensor)


def owners_of(case: Case, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    if not case.projections:
        return None
    owners = torch.zeros(case.rows, sum(rows > 0 for rows in case.projections), dtype=dtype)
    first, number = 0, 0
    while first < case.rows:
        rows = case.projections[number % len(case.projections)]
        if rows > 0:
            owners[first : first + rows, number % len(case.projections)] = 1
        first, number = first + abs(rows), number + 1
    return owners.to(device)


def drawn(
    case: Case, weight_dtype: torch.dtype, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[list[torch.Tensor], list[Factors]]:
    device = CUDA if device is None else device
    generator = torch.Generator().manual_seed(case.rows * 1000 + case.columns + case.rank)
    owners, weights, factors = owners_of(case, dtype, device), [], []
    wide = case.rank * (1 if owners is None else owners.shape[1])
    for _ in range(case.count):
        weight, left, right = (
            torch.randn(shape, generator=generator).to(device, kind)
            for shape, kind in (
                ((case.rows, case.columns), weight_dtype),
                ((case.rows, case.rank), dtype),
                ((wide, case.columns), dtype),
            )
        )
        if case.transposed:
            left, right = left.t().contiguous(), right.t().contiguous()
        else:
            left, right = (laid_out(each, case.layout, with_gaps=False) for each in (left, right))
        weights.append(laid_out(weight, case.layout, with_gaps=True))
        factors.append(Factors(left, right, owners, case, case.transposed))
    return weights, factors


def exact(weight: torch.Tensor, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum in float64, and that of the magnitudes of all that is added up in it."""
    w, left, right = (each.double().cpu() for each in (weight, *factors.multiplied()))
    if factors.owners is not None:
        owners = factors.owners.double().cpu()
        left = torch.cat([left * owners[:, i : i + 1] for i in range(owners.shape[1])], dim=1)
    return w + SCALING * (left @ right), w.abs() + SCALING * (left.abs() @ right.abs())


def assert_rounded_once(found: torch.Tensor, weight: torch.Tensor, factors: Factors) -> None:
    wanted, magnitude = exact(weight, factors)
    assert found.dtype == weight.dtype and found.shape == weight.shape and found.device == weight.device
    # Half the distance between neighbours of the result's dtype; and what fp32 loses, which tensor cores cut off where others round.
    _, exponent = torch.frexp(wanted)
    half_ulp = torch.ldexp(torch.full_like(wanted, torch.finfo(found.dtype).eps / 4), exponent)
    in_fp32 = magnitude * (factors.multiplied()[0].shape[1] + 4) * 2.0**-24
    off = (found.double().cpu() - wanted).abs()
    assert bool((off <= half_ulp + in_fp32).all()), f"{((off - in_fp32) / half_ulp).max()} halves of an ulp"


def assert_sums_are_rounded_once(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    weights, factors = drawn(case, *dtypes)
    before = [weight.clone() for weight in weights]
    for found, weight, of_one, kept in zip(merged(weights, factors, SCALING), weights, factors, before, strict=True):
        assert_rounded_once(found, weight, of_one)
        assert torch.equal(weight, kept), "the base was written to"


def assert_independent(dtypes: tuple[torch.dtype, torch.dtype], cases: Sequence[Case]) -> None:
    weights, factors = ([each for kind in kinds for each in kind] for kinds in zip(*(drawn(case, *dtypes) for case in cases), strict=True))
    together = merged(weights, factors, SCALING)
    backwards = merged(weights[::-1], factors[::-1], SCALING)[::-1]
    for number, (weight, of_one) in enumerate(zip(weights, factors, strict=True)):
        (alone,) = merged([weight], [of_one], SCALING)
        (elsewhere,) = merged([laid_out(weight, "offset", with_gaps=False)], [of_one], SCALING)
        for other in (backwards[number], alone, elsewhere):
            assert torch.equal(other, together[number]), f"{of_one.likeness}"


def assert_followed(dtypes: tuple[torch.dtype, torch.dtype], cases: Sequence[Case]) -> None:
    """Of several runs of a program each takes what there is, also where it has moved."""
    for case in cases:
        weights, factors = drawn(case, *dtypes)
        program = MergeProgram(weights, factors, SCALING)
        kept = []
        for trained in (weights[0], factors[-1].right):
            trained.mul_(2)
            for found, weight, of_one in zip(program.run(), weights, factors, strict=True):
                assert_rounded_once(found, weight, of_one)
        for moved in (weights[0], factors[-1].left, factors[0].right):
            kept.append(moved.data)
            moved.data = moved.clone()
            kept[-1].fill_(float("nan"))
            for found, weight, of_one in zip(program.run(), weights, factors, strict=True):
                assert_rounded_once(found, weight, of_one)


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """All that is merged here is merged by the kernel."""

    assert merge._fuses(CUDA), "the log says why not"

    def by_torch(*given):
        raise AssertionError("merged by torch, and not by the kernel")

    monkeypatch.setattr(merge, "_by_torch", by_torch)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_rounded_once(case, dtypes):
    assert_sums_are_rounded_once(case, dtypes)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_results_do_not_depend_on_what_is_merged_beside(dtypes):
    """Bit for bit, in any order and number, and wherever in memory they lie."""
    assert_independent(dtypes, [case for case in CASES if case.rank > 8])


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_program_follows_memory_that_moves(dtypes):
    assert_followed(dtypes, [case for case in CASES if case.count > 1])


@pytest.mark.gpu(1)
def test_merging_takes_the_memory_of_the_results():
    case = Case(2048, 2048, 32, (1024, 1024), count=8)
    weights, factors = drawn(case, torch.bfloat16, torch.bfloat16)
    merged(weights[:1], factors[:1], SCALING)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = merged(weights, factors, SCALING)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= sum(each.nbytes for each in results) + 2**20


@pytest.mark.gpu(1)
def test_shapes_have_no_programs_of_their_own():
    """Compiling takes about a second, and a model has dozens of shapes."""
    kernel, programs = merge._kernel(), []
    for rows, columns in ((64, 128), (200, 264), (72, 8), (1, 16)):
        merged(*drawn(Case(rows, columns, 16), torch.bfloat16, torch.bfloat16), SCALING)
        programs.append(len(kernel._merge_tiles.device_caches[CUDA.index][0]))
    assert len(set(programs)) == 1, programs


@pytest.mark.gpu(1)
def test_what_was_compiled_ahead_is_what_merges():
    kernel, kinds = merge._kernel(), [(case, *dtypes) for case in CASES for dtypes in DTYPES]
    for kind in kinds:
        weights, factors = drawn(*kind)
        merge.compile_ahead(weights, factors).join(120)
        before = len(kernel._merge_tiles.device_caches[CUDA.index][0])
        merged(weights, factors, SCALING)
        assert len(kernel._merge_tiles.device_caches[CUDA.index][0]) == before, kind


@pytest.mark.gpu(1)
def test_a_kernel_that_adds_something_else_is_found_out_and_not_taken(monkeypatch, caplog):
    monkeypatch.undo()  # torch's sums are what it is compared with
    enqueue = merge._enqueue
    assert merge._fuses.__wrapped__(CUDA) and not caplog.records
    monkeypatch.setattr(merge, "_enqueue", lambda given, scaling, form: enqueue(given, scaling * 1.02, form))
    assert not merge._fuses.__wrapped__(CUDA)
    (record,) = caplog.records
    assert "torch merges adapters" in record.getMessage() and "not close" in record.getMessage()
