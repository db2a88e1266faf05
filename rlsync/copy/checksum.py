"""Checksums of tensors, equal on every device. Owns the formula; knows no plan, no sync and no channel.

For ``n`` bytes ``b`` and their words ``w`` (signed 32-bit little-endian; the last one is padded with zero bytes)::

    checksum = n * LENGTH_WEIGHT + sum(w[i] * BASE**i)  mod 2**64

The words are half as wide as the weights on purpose. ``BASE = 5 mod 8`` makes every weight odd and ``BASE**k - 1`` divisible by
no more than four times the twos in ``k``; hence, within ``2**31`` words (8 GiB), any change of one word, any two flipped bits
and any swap of two unequal words change the checksum for certain. Anything else does but for accidents of about 2**-64 (2**-32
where nothing but topmost bits of words differ). Weights as wide as the words would see only the parity of the topmost bits:
two flipped signs would cancel.

``LENGTH_WEIGHT`` is odd, so that zeros added at the end are seen too. Integers only: no rounding, and no order of summation matters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

BASE = 0x9E3779B97F4A7C15
LENGTH_WEIGHT = 0xBF58476D1CE4E5B9
_MODULUS = 2**64
_WORD_BYTES = 4
# Words are weighed in rows of this length, by one small table of powers.
_ROW_WORDS = 2**13


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How a kind of device sums: words at a time, and the sums of rows (2-D int32) times powers (1-D int64), given scratch."""

    chunk_words: int
    weigh_rows: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def checksum(view: torch.Tensor) -> int:
    """64-bit checksum of the elements of a tensor in row-major order of its shape; in ``[0, 2**64)``.

    Any shape (0-dim and empty too), strides, device, and dtype whose elements are whole bytes. It depends on bytes alone:
    tensors of other shapes or dtypes with the same bytes have the same checksum, 0.0 and -0.0 have not.
    """
    return checksums((view,))[0]


@torch.no_grad()
def checksums(views: Sequence[torch.Tensor]) -> list[int]:
    """Checksums of many tensors, with one synchronisation for each device they lie on. Not collective."""
    assert sys.byteorder == "little"
    groups: dict[torch.device, list[int]] = {}
    for index, view in enumerate(views):
        groups.setdefault(view.device, []).append(index)
    values = [view.numel() * view.element_size() * LENGTH_WEIGHT for view in views]
    for device, indices in groups.items():
        scheme = _ON_CPU if device.type == "cpu" else _ON_DEVICE
        for index, value in zip(indices, _word_sums([views[i] for i in indices], scheme), strict=True):
            values[index] += value
    return [value % _MODULUS for value in values]


def _word_sums(views: Sequence[torch.Tensor], scheme: _Scheme) -> list[int]:
    """``sum(w[i] * BASE**i)`` of tensors of one device, modulo 2**64 and signed."""
    longest_bytes = max(view.numel() * view.element_size() for view in views)
    most_words = min(scheme.chunk_words, -(-longest_bytes // _WORD_BYTES))
    powers = _powers(BASE, min(_ROW_WORDS, most_words), views[0].device)
    scratch = torch.empty(most_words, dtype=torch.int64, device=views[0].device)
    return torch.stack([_word_sum(view, scheme, powers, scratch) for view in views]).tolist()


def _word_sum(view: torch.Tensor, scheme: _Scheme, powers: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    limit_bytes = scheme.chunk_words * _WORD_BYTES
    if view.numel() * view.element_size() <= limit_bytes:
        return _weigh(_words(view.contiguous()), scheme, powers, scratch)
    total, factor = torch.zeros((), dtype=torch.int64, device=view.device), 1
    for chunk in _chunks(view, limit_bytes):
        words = _words(chunk)
        total.add_(_weigh(words, scheme, powers, scratch), alpha=_signed(factor))
        factor = factor * pow(BASE, words.numel(), _MODULUS) % _MODULUS
    return total


def _weigh(words: torch.Tensor, scheme: _Scheme, powers: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """``sum(w[i] * BASE**i)`` of one chunk: whole rows by a table of the powers of their beginnings, and the rest."""
    count, width = words.numel(), powers.numel()
    if count <= width:
        return scheme.weigh_rows(words.view(1, count), powers[:count], scratch)[0]
    num_rows, rest = divmod(count, width)
    sums = scheme.weigh_rows(words[: count - rest].view(num_rows, width), powers, scratch)
    total = (sums * _powers(pow(BASE, width, _MODULUS), num_rows, words.device)).sum()
    if rest:
        last = scheme.weigh_rows(words[count - rest :].view(1, rest), powers[:rest], scratch)[0]
        total.add_(last, alpha=_signed(pow(BASE, count - rest, _MODULUS)))
    return total


def _chunks(view: torch.Tensor, limit_bytes: int) -> Iterator[torch.Tensor]:
    """The elements in order as contiguous tensors of at most ``limit_bytes``; all but the last have whole words."""
    if view.is_contiguous():
        flat, step = view.reshape(-1), limit_bytes // view.element_size()
        yield from (flat[i : i + step] for i in range(0, flat.numel(), step))
        return
    row_bytes = view[0].numel() * view.element_size()
    if limit_bytes >= _WORD_BYTES * row_bytes:
        step = limit_bytes // row_bytes // _WORD_BYTES * _WORD_BYTES
        yield from (view[i : i + step].contiguous() for i in range(0, len(view), step))
    elif row_bytes % _WORD_BYTES == 0:
        for row in view:
            yield from _chunks(row, limit_bytes)
    else:
        yield from _chunks(view.contiguous(), limit_bytes)


def _words(chunk: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes as 1-D int32, padded with zero bytes; a view where alignment and length allow."""
    flat = chunk.reshape(-1)
    # A single element may have any stride, and then it is no view of bytes.
    raw = (flat.clone(memory_format=torch.contiguous_format) if flat.numel() == 1 else flat).view(torch.uint8)
    padding = -raw.numel() % _WORD_BYTES
    if padding:
        raw = torch.nn.functional.pad(raw, (0, padding))
    elif raw.storage_offset() % _WORD_BYTES:
        raw = raw.clone()
    return raw.view(torch.int32)


def _powers(base: int, count: int, device: torch.device) -> torch.Tensor:
    """``base**0 .. base**(count - 1)`` modulo 2**64 as int64."""
    factors = torch.full((count,), _signed(base), dtype=torch.int64, device=device)
    factors[:1] = 1
    return factors.cumprod(0)


def _weigh_rows_on_cpu(rows: torch.Tensor, powers: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    return torch.mv(scratch[: rows.numel()].view(rows.shape).copy_(rows), powers)


def _weigh_rows_on_device(rows: torch.Tensor, powers: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """CUDA has no product of an integer matrix and a vector."""
    return torch.mul(rows, powers, out=scratch[: rows.numel()].view(rows.shape)).sum(1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned value."""
    return value - _MODULUS if value >= _MODULUS // 2 else value


# A chunk's scratch, twice as many bytes as its words, stays in a processor's last-level cache.
_ON_CPU = _Scheme(2**18, _weigh_rows_on_cpu)
# 16 MiB a round, so that launches do not count.
_ON_DEVICE = _Scheme(2**22, _weigh_rows_on_device)
