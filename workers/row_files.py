"""Rows of data files, read one at a time from where they lie: what of a million rows is in memory is where each begins.

Owns the file forms (JSON lines, JSON arrays), folders of them, the order of rows in an epoch and the fingerprint of the files.
Knows no field of a row, no tokenizer, torch or Ray, so that ``workers.check`` may use it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from rlsync.errors import ConfigError

Integers = NDArray[np.int64]

SUFFIXES = (".json", ".jsonl", ".parquet")
FORMS = "a .json file holds one array of objects, a .jsonl file an object a line"
BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 2**22
# Row groups of Parquet files are shuffled together up to this size, and as much is kept in memory.
_WINDOW_BYTES = 2**26
# First bytes of files that are often taken for text.
PARQUET = b"PAR1"
# What pyarrow raises for damaged files, and for values that Python has not: text that is not UTF-8, a date of year 300000.
_PYARROW_ERRORS = (OSError, ValueError, TypeError, ArithmeticError, LookupError, NotImplementedError)
BINARY = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"ARRO": "Arrow"}


class BadRow(Exception):
    """Why a row cannot be used."""


class _File(Protocol):
    """One data file.

    Attributes:
        path: as given, or below the folder that was given.
        num_rows: rows in it.
        digest: of its content, or of a description that tells it from others.
    """

    @property
    def path(self) -> Path: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def digest(self) -> bytes: ...

    @property
    def blocks(self) -> tuple[Integers, Integers]:
        """First rows of what is read together, and their bytes in memory; zero where rows are read one by one."""
        ...

    def read(self, row: int) -> Any:
        """Content of a row; raises BadRow."""
        ...

    def where(self, row: int) -> str:
        """File and row for people, as an editor counts."""
        ...


def find_files(paths: Sequence[str]) -> list[Path]:
    """Data files in their order: each path that is a file, and, sorted by name, all data files below each that is a folder.

    Raises:
        ConfigError: a path does not exist, or a folder holds no data file.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ConfigError(f"data file {path} does not exist (seen from {Path.cwd()})")
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not inside:
                raise ConfigError(f"data folder {path} holds no file named {', '.join('*' + suffix for suffix in SUFFIXES)}")
            found += inside
        else:
            found.append(path)
    return found


class RowFiles:
    """The rows of several files under one number each, in file order.

    Raises:
        ConfigError: a file is missing, is not of a form that is read, or holds no row.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._files = [_open(path) for path in find_files(paths)]
        self._firsts = np.cumsum([0, *(file.num_rows for file in self._files)])
        blocks = [file.blocks for file in self._files]
        self._block_firsts = np.concatenate([rows + first for (rows, _), first in zip(blocks, self._firsts, strict=False)])
        self._block_bytes = np.concatenate([num_bytes for _, num_bytes in blocks])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def read(self, row: int) -> tuple[str, Any]:
        """File and row for people, and the content, or the BadRow that says why there is none."""
        file, inside = self._locate(row)
        try:
            return file.where(inside), file.read(inside)
        except BadRow as reason:
            return file.where(inside), reason

    def where(self, row: int) -> str:
        """File and row for people."""
        file, inside = self._locate(row)
        return file.where(inside)

    def folder(self, row: int) -> Path:
        """The folder of the row's file; paths in the row are relative to it."""
        return self._locate(row)[0].path.parent

    def order(self, epoch: int, *, shuffle: bool, seed: int) -> Integers:
        """Row numbers of an epoch. The order depends on (seed, epoch) only.

        Rows that can be read one by one are shuffled over all of the data. A row group of a Parquet file is read as a whole, so groups
        are shuffled, and rows within as many groups as fit into memory.
        """
        if not shuffle:
            return np.arange(len(self))
        random = np.random.Generator(np.random.PCG64((seed, epoch)))
        if not self._block_bytes.any():
            return random.permutation(len(self))
        blocks = random.permutation(len(self._block_bytes))
        before = np.cumsum(self._block_bytes[blocks]) - self._block_bytes[blocks]
        window = np.empty_like(blocks)
        window[blocks] = before // _WINDOW_BYTES
        sizes = np.diff(self._block_firsts, append=len(self))
        return np.lexsort((random.permutation(len(self)), np.repeat(window, sizes)))

    def fingerprint(self) -> str:
        """Hash of all files' content in their order, wherever they lie; of Parquet files, of what their footers say of it."""
        return hashlib.blake2b(b"".join(file.digest for file in self._files), digest_size=16).hexdigest()

    def _locate(self, row: int) -> tuple[_File, int]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        index = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self._files[index], row - int(self._firsts[index])


def _open(path: Path) -> _File:
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
        for mark, name in BINARY.items():
            if start.startswith(mark):
                raise ConfigError(f"data file {path} is a {name} file; JSONL, JSON and Parquet are read, so convert it first")
        is_parquet = start == PARQUET
        if is_parquet != (path.suffix == ".parquet"):
            raise ConfigError(f"data file {path} is {'' if is_parquet else 'not '}a Parquet file; name such files, and no others, .parquet")
        file: _File = ParquetFile(path) if is_parquet else _array(path) if path.suffix == ".json" else _lines(path)
    except OSError as error:
        raise ConfigError(f"data file {path} cannot be read: {error.strerror}") from None
    if file.num_rows == 0:
        raise ConfigError(f"{path}: no rows in this file")
    return file


@dataclass(frozen=True)
class _JsonFile:
    """JSON values at byte ranges of a file. ``lines``: the line of each; None where rows are counted."""

    path: Path
    starts: Integers
    ends: Integers
    lines: Integers | None
    digest: bytes

    @property
    def num_rows(self) -> int:
        return len(self.starts)

    @property
    def blocks(self) -> tuple[Integers, Integers]:
        return np.arange(self.num_rows), np.zeros(self.num_rows, np.int64)

    def read(self, row: int) -> Any:
        start, end = int(self.starts[row]), int(self.ends[row])
        with self.path.open("rb") as stream:
            stream.seek(start)
            return parse_json(stream.read(end - start))

    def where(self, row: int) -> str:
        return f"{self.path}[{row}]" if self.lines is None else f"{self.path}:{self.lines[row]}"


def parse_json(line: bytes) -> Any:
    """A JSON value; raises BadRow that says what is wrong with it."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of too many digits
        raise BadRow(f"not JSON that can be read: {error}") from None


def read_json(line: bytes) -> Any:
    """A JSON value, or the BadRow that says why there is none."""
    try:
        return parse_json(line)
    except BadRow as reason:
        return reason


def kind_of(value: Any) -> str:
    """A value of a row for messages: in full where it is a word of JSON's own."""
    if value is None or isinstance(value, (bool, float)):
        return json.dumps(value)
    return {dict: "an object", list: "a list", str: "a string", int: "a number", bytes: "bytes"}.get(type(value), type(value).__name__)


def is_number(value: Any) -> bool:
    """Whether it is a number that text can be made of; a whole one may be larger than floats are."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value))


def _lines(path: Path) -> _JsonFile:
    """Where the lines of a file lie that are not blank."""
    digest, offset, breaks = hashlib.blake2b(digest_size=16), 0, [np.array([-1])]
    with path.open("rb") as stream:
        begin = len(BOM) if stream.read(len(BOM)) == BOM else 0
        stream.seek(0)
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset)
            offset += len(chunk)
        ends = np.concatenate([*breaks[1:], [offset]])
        starts = np.concatenate(breaks) + 1
        starts[0] = begin
        # Only lines as short as blank ones may be are looked at.
        is_row = ends > starts
        for i in np.flatnonzero(is_row & (ends - starts < 16)):
            stream.seek(int(starts[i]))
            is_row[i] = bool(stream.read(int(ends[i] - starts[i])).strip())
    kept = np.flatnonzero(is_row)
    return _JsonFile(path, starts[kept], ends[kept], kept + 1, digest.digest())


_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


def _array(path: Path) -> _JsonFile:
    """Where the elements of a file's array lie. What they hold is found out when they are read."""
    if path.stat().st_size == 0:
        raise ConfigError(f"{path}: is empty; {FORMS}")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        begin = len(BOM) if content[: len(BOM)] == BOM else 0
        first = re.compile(rb"\S").search(content, begin)
        if first is None or first.group() != b"[":
            raise ConfigError(f"{path}: holds no array; {FORMS}")
        commas, end = [first.start()], None
        depth = 0
        for token in _tokens(content, begin):
            mark = token.group()
            if mark in b"[{":
                depth += 1
            elif mark in b"]}":
                depth -= 1
                if depth == 0:
                    end = token.start()
                    break
            elif mark == b"," and depth == 1:
                commas.append(token.start())
        if end is None or content[end + 1 :].strip():
            raise ConfigError(f"{path}: not JSON: {'the array does not end' if end is None else 'something follows the array'}; {FORMS}")
        digest = hashlib.blake2b(digest_size=16)
        for at in range(0, len(content), _CHUNK_BYTES):
            digest.update(content[at : at + _CHUNK_BYTES])
        if len(commas) == 1 and not content[commas[0] + 1 : end].strip():
            commas = []
    starts = np.array(commas, dtype=np.int64) + 1
    return _JsonFile(path, starts, np.array([*commas[1:], end], dtype=np.int64)[: len(starts)], None, digest.digest())


def _tokens(content: mmap.mmap, begin: int) -> Iterator[re.Match[bytes]]:
    """Brackets and commas outside of strings."""
    return (token for token in _TOKEN.finditer(content, begin) if not token.group().startswith(b'"'))


class ParquetFile:
    """Rows of a Parquet file, which is read by row groups. Of those a process keeps what fits into a window.

    Raises:
        ConfigError: pyarrow is not installed, or the file is damaged.
    """

    # (path, group) -> table, of all files of this process, the last one that was read at the end.
    _tables: ClassVar[OrderedDict[tuple[Path, int], Any]] = OrderedDict()

    def __init__(self, path: Path) -> None:
        self.path = path
        parquet = _pyarrow_parquet(path)
        try:
            with parquet.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            self.digest = _digest_of_footer(path)
        except _PYARROW_ERRORS as error:
            raise ConfigError(f"data file {path} cannot be read: {str(error).splitlines()[0]}") from None
        if any(group.num_rows < 0 or group.total_byte_size < 0 for group in groups):
            raise ConfigError(f"data file {path} cannot be read: a row group of it has fewer rows or bytes than none, so it is damaged")
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self._bytes = np.array([group.total_byte_size for group in groups], dtype=np.int64)
        self.num_rows = int(self._ends[-1]) if groups else 0

    @property
    def blocks(self) -> tuple[Integers, Integers]:
        return np.concatenate([[0], self._ends[:-1]]).astype(np.int64), np.maximum(self._bytes, 1)

    def read(self, row: int) -> Any:
        group = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        table = self._table(group)
        try:
            return table.slice(row - first, 1).to_pylist()[0]
        except _PYARROW_ERRORS as error:
            raise BadRow(f"not a row that can be read: {str(error).splitlines()[0]}") from None

    def where(self, row: int) -> str:
        return f"{self.path}[{row}]"

    def _table(self, group: int) -> Any:
        tables, name = ParquetFile._tables, (self.path, group)
        if name in tables:
            tables.move_to_end(name)
            return tables[name]
        try:
            with _pyarrow_parquet(self.path).ParquetFile(self.path) as file:
                table = file.read_row_group(group, use_threads=False)
        except _PYARROW_ERRORS as error:
            raise BadRow(f"row group {group} cannot be read: {str(error).splitlines()[0]}") from None
        tables[name] = table
        # At the border of two windows groups of both are asked for.
        while len(tables) > 1 and sum(held.nbytes for held in tables.values()) > 2 * _WINDOW_BYTES:
            tables.popitem(last=False)
        return table


def _digest_of_footer(path: Path) -> bytes:
    """Its schema, and offsets, sizes and extremes of every column's chunks, tell Parquet files apart without reading them."""
    with path.open("rb") as stream:
        stream.seek(-8, os.SEEK_END)  # the footer's length, and PAR1
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, os.SEEK_END)
        return hashlib.blake2b(stream.read(length), digest_size=16).digest()


def _pyarrow_parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"data file {path} is a Parquet file, which needs pyarrow: pip install pyarrow") from None
    return pyarrow.parquet
