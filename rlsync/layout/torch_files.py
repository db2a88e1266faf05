"""Where tensors lie in files that ``torch.save`` wrote, read without torch: nothing of a file is run, and no tensor is opened.

A pickle is a program. The one in such a file may call what rebuilds tensors, which here notes where they lie, and containers; every other
class or function that it names is an :class:`Opaque` thing, which keeps what it is given and does nothing.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from rlsync.errors import CheckpointError
from rlsync.layout.geometry import DTYPE_BYTES, TensorSpec, contiguous_strides
from rlsync.layout.safetensors import StoredTensor

# By the class of a storage, as in the program of a file.
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "Float8_e4m3fnStorage": "float8_e4m3fn", "Float8_e5m2Storage": "float8_e5m2", "UntypedStorage": "uint8",
}  # fmt: skip
# Signatures of a zip archive's parts, and how many bytes of content are summed up at once.
_DIRECTORY_ENTRY, _DESCRIPTOR = b"PK\x01\x02", b"PK\x07\x08"
_SUMMED_BYTES = 16 * 2**20
# A program larger than this is none: tensors are not in it (a checkpoint of 10,000 parameters has 2 MB).
_MAX_PROGRAM_BYTES = 1 << 30


class Opaque:
    """An object of a class that is not read: ``kind`` names it, ``state`` is what it was given to restore itself from."""

    kind = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.state = args, kwargs

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """As a list is filled."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """As a mapping is filled."""

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def opaque(module: str, name: str) -> type[Opaque]:
    """What stands for the class or function ``name`` of ``module``."""
    # A pickle makes some objects by __new__ alone, with arguments.
    made = {"kind": f"{module}.{name}", "args": (), "state": {}, "__new__": lambda cls, *args, **kwargs: object.__new__(cls)}
    return type("Opaque", (Opaque,), made)


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor of a file: ``shape`` and ``strides`` in elements, and the byte of its file at which the first one lies."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    file: Path
    begin: int

    def stored(self, name: str) -> StoredTensor:
        """The tensor under a name. Raises CheckpointError where its elements do not lie in order: no trainer saves such parameters."""
        sizes = [step for step, size in zip(self.strides, self.shape, strict=True) if size != 1]
        if sizes != [step for step, size in zip(contiguous_strides(self.shape), self.shape, strict=True) if size != 1]:
            raise CheckpointError(f"{self.file}: {name} {self.shape} has strides {self.strides}; save it contiguous")
        spec = TensorSpec(name, self.dtype, self.shape)
        return StoredTensor(spec, self.file, self.begin, self.begin + spec.nbytes)


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    begin: int
    end: int


def read_torch_file(path: Path, *, begin: int = 0, end: int | None = None) -> Any:
    """What ``torch.save`` wrote to a file, or to ``[begin, end)`` of it, with a :class:`TensorView` in the place of each tensor.

    Raises CheckpointError for what is damaged, truncated, or was written in torch's form of before 2020.
    """
    try:
        with path.open("rb") as file:
            section = _Section(file, begin, end)
            with zipfile.ZipFile(section) as archive:
                return _read(archive, section, path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a file of torch.save, or is truncated ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path}: damaged, or not of torch.save ({type(error).__name__}: {error})") from None


def _read(archive: zipfile.ZipFile, section: _Section, path: Path) -> Any:
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in entries:
        raise CheckpointError(f"{path} is an archive, but not of torch.save")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise CheckpointError(f"{path}: its numbers are big-endian; save it on a little-endian machine")
    if entries["data.pkl"].file_size > _MAX_PROGRAM_BYTES:
        raise CheckpointError(f"{path}: a pickle of {entries['data.pkl'].file_size} bytes, which is no checkpoint's")

    def storage(key: str, dtype: str, numel: int) -> _Storage:
        info = entries[f"data/{key}"]
        nbytes = numel * DTYPE_BYTES[dtype]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < nbytes:
            raise CheckpointError(f"{path}: storage {key} of {nbytes} bytes has {info.file_size} in the file, or is compressed")
        first = section.begin + _content(section, info.header_offset)
        if first + nbytes > section.begin + section.size:
            raise CheckpointError(f"{path}: truncated: storage {key} ends at byte {first + nbytes}")
        return _Storage(dtype, first, first + nbytes)

    return restricted(archive.read(entries["data.pkl"]), _rebuilders(path), storage)


def _content(section: _Section, header: int) -> int:
    """Where the content of an entry begins: after a header of 30 bytes, a name and fields of lengths that it says."""
    section.seek(header + 26)
    lengths = section.read(4)
    return header + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def write_checksums(path: Path, *, begin: int = 0, end: int | None = None) -> None:
    """Write the CRC of every storage of a file of ``torch.save``, or of ``[begin, end)`` of it, whose elements came after its form.

    torch reads files without looking at them; unzip and Python's zipfile call a wrong one damage.
    """
    with path.open("r+b") as file:
        section = _Section(file, begin, end)
        with zipfile.ZipFile(section) as archive:
            entries = [info for info in archive.infolist() if info.filename.partition("/")[2].startswith("data/")]
            directory = archive.start_dir
        places = _directory_entries(section, directory)
        for info in entries:
            first = _content(section, info.header_offset)
            section.seek(first)
            crc, left = 0, info.file_size
            while left:
                content = section.read(min(left, _SUMMED_BYTES))
                crc, left = zlib.crc32(content, crc), left - len(content)
            section.seek(first + info.file_size)
            found = [places[info.filename] + 16]
            if section.read(4) == _DESCRIPTOR:
                found.append(first + info.file_size + 4)
            for at in found:
                file.seek(begin + at)
                file.write(crc.to_bytes(4, "little"))


def _directory_entries(section: _Section, first: int) -> dict[str, int]:
    """Where the entries of an archive's directory begin, by name; their CRC is 16 bytes behind."""
    found = {}
    section.seek(first)
    while (head := section.read(46))[:4] == _DIRECTORY_ENTRY:
        name, *others = (int.from_bytes(head[at : at + 2], "little") for at in (28, 30, 32))
        at = section.tell() - len(head)
        found[section.read(name).decode()] = at
        section.seek(sum(others), io.SEEK_CUR)
    return found


def restricted(program: bytes, known: Mapping[tuple[str, str], Any], storage: Callable[[str, str, int], Any] | None = None) -> Any:
    """Run a pickle in which only the names ``known``, by module and name, mean something. Raises what the pickle module does.

    ``storage`` makes what stands for a storage of a key, dtype and number of elements.
    """
    return _Unpickler(program, known, storage).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, program: bytes, known: Mapping[tuple[str, str], Any], storage: Callable[[str, str, int], Any] | None) -> None:
        super().__init__(io.BytesIO(program))
        self._known, self._storage = {**_CONTAINERS, **known}, storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            self._known[module, name] = opaque(module, name)
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or self._storage is None:
            raise pickle.UnpicklingError(f"refers to a {kind} outside itself")
        return self._storage(key, dtype, numel)


def _size(dims: Sequence[int] = ()) -> tuple[int, ...]:
    return tuple(dims)


class _Dict(dict[Any, Any]):
    """A dict with attributes, as the state of a module has."""


_CONTAINERS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): lambda factory=None: {},
    ("torch", "Size"): _size,
    **{("torch", name): name for name in DTYPE_BYTES},
}


def _rebuilders(path: Path) -> dict[tuple[str, str], Any]:
    """What the program of a file may call to make tensors."""

    def tensor(
        storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], grad: bool, hooks: Any, marks: Any = None
    ) -> TensorView:
        if isinstance(marks, dict) and (marks.get("neg") or marks.get("conj")):
            raise CheckpointError(f"{path}: a tensor {tuple(shape)} is a negated view, other numbers than lie there; save it resolved")
        return view(storage, offset, shape, strides, storage.dtype)

    def typed(storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], grad: bool, hooks: Any, dtype: str) -> Any:
        return view(storage, offset, shape, strides, dtype)

    def view(storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: str) -> TensorView:
        shape, strides = tuple(shape), tuple(strides)
        begin, item = storage.begin + offset * DTYPE_BYTES[dtype], DTYPE_BYTES[dtype]
        last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        if prod(shape) and (min((offset, *strides)) < 0 or begin + (last + 1) * item > storage.end):
            raise CheckpointError(f"{path}: damaged: a tensor {shape} at byte {begin} is larger than its storage")
        return TensorView(dtype, shape, strides, path, begin)

    return {
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_tensor_v3"): typed,
        ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
        ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *rest: data,
        ("torch.storage", "UntypedStorage"): "uint8",
        **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    }


class _Section(io.RawIOBase):
    """Bytes ``[begin, end)`` of a file as a file of their own."""

    def __init__(self, file: IO[bytes], begin: int, end: int | None) -> None:
        self._file, self.begin = file, begin
        size = file.seek(0, io.SEEK_END)
        self.size, self._at = (size if end is None else min(end, size)) - begin, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0 if whence == io.SEEK_SET else self._at if whence == io.SEEK_CUR else self.size)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        self._file.seek(self.begin + self._at)
        content = self._file.read(max(0, self.size - self._at if size < 0 else min(size, self.size - self._at)))
        self._at += len(content)
        return content
