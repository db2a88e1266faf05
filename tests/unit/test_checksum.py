"""Claims about checksums: the formula, what certainly changes it, and that every way of computing it gives one value."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsync.copy import checksum as module
from rlsync.copy.checksum import BASE, LENGTH_WEIGHT, checksum, checksums
from rlsync.layout.geometry import DTYPE_BYTES

DTYPES = sorted(DTYPE_BYTES)


def formula(raw: bytes) -> int:
    """The formula of the module's first lines, word by word."""
    padded = raw + bytes(-len(raw) % 4)
    words = [int.from_bytes(padded[i : i + 4], "little", signed=True) for i in range(0, len(padded), 4)]
    return (len(raw) * LENGTH_WEIGHT + sum(w * pow(BASE, i, 2**64) for i, w in enumerate(words))) % 2**64


def bytes_of(tensor: torch.Tensor) -> bytes:
    # A copy, because a single element is contiguous with any strides.
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def of_bytes(raw: bytes, dtype: str = "uint8") -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(getattr(torch, dtype)) if raw else torch.empty(0, dtype=torch.uint8)


def noise(shape: tuple[int, ...], dtype: str, seed: int = 0) -> torch.Tensor:
    count = DTYPE_BYTES[dtype] * torch.Size(shape).numel()
    raw = random.Random(seed).randbytes(count)
    if dtype == "bool":
        raw = bytes(b & 1 for b in raw)
    return of_bytes(raw).view(getattr(torch, dtype)).view(shape) if count else torch.empty(shape, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 7), (2, 0, 3), (3, 5, 7)])
def test_every_dtype_and_shape_follows_the_formula(dtype, shape):
    tensor = noise(shape, dtype)
    assert checksum(tensor) == formula(bytes_of(tensor))
    assert tensor.dim() < 2 or checksum(tensor.transpose(0, 1)) == formula(bytes_of(tensor.transpose(0, 1)))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(1, 7), min_size=1, max_size=4), st.data())
def test_a_view_has_the_checksum_of_its_elements_in_order(dtype, shape, data):
    view = noise(tuple(shape), dtype, seed=data.draw(st.integers(0, 9)))
    for dim in range(view.dim()):
        begin = data.draw(st.integers(0, view.shape[dim]))
        view = view.narrow(dim, begin, data.draw(st.integers(0, view.shape[dim] - begin)))
    view = view.permute(data.draw(st.permutations(range(view.dim()))))
    assert checksum(view) == formula(bytes_of(view))


@pytest.mark.parametrize("chunk_words", [8, 64])
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t,
        lambda t: t[1:],
        lambda t: t[:, 1:8],
        lambda t: t[:, :3],
        lambda t: t[:3].t(),
        lambda t: t.t()[2:],
        lambda t: t.view(5, 11, 3, 23)[:, 1:, 1],
    ],
)
def test_chunks_rows_and_devices_do_not_show(monkeypatch, chunk_words, dtype, cut):
    """With chunks of a few words every path is taken: whole rows, rows in groups, rows one by one, odd row sizes."""
    view = cut(noise((55, 69), dtype))
    expected = formula(bytes_of(view))
    monkeypatch.setattr(module, "_ROW_WORDS", 8)
    for weigh_rows in (module._weigh_rows_on_cpu, module._weigh_rows_on_device):
        monkeypatch.setattr(module, "_ON_CPU", module._Scheme(chunk_words, weigh_rows))
        assert checksum(view) == expected


def test_a_tensor_of_several_chunks_has_the_same_value_by_either_scheme():
    view = torch.randint(-(2**63), 2**63 - 1, (300_001,), generator=torch.Generator().manual_seed(0))
    assert view.numel() * 2 > 2 * module._ON_CPU.chunk_words
    chunks = [bytes_of(part) for part in view.split(50_000)]
    # By the formula itself, a tensor's checksum is that of its parts, each moved to its place.
    moved = sum((formula(c) - len(c) * LENGTH_WEIGHT) * pow(BASE, 100_000 * i, 2**64) for i, c in enumerate(chunks))
    assert checksum(view) == (moved + view.numel() * 8 * LENGTH_WEIGHT) % 2**64
    by_device = module._word_sums([view], module._ON_DEVICE)[0]
    assert (by_device + view.numel() * 8 * LENGTH_WEIGHT) % 2**64 == checksum(view)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_single_flipped_bit_changes_it(dtype):
    raw = bytearray(bytes_of(noise((21,), dtype)))
    before = checksum(of_bytes(raw))
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        assert checksum(of_bytes(flipped)) != before


def test_any_two_flipped_bits_change_it():
    """Weights as wide as the words would lose pairs of their topmost bits, as the control shows."""
    raw, before = bytes(32), formula(bytes(32))
    tops = []
    for first in range(256):
        for second in range(first):
            flipped = bytearray(raw)
            flipped[first // 8] ^= 1 << first % 8
            flipped[second // 8] ^= 1 << second % 8
            assert formula(bytes(flipped)) != before
            wide = [int.from_bytes(flipped[i : i + 8], "little") for i in range(0, 32, 8)]
            if sum(w * pow(BASE, i, 2**64) for i, w in enumerate(wide)) % 2**64 == 0:
                tops.append((first % 64, second % 64))
    assert tops and set(tops) == {(63, 63)}


def test_the_weights_keep_what_the_proof_needs():
    """Every weight is odd, and the difference of two is divisible by four times the twos in their distance, no more."""
    assert BASE % 8 == 5 and LENGTH_WEIGHT % 2 == 1
    for exponent in range(31):
        for odd in (1, 3, 12345):
            difference = pow(BASE, odd << exponent, 2**64) - 1
            assert (difference & -difference).bit_length() - 1 == exponent + 2 if exponent + 2 < 64 else difference == 0
    assert pow(BASE, 2**30, 2**33) != 1, "within 2**31 words two weights differ in their lowest 33 bits"


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=8, max_size=80), st.data())
def test_swapped_unequal_words_change_it(raw, data):
    count = len(raw) // 4
    i, j = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count - 1))
    swapped = bytearray(raw)
    swapped[4 * i : 4 * i + 4], swapped[4 * j : 4 * j + 4] = raw[4 * j : 4 * j + 4], raw[4 * i : 4 * i + 4]
    assert (checksum(of_bytes(swapped)) != checksum(of_bytes(raw))) == (bytes(swapped) != raw)


@given(st.binary(max_size=40), st.integers(1, 40))
def test_zeros_at_the_end_are_seen(raw, count):
    assert checksum(of_bytes(raw + bytes(count))) != checksum(of_bytes(raw))


def test_signs_of_zero_and_patterns_of_nan_are_seen():
    zero, nan = torch.zeros(4), torch.full((4,), float("nan"))
    assert checksum(zero) != checksum(-zero)
    other = nan.clone()
    other.view(torch.int32)[2] ^= 1
    assert other[2].isnan() and checksum(other) != checksum(nan)


def test_many_views_are_summed_as_one_by_one_and_parameters_need_no_detaching():
    views = [noise((n, 3), dtype, seed=n)[1:] for n, dtype in enumerate(DTYPES, start=1)]
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    views.append(parameter.t())
    assert checksums(views) == [checksum(v) for v in views]
    assert checksums([]) == []
    assert len(set(checksums(views[3:]))) == len(views) - 3


@pytest.mark.gpu(1)
def test_a_gpu_gives_the_value_of_the_cpu():
    tensors = [noise(shape, dtype) for dtype in DTYPES for shape in [(), (0,), (3,), (55, 69), (3000, 2048)]]
    views = [v for t in tensors for v in (t, *((t.t()[1:], t[:, 1:]) if t.dim() == 2 else ()))]
    assert checksums([v.cuda() if v.is_contiguous() else v.T.cuda().T for v in views]) == checksums(views)


def test_a_single_element_of_any_stride_counts_as_itself():
    one = torch.tensor([1.5], dtype=torch.float16)
    assert checksum(torch.full((3, 1), 1.5, dtype=torch.float16).as_strided((1,), (0,))) == checksum(one)
    assert checksum(one) != checksum(-one)
