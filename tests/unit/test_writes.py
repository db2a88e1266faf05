"""Claims about bytes on their way to files: parts of several writers are a whole, and a failure in the background is told by name."""

from __future__ import annotations

import os
import random
import resource
import zlib
from pathlib import Path

import pytest
import torch

from rlsync.copy import writes
from rlsync.copy.torch_files import bytes_of, create_torch_file, places_of, tensors_in
from rlsync.copy.writes import DeferredWrites, DirectWrites, HostMemory, Written, damage, share_of
from rlsync.errors import CheckpointError
from tests.counted import num_calls

CONTENT = {
    "model": {"a": torch.arange(600.0).view(20, 30), "b": torch.arange(7).to(torch.bfloat16), "none": torch.empty(0)},
    "steps": [{"step": torch.tensor(3.0)}, (torch.tensor([True, False]), "text", 5)],
    "transposed": torch.arange(12).view(3, 4).t(),
}


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_equal_and_together_all(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.choice([0, 1, 5, 1000]) for _ in range(chance.randrange(12))]
    parts = chance.randrange(1, 9)
    found = [list(share_of(sizes, part, parts)) for part in range(parts)]
    begins = [sum(sizes[:index]) for index in range(len(sizes))]
    covered = [i for each in found for index, begin, end in each for i in range(begins[index] + begin, begins[index] + end)]
    assert covered == list(range(sum(sizes)))
    counts = [sum(end - begin for _, begin, end in each) for each in found]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("deferred", [False, True])
def test_a_file_of_torch_that_two_write_into_is_what_torch_would_have_written(tmp_path, monkeypatch, deferred: bool) -> None:
    monkeypatch.setattr(writes, "_PIECE_BYTES", 1000)  # pieces of host memory end within tensors
    monkeypatch.setattr(writes, "_ASIDE_BYTES", 500)
    written: list[Written] = []
    file = tmp_path / "x.pt"
    create_torch_file(file, CONTENT)
    assert torch.load(file, weights_only=True)["model"]["a"].eq(0).all()
    places, tensors = places_of(file), dict(tensors_in(CONTENT))
    assert list(places) == list(tensors)
    for part in range(2):
        writer = DeferredWrites(HostMemory(), summed=tmp_path) if deferred else DirectWrites(summed=tmp_path)
        for index, begin, end in share_of([bytes_of(tensor).numel() for tensor in tensors.values()], part, 2):
            where = list(tensors)[index]
            writer.put(file, places[where].begin + begin, bytes_of(tensors[where])[begin:end])
        writer.close(file)
        if isinstance(writer, DeferredWrites):
            writer.start()
            assert writer.wait()
        written += writer.written
    loaded = torch.load(file, weights_only=True)
    for (_, expected), (_, found) in zip(tensors_in(CONTENT), tensors_in(loaded), strict=True):
        assert expected.dtype == found.dtype and torch.equal(expected, found)
    assert loaded["steps"][1][1:] == ("text", 5)
    assert damage(written) == [] and sum(one.end - one.begin for one in written) == sum(bytes_of(t).numel() for t in tensors.values())
    whole = file.read_bytes()
    for one in written:
        file.write_bytes(whole[: one.end - 1] + bytes([whole[one.end - 1] ^ 128]) + whole[one.end :])
        assert damage(written) == damage([one]) and f"were written with {one.crc:08x}" in damage([one])[0]
    file.write_bytes(whole[: written[-1].end - 1])
    assert damage(written[-1:]) == [f"{file} ends at byte {written[-1].end - 1}, and was written to byte {written[-1].end}"]


def test_sums_of_more_files_than_a_process_may_open_are_compared(tmp_path) -> None:
    written = []
    for number in range(64):
        (tmp_path / str(number)).write_bytes(b"12345678")
        written += [Written(tmp_path / str(number), begin, begin + 4, zlib.crc32(b"12345678"[begin : begin + 4])) for begin in (0, 4)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    free = [number for number in range(max(taken) + 33) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[31] + 1, hard))
    try:
        assert damage(written) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_takes_as_much_work_among_many_as_among_few(tmp_path) -> None:
    """671B has 252 files of 45,395 tensors. Each that got its name was looked for among all that had been written."""
    work = []
    for count in (2, 100):
        folder = tmp_path / str(count)
        folder.mkdir()
        files = [folder / f"{number}.partial" for number in range(count)]
        for file in files:
            file.touch()

        def write(writer: DirectWrites, files: list[Path] = files) -> None:
            for file in files:
                for begin in range(5):
                    writer.put(file, begin, torch.zeros(1, dtype=torch.uint8))
                writer.close(file, file.with_suffix(".done"))

        with DirectWrites(durable=False, summed=tmp_path) as writer:
            work.append(num_calls(lambda: write(writer)) / count)
        assert [one.file for one in writer.written[::5]] == [file.with_suffix(".done") for file in files]
    assert work[1] < 1.5 * work[0], work


def test_what_is_put_may_change_before_it_is_written(tmp_path) -> None:
    (tmp_path / "x").touch()
    data, writer = torch.full((10,), 7, dtype=torch.uint8), DeferredWrites(HostMemory())
    writer.put(tmp_path / "x", 0, data)
    writer.close(tmp_path / "x", tmp_path / "y")
    data.zero_()
    writer.start()
    assert writer.wait() and (tmp_path / "y").read_bytes() == b"\7" * 10 and not (tmp_path / "x").exists()


@pytest.mark.parametrize(("path", "said"), [("/dev/full", "No space left on device"), ("/nowhere/x", "No such file")])
def test_a_failure_in_the_background_names_the_file_to_everyone_who_asks(path: str, said: str) -> None:
    writer = DeferredWrites(HostMemory())
    writer.put(Path(path), 0, torch.ones(10, dtype=torch.uint8))
    writer.close(Path(path))
    writer.start()
    for timeout_s in (None, 0.0):
        with pytest.raises(CheckpointError, match=rf"^{path}: cannot be written \({said}"):
            writer.wait(timeout_s)
