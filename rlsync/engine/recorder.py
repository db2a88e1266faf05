"""Records which elements of which HF tensor vLLM's own loaders write where, on the live model, before any transfer.

Knows no plan and no channel.

The loaders are run on tensors without memory while the parameters are on meta. Every write is noted and none is executed,
also not into tensors that vLLM keeps live (biases, expert maps). vLLM itself only warns about a parameter that nothing
loads, and skips some unknown names in silence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlsync.engine.compat import lora
from rlsync.engine.compat.reload import load_weights, parameters_on_meta, quiet
from rlsync.engine.op_trace import OpTrace, key_of
from rlsync.layout.geometry import BufferSpec, TensorSpec
from rlsync.layout.recorded import Write

_aten = torch.ops.aten
_FILLS = (_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default)
_ERROR_CHARS = 200


@dataclass(frozen=True, slots=True)
class Recording:
    """Buffers and writes of one worker.

    Attributes:
        buffers: every parameter in checkpoint layout (shape and dtype), and each registered buffer that a loader writes, by
            the name in ``model.named_parameters(remove_duplicate=False)``; of names for one memory only the first.
        writes: in the order in which they were made; regions count from the first element of their buffer.
        aliases: for each of ``buffers`` the other names of the live model whose tensors share its memory.
        read_names, unused_names: HF names that some loader read, and those that none did. With tensor, pipeline or expert
            parallelism each worker takes its own share: judge names on the union of an engine's workers.
        computed_names: those of ``read_names`` of which some loader may have used more than ``writes`` say.
        findings: one sentence for each tensor at which a loader raised, other than for its name.
    """

    buffers: tuple[BufferSpec, ...]
    writes: tuple[Write, ...]
    aliases: Mapping[str, tuple[str, ...]]
    read_names: tuple[str, ...]
    computed_names: frozenset[str]
    unused_names: tuple[str, ...]
    findings: tuple[str, ...]


def record(model: torch.nn.Module, tensors: Sequence[TensorSpec]) -> Recording:
    """Run the loaders of ``model`` on every tensor, without memory. Leaves the model as it was. Not collective.

    Needs vLLM's config to be current where the loaders ask for it. Raises RuntimeError while a reload is under way.
    """
    live = _tensors_of(model)
    aliases = _aliases(live)
    with parameters_on_meta(model), quiet():
        sources = {t.name: torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta") for t in tensors}
        targets = _Targets(_tensors_of(model), live, [name for name, _ in model.named_parameters(remove_duplicate=False)])
        recorder, findings = _Recorder(targets, sources), list[str]()
        try:
            _load(model, recorder, sources)
        except Exception:
            # Once more, one by one, so that all that is wrong is found together.
            recorder = _Recorder(targets, sources)
            findings = _load_one_by_one(model, recorder, sources)
        written = {write.buffer for write in recorder.writes}
        buffers = tuple(
            BufferSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in targets.buffers.items()
            if name in written or name in targets.parameters
        )
    named = {f.split(" ", 1)[0] for f in findings}
    return Recording(
        buffers=buffers,
        writes=tuple(recorder.writes),
        aliases={buffer.name: aliases.get(buffer.name, ()) for buffer in buffers},
        read_names=tuple(name for name in sources if name in recorder.read),
        computed_names=frozenset(recorder.computed),
        unused_names=tuple(name for name in sources if name not in recorder.read and name not in named),
        findings=tuple(findings),
    )


class LastRecording:
    """The last recording of one model, for connections after the first: what its loaders do with the same tensors does not change while
    its layers, and the memory that they share, are the same."""

    def __init__(self) -> None:
        self._of: tuple[tuple[TensorSpec, ...], list[torch.nn.Module], dict[str, tuple[str, ...]]] | None = None
        self._recording: Recording | None = None

    def record(self, model: torch.nn.Module, tensors: Sequence[TensorSpec]) -> Recording:
        """The result of the function ``record``, which runs again only where something has changed."""
        now = tuple(tensors), list(model.modules()), _aliases(_tensors_of(model))
        # On meta they are while a reload is under way, which ``record`` refuses.
        if self._recording is None or self._of != now or any(p.is_meta for p in model.parameters()):
            self._recording = record(model, tensors)
            # A recording with findings is made again: whoever reads them may have mended the model.
            self._of = None if self._recording.findings else now
        return self._recording


def record_adapter(model: torch.nn.Module, tensors: Sequence[TensorSpec], r: int) -> Recording:
    """Run vLLM's loading of an adapter of rank ``r`` and scaling 1, whose factors are ``tensors``, without memory.

    Buffers are those of one slot, by the names of :func:`rlsync.engine.compat.lora.stacks`. Leaves the model as it was. Not collective.
    """
    with lora.one_slot_on_meta(model) as slot, quiet():
        sources = {t.name: torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta") for t in tensors}
        recorder, findings = _Recorder(_Targets(slot, {}, slot), sources), tuple[str, ...]()
        try:
            with recorder:
                lora.load(model, sources, r)
        except Exception as error:
            findings = (f"vLLM does not load these adapters: {type(error).__name__}: {' '.join(str(error).split())[:_ERROR_CHARS]}",)
        written = {write.buffer for write in recorder.writes}
        buffers = tuple(
            BufferSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in slot.items()
            if name in written
        )
    # What is cast and then left out, as factors of other workers' experts are, is not read.
    read = {write.source for write in recorder.writes} | recorder.computed
    return Recording(
        buffers=buffers,
        writes=tuple(recorder.writes),
        aliases={},
        read_names=tuple(name for name in sources if name in read),
        computed_names=frozenset(recorder.computed),
        unused_names=() if findings else tuple(name for name in sources if name not in read),
        findings=findings,
    )


def _load(model: torch.nn.Module, recorder: _Recorder, sources: Mapping[str, torch.Tensor]) -> None:
    try:
        with recorder:
            load_weights(model, iter(sources.items()))
    finally:
        recorder.note_replaced()


def _load_one_by_one(model: torch.nn.Module, recorder: _Recorder, sources: Mapping[str, torch.Tensor]) -> list[str]:
    findings = []
    for name, tensor in sources.items():
        try:
            _load(model, recorder, {name: tensor})
        except (ValueError, KeyError, AttributeError) as error:
            # How models answer to a name they do not have; shapes are asserted.
            if name in recorder.read:
                findings.append(_finding(name, tensor, error))
        except Exception as error:
            findings.append(_finding(name, tensor, error))
    return findings


def _finding(name: str, tensor: torch.Tensor, error: Exception) -> str:
    text = " ".join(str(error).split())[:_ERROR_CHARS]
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} does not fit the engine's model: {type(error).__name__}: {text}"


class _Targets:
    """The tensors that loaders may write, by storage. Of several names for one memory the first one stands for all."""

    def __init__(self, found: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor], parameters: Iterable[str]) -> None:
        names = [*(n for n in live if n in found), *(n for n in found if n not in live)]
        self.buffers: dict[str, torch.Tensor] = {}
        self._by_storage: dict[int, list[str]] = defaultdict(list)
        self._names: dict[str, str] = {}
        first: dict[tuple[Any, ...], str] = {}
        for name in names:
            tensor = found[name]
            views = [_view(tensor)] + ([(*_view(live[name]), tensor.shape, tensor.dtype)] if name in live else [])
            owner = next((first[v] for v in views if v in first), name)
            first.update((v, owner) for v in views if v not in first)
            self._names[name] = owner
            self.buffers.setdefault(owner, tensor)
            self._by_storage[key_of(tensor)].append(name)
        self.parameters = {self._names[name] for name in parameters}
        self._found = found
        self._kept = {name: (key_of(t), t.data) for name, t in found.items()}

    def region(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """Buffer, and offset of the first element of a view of it; None for other tensors."""
        for name in self._by_storage.get(key_of(tensor), ()):
            whole = self._found[name]
            offset = int(tensor.storage_offset()) - int(whole.storage_offset())
            if tensor.dtype != whole.dtype or not whole.is_contiguous():
                continue
            if 0 <= offset < whole.numel():
                return self._names[name], offset
        return None

    def owner(self, tensor: torch.Tensor) -> str | None:
        names = self._by_storage.get(key_of(tensor))
        return self._names[names[0]] if names else None

    def take_back(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Buffers whose memory a loader replaced (``parameter.data = ...``), with the replacement; restores their memory."""
        for name, (key, data) in self._kept.items():
            given = self._found[name].data
            if key_of(given) != key:
                self._found[name].data = data
                yield self._names[name], given


class _Recorder(TorchDispatchMode):
    """Records reads and writes, and executes no write into the model."""

    def __init__(self, targets: _Targets, sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.writes: list[Write] = []
        self._targets = targets
        self._trace = OpTrace(sources)

    @property
    def read(self) -> set[str]:
        """HF names that were read."""
        return self._trace.read

    @property
    def computed(self) -> set[str]:
        """HF names that were read otherwise than by copies that ``writes`` describe."""
        return self._trace.computed

    def note_replaced(self) -> None:
        for buffer, given in self._targets.take_back():
            self._trace.note_computed((given,), {})
            self._compute(buffer)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No compiled code calls a loader; torch would else guard every operator against it, a fifth of a recording's time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            # Most of all: it writes nothing, and what it returns is known by its storage.
            return func(*args, **kwargs)
        if func is _aten.copy_.default:
            return self._copy(args[0], args[1])
        if func is _aten._foreach_copy_.default:
            for target, source in zip(args[0], args[1], strict=True):
                self._copy(target, source)
            return None
        if func in _FILLS and self._targets.owner(args[0]) is not None:
            return self._fill(*args)
        written = _written(func, args, kwargs)
        if any(self._targets.owner(t) is not None for t in written):
            self._trace.note_computed(args, kwargs)
            for tensor in written:
                self._compute(self._targets.owner(tensor))
            return written[0] if func._schema.returns else None
        for tensor in written:
            self._check_ours(tensor)
        return self._trace.run(func, args, kwargs, written)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if target.numel() != source.numel():
            raise ValueError(f"{tuple(source.shape)} is copied into {tuple(target.shape)}")
        self._trace.note_copied(source)
        if self._targets.owner(target) is None:
            self._check_ours(target)
            self._trace.run(_aten.copy_.default, (target, source), {}, [target])
        else:
            self._write(target, source if source.shape == target.shape else source.expand(target.shape))
        return target

    def _fill(self, target: torch.Tensor, value: Any = 0.0) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            self._write(target, float(value))
        elif value.is_meta:
            self._trace.note_copied(value)
            self._write(target, value.expand(target.shape))
        else:
            self._write(target, float(value.item()))
        return target

    def _write(self, target: torch.Tensor, source: torch.Tensor | float) -> None:
        if not target.numel():
            # A rank without padding fills an empty region, which begins after the last element.
            return
        region = self._targets.region(target)
        if region is None:
            self._trace.note_computed((source,), {})
            self._compute(self._targets.owner(target))
            return
        buffer, offset = region
        shape, strides = tuple(target.shape), target.stride()
        value = self._trace.number(source) if isinstance(source, torch.Tensor) else source
        if value is not None:
            self.writes.append(Write(buffer, offset, shape, strides, value=value))
            return
        assert isinstance(source, torch.Tensor)
        parts = self._trace.parts(source, target.dtype)
        if parts is None:
            self._trace.note_computed((source,), {})
            self.writes.append(Write(buffer, offset, shape, strides))
            return
        for part in parts:
            begin = offset + sum(a * s for a, s in zip(part.start, strides, strict=True))
            steps = tuple(strides[dim] for dim in part.dims)
            self.writes.append(Write(buffer, begin, part.shape, steps, part.name, part.offset, part.strides))

    def _compute(self, buffer: str | None) -> None:
        """The whole buffer may hold anything now."""
        assert buffer is not None
        self.writes.append(Write(buffer, 0, (self._targets.buffers[buffer].numel(),), (1,)))

    def _check_ours(self, tensor: torch.Tensor) -> None:
        if not self._trace.knows(tensor):
            raise ValueError(f"a loader writes into a tensor {tuple(tensor.shape)} that is neither a parameter nor a buffer of the model")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors that an operator changes in place."""
    if not func._schema.is_mutable:
        return []
    found: list[torch.Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return found


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and registered buffers under all of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _memory(tensor: torch.Tensor) -> tuple[str, int]:
    """A tensor without elements shares its memory with nothing but itself."""
    return ("storage", key_of(tensor)) if tensor.numel() else ("object", id(tensor))


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Key of a view: equal for two names of the same elements."""
    return _memory(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _aliases(live: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """Name -> the other names whose tensors overlap with its tensor in memory."""
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, tensor in live.items():
        groups[_memory(tensor)].append(name)
    return {name: tuple(n for n in group if n != name and _overlap(live[n], live[name])) for group in groups.values() for name in group}


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the ranges from first to last element meet, of two tensors in one storage."""
    ranges = [(t.storage_offset(), t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) for t in (a, b)]
    return a is b or (ranges[0][0] <= ranges[1][1] and ranges[1][0] <= ranges[0][1])
