"""The CUDA copier on real memory: bit for bit what the CPU copier does, from one's own memory and from a peer's."""

from __future__ import annotations

import random

import pytest
import torch

from rlsync.copy.addresses import memory_ranges
from rlsync.copy.checksum import checksum, checksums
from rlsync.copy.checksum_programs import ChecksumPrograms
from rlsync.copy.cpu import CopyProgram
from rlsync.copy.cuda import CudaCopyProgram, strided
from rlsync.copy.tables import Move, Strided
from rlsync.errors import PlacementError
from tests.copy_pairs import Pairs, draw_pairs, give
from tests.signals import ends_a_wait

CUDA = torch.device("cuda", 0)
UNTOUCHED = 0xA5


class OnCuda:
    """Drawn pairs over two memories: destinations on the first GPU, sources on any."""

    def __init__(self, pairs: Pairs, seed: int, giver: torch.device = CUDA) -> None:
        self.pairs = pairs
        self.given = give(pairs, seed)
        self.given_there = self.given.to(giver)
        self.taken = torch.full((pairs.taken_bytes,), UNTOUCHED, dtype=torch.uint8, device=CUDA)

    def program(self, *, summed: bool) -> CudaCopyProgram:
        return CudaCopyProgram(
            [(d.over(self.taken), s.over(self.given_there)) for d, s in self.pairs.copies],
            [(d.over(self.taken), value) for d, value in self.pairs.constants],
            device=CUDA,
            summed=summed,
        )

    def expected(self) -> torch.Tensor:
        """All bytes of the destination's memory after the CPU copier."""
        taken = torch.full((self.pairs.taken_bytes,), UNTOUCHED, dtype=torch.uint8)
        CopyProgram((d.over(taken), s.over(self.given)) for d, s in self.pairs.copies).run()
        for drawn, value in self.pairs.constants:
            drawn.over(taken).fill_(value)
        return taken

    def sums(self) -> list[int]:
        views = [s.over(self.given).to(getattr(torch, d.dtype)) for d, s in self.pairs.copies]
        return checksums([view.clone(memory_format=torch.contiguous_format) for view in views])


def assert_equal_to_the_cpu_copier(seed: int, count: int, most_elements: int, giver: torch.device) -> None:
    bound = OnCuda(draw_pairs(random.Random(seed), count, most_elements=most_elements), seed, giver)
    expected, sums = bound.expected(), bound.sums()
    for summed in (False, True):
        bound.taken.fill_(UNTOUCHED)
        program = bound.program(summed=summed)
        program.run()
        assert torch.equal(bound.taken.cpu(), expected), (seed, summed)
        if summed:
            assert program.checksums() == sums, seed


@pytest.mark.gpu(1)
@pytest.mark.parametrize("in_bulk", [True, False])
@pytest.mark.parametrize(("seeds", "count", "most_elements"), [(range(40), 60, 6_000), (range(40, 44), 12, 1_500_000)])
def test_random_plans_are_copied_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, seeds: range, count: int, most_elements: int, in_bulk: bool
) -> None:
    """With bulk copies where the GPU has them, and through registers, as GPUs without them do."""
    if not in_bulk:
        monkeypatch.setattr("rlsync.copy.kernel.BULK_CAPABILITY", (99, 0))
    for seed in seeds:
        assert_equal_to_the_cpu_copier(seed, count, most_elements, CUDA)


@pytest.mark.gpu(2)
def test_random_plans_are_pulled_from_a_peer_bit_for_bit() -> None:
    for seed in range(20):
        assert_equal_to_the_cpu_copier(seed, 60, 6_000, torch.device("cuda", 1))


@pytest.mark.gpu(1)
def test_one_flipped_bit_of_a_source_is_seen() -> None:
    """The comparison of bytes and that of checksums each fail for it, in the pair that it lies in."""
    source = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device=CUDA)
    destination = torch.zeros_like(source)
    half = len(source) // 2
    program = CudaCopyProgram(
        [(destination[:half], source[:half]), (destination[half:], source[half:])], device=CUDA, summed=True
    )  # fmt: skip
    program.run()
    before, copied = program.checksums(), destination.clone()
    source[half + 12345] ^= 64
    program.run()
    after = program.checksums()
    assert before[0] == after[0] and before[1] != after[1]
    assert (destination != copied).nonzero().tolist() == [[half + 12345]]
    assert after == [checksum(source[:half].cpu()), checksum(source[half:].cpu())]


@pytest.mark.gpu(1)
def test_what_has_no_destination_is_only_summed_up() -> None:
    source = torch.randn(1000, 37, device=CUDA).to(torch.bfloat16)
    views = [source, source.t(), source[:, 3:20], source[::7]]
    program = CudaCopyProgram([(None, view) for view in views], device=CUDA, summed=True)
    assert program.run() == 0
    assert program.checksums() == checksums([view.cpu() for view in views])


@pytest.mark.gpu(1)
def test_a_cast_rounds_as_the_cpu_does_and_keeps_nans() -> None:
    """Every bfloat16 and float16, and floats around every boundary between two bfloat16 or float16."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    ends = torch.tensor([0, 1, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    around = (torch.arange(2**16)[:, None] * 2**16 + ends).reshape(-1)
    values = {
        torch.bfloat16: halves.view(torch.bfloat16),
        torch.float16: halves.view(torch.float16),
        torch.float32: torch.where(around >= 2**31, around - 2**32, around).to(torch.int32).view(torch.float32),
    }
    for given, source in values.items():
        for taken in values.keys() - {given}:
            destination = torch.zeros(source.shape, dtype=taken, device=CUDA)
            CudaCopyProgram([(destination, source.to(CUDA))], device=CUDA).run()
            found, expected = destination.cpu(), source.to(taken)
            size = torch.int16 if taken.itemsize == 2 else torch.int32
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.view(size)[~found.isnan()], expected.view(size)[~found.isnan()]), (given, taken)


@pytest.mark.gpu(1)
def test_offsets_beyond_32_bits_are_reached() -> None:
    """Rows five GiB apart, and a contiguous copy of more than four GiB."""
    source = torch.empty(5 * 2**30 + 4096, dtype=torch.uint8, device=CUDA)
    for begin in range(0, len(source), 2**28):
        source[begin : begin + 2**28].random_(0, 256)
    whole, rows = torch.zeros_like(source), torch.zeros(2, 4096, dtype=torch.uint8, device=CUDA)
    program = CudaCopyProgram([(whole, source), (rows, source.as_strided((2, 4096), (5 * 2**30, 1)))], device=CUDA)
    assert program.run() == len(source) + rows.numel()
    assert torch.equal(whole, source)
    assert torch.equal(rows, torch.stack([source[:4096], source[-4096:]]))


@pytest.mark.gpu(1)
def test_a_program_is_replayed_on_the_stream_that_is_named() -> None:
    """It comes after what was enqueued there, however long that takes, and does not wait for torch's current stream."""
    source, destination = torch.zeros(1 << 22, device=CUDA), torch.zeros(1 << 22, device=CUDA)
    program = CudaCopyProgram([(destination, source)], device=CUDA, summed=True)
    torch.cuda.synchronize()
    side, main = torch.cuda.Stream(CUDA), torch.cuda.current_stream(CUDA)
    for version in (1.0, 2.0):
        torch.cuda._sleep(2_000_000_000)
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            source.fill_(version)
        program.run(side)
        found = program.checksums()
        assert not main.query(), "the program waited for a stream that it was not enqueued on"
        assert found == [checksum(torch.full((1 << 22,), version))]
        assert (destination == version).all().item()
    source.fill_(3.0)
    program.run()
    assert (destination == 3.0).all().item()


@pytest.mark.gpu(1)
def test_sources_move_without_new_tables() -> None:
    memory = torch.randint(0, 256, (3, 1 << 16), dtype=torch.uint8, device=CUDA)
    destination = torch.zeros(2, 1 << 15, dtype=torch.uint8, device=CUDA)
    base = strided(memory[0])
    program = CudaCopyProgram(
        [(destination[0], base.region(0, (1 << 15,), (1,))), (destination[1], base.region(1 << 15, (1 << 15,), (1,)))], device=CUDA
    )
    program.run()
    assert torch.equal(destination.reshape(-1), memory[0])
    program.move_sources([Move(base.address, 1 << 15, memory[2].data_ptr())])
    program.run()
    assert torch.equal(destination, torch.stack([memory[2, : 1 << 15], memory[0, 1 << 15 :]]))


@pytest.mark.gpu(1)
def test_views_that_are_not_on_the_device_are_refused() -> None:
    here, host = torch.zeros(4, device=CUDA), torch.zeros(4)
    for pair in ((here, host), (host, here)):
        with pytest.raises(PlacementError, match="cpu"):
            CudaCopyProgram([pair], device=CUDA)


@pytest.mark.gpu(2)
def test_destinations_on_another_gpu_are_refused() -> None:
    here, away = torch.zeros(4, device=CUDA), torch.zeros(4, device="cuda:1")
    with pytest.raises(PlacementError, match="a CUDA copy on cuda:0 was given destinations on cuda:1"):
        CudaCopyProgram([(away, here)], device=CUDA)


@pytest.mark.gpu(1)
def test_addresses_do_as_well_as_tensors() -> None:
    source = torch.randn(64, 96, device=CUDA).to(torch.bfloat16)
    destination = torch.zeros_like(source)
    given = Strided(source.data_ptr(), "bfloat16", (64, 32), (96, 1))
    taken = Strided(destination.data_ptr(), "bfloat16", (64, 32), (96, 1))
    assert CudaCopyProgram([(taken, given)], device=CUDA).run() == 64 * 32 * 2
    assert torch.equal(destination[:, :32], source[:, :32])
    assert not destination[:, 32:].any()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("shift", [0, 4096, 8])
def test_sums_follow_memory_that_moves(shift: int) -> None:
    """By whole units in the tables that are there, otherwise in new ones."""
    sums, memory = ChecksumPrograms(), torch.randint(0, 256, (2**16,), dtype=torch.uint8, device=CUDA)
    for begin, fresh in ((0, False), (shift, True)):
        if fresh:
            memory.random_(0, 256)
        pieces = [memory[begin + i * 6000 :][: 512 * (i + 1)].view(torch.bfloat16) for i in range(3)]
        found = sums.begin("key", [0], memory_ranges(pieces), lambda number, pieces=pieces: pieces).values()
        assert found == checksums([piece.cpu() for piece in pieces])


@pytest.mark.gpu(1)
def test_signals_are_heard_where_the_kernel_was_compiled() -> None:
    """The runtime compiler is asked in every process, also where cupy keeps the machine code. The second is the negative control."""
    build = "x = torch.zeros(4, device='cuda:0')\nCudaCopyProgram([(x, x.clone())], device=x.device).run()"
    assert ends_a_wait(f"import torch\nfrom rlsync.copy.cuda import CudaCopyProgram\n{build}", wait_s=60)
    assert not ends_a_wait("import cupy\ncupy.RawKernel('extern \"C\" __global__ void f() {}', 'f').compile()", wait_s=0.5)
