"""AutoBridge: Megatron shards <-> Hugging Face tensors, online, without a conversion on disk.

Load, export and save are plans between placements. Owns the comparison of the table with the live model; knows no engine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlsync.bridge.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_config,
    base_copies,
    base_of_adapter,
    check_adapter_folder,
    other_base,
    placed_adapter,
)
from rlsync.bridge.checkpoint_sums import check_written
from rlsync.bridge.full_tensors import (
    Arriving,
    Export,
    Save,
    empty_tensor,
    files_of,
    in_place,
    plan_export,
    plan_save,
    write_files,
    writer_ranks,
)
from rlsync.bridge.initial_weights import drawn, draws_of
from rlsync.bridge.model_folder import CONFIG_NAME, copy_files, form_of_folder, kept_tensors, read_config, travelling_files, with_dtype
from rlsync.convert.loading import LoadPlan, LoadPlanner, copy_all
from rlsync.convert.merging import check_base_copy
from rlsync.convert.sources import adapter_holdings_of, holdings_of
from rlsync.copy.cpu import bind, region, write_padding
from rlsync.copy.files import FileWriter, MappedTensors, prepare_folder, write_index, write_small_file
from rlsync.copy.writes import DirectWrites, Writes
from rlsync.errors import CheckpointError, ConfigError, PlacementError, first_few
from rlsync.layout.geometry import BufferSpec, Placement, TensorSpec, whole_tensors
from rlsync.layout.safetensors import CHECKSUMS
from rlsync.layout.topology import Topology
from rlsync.megatron import model as megatron_model
from rlsync.megatron.cpu import enable_cpu
from rlsync.megatron.lora import Adapter, merged
from rlsync.megatron.parallel import compute_device, current_topology
from rlsync.models import model_of, supported_architectures, unread_keys
from rlsync.models.lora import PREFIX, module_of
from rlsync.models.moe import further_layers_note
from rlsync.models.placement import megatron_placements
from rlsync.plan.planner import Plan, build_plan
from rlsync.transport.collectives import Exchange, agreed

_LOG = logging.getLogger(__name__)

# Largest message memory of an export on one rank.
EXPORT_BUCKET_BYTES = 256 * 2**20
# Most bytes of a file, where a caller says nothing else.
_FILE_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Shards:
    """The live parameters of this rank, checked against the table, and the placements of all ranks.

    Attributes:
        tensors: every HF tensor, in layer order, with the dtype of the live parameters.
        buffers: global name -> parameter or persistent buffer of this rank.
        placements: index is the global rank.
        adapters: of this rank, by the global name of the weight that each adds to.
        adapted: HF tensors that have an adapter, on any rank.
    """

    topology: Topology
    tensors: tuple[TensorSpec, ...]
    buffers: Mapping[str, torch.Tensor]
    placements: tuple[Placement, ...]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    adapted: frozenset[str] = frozenset()


class AutoBridge:
    """Bridge between one HF model and its Megatron shards. Build with :meth:`from_pretrained` or :meth:`from_config`.

    Without CUDA it prepares this process for Megatron on CPU and gloo (``rlsync.megatron.cpu.enable_cpu``), so that a trainer's own
    ``mpu.initialize_model_parallel`` and seeds do.
    """

    def __init__(
        self, config: Mapping[str, Any], folder: Path | None, *, text: str | None = None, make_vocab_size_divisible_by: int = 1
    ) -> None:
        enable_cpu()
        self.hf_config = dict(config)
        self.model = model_of(config)
        self._folder = folder
        self._form = form_of_folder(self.model, folder)
        self._config_text = json.dumps(self.hf_config, indent=2, default=str) + "\n" if text is None else text
        self._divisor = make_vocab_size_divisible_by
        self._placed: tuple[Any, tuple[Placement, ...]] | None = None
        self._export: tuple[tuple[Placement, ...], int, Export] | None = None
        self._save: tuple[tuple[Placement, ...], int, Save] | None = None
        self._factors: tuple[Any, tuple[TensorSpec, ...], tuple[Placement, ...]] | None = None
        self._adapter_export: tuple[tuple[Placement, ...], Plan] | None = None

    @classmethod
    def from_pretrained(cls, hf_path: str | Path, *, make_vocab_size_divisible_by: int = 1) -> AutoBridge:
        """Bridge for the checkpoint folder ``hf_path``; reads its ``config.json``, and the headers of its weight files where checkpoints of
        the family hold their tensors in several forms (other names, experts stacked): exported and saved ones have that of the folder.

        Raises ConfigError for a missing or unreadable config and for an unknown architecture, PlacementError where the form is not clear.
        """
        folder = Path(hf_path)
        text, config = read_config(folder)
        return cls(config, folder, text=text, make_vocab_size_divisible_by=make_vocab_size_divisible_by)

    @classmethod
    def from_config(cls, hf_config: Any, *, make_vocab_size_divisible_by: int = 1) -> AutoBridge:
        """Bridge for an HF config: a mapping like ``config.json``, or a ``PretrainedConfig``."""
        config = hf_config if isinstance(hf_config, Mapping) else hf_config.to_dict()
        return cls(config, None, make_vocab_size_divisible_by=make_vocab_size_divisible_by)

    @staticmethod
    def list_supported_models() -> tuple[str, ...]:
        """Architectures (``architectures[0]`` of ``config.json``) that a family exists for."""
        return supported_architectures()

    def get_model(
        self,
        weight_path: str | Path | None = None,
        *,
        wrap_with_ddp: bool = True,
        bf16: bool = True,
        fp16: bool = False,
        make_vocab_size_divisible_by: int | None = None,
        **options: Any,
    ) -> list[torch.nn.Module]:
        """Build this rank's chunks (one per virtual stage) under Megatron's current parallel state, and load weights if asked.

        ``bf16`` and ``fp16`` both False gives fp32 parameters. ``options`` go to ``rlsync.megatron.model.build_model``.
        Collective over all ranks.
        """
        if bf16 and fp16:
            raise ConfigError("get_model: bf16 and fp16 are both True; choose one, or none for fp32")
        if make_vocab_size_divisible_by is not None:
            self._divisor = make_vocab_size_divisible_by
        topology = options.pop("topology", None)
        unread = unread_keys(self.hf_config)
        if unread and dist.get_rank() == 0:
            _LOG.warning("config.json: neither transformers nor rlsync reads %s; these keys change nothing", ", ".join(unread))
        note = further_layers_note(self.hf_config, len(kept_tensors(self.model, self._folder)), self._folder)
        if note is not None and dist.get_rank() == 0:
            _LOG.warning("%s", note)
        models = megatron_model.build_model(
            self.hf_config,
            topology=current_topology() if topology is None else topology,
            dtype=torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32,
            make_vocab_size_divisible_by=self._divisor,
            wrap_with_ddp=wrap_with_ddp,
            **options,
        )
        if weight_path is not None:
            self.load_weights(models, weight_path)
        return models

    def shards(self, models: Sequence[torch.nn.Module]) -> Shards:
        """Describe live models in HF coordinates. Not collective, and equal on all ranks but for ``buffers`` and ``adapters``. Factors of
        adapters are none of the buffers.

        Raises PlacementError naming every parameter that the table lacks, misses or expects in another shape, and ConfigError where
        ``models`` is empty.
        """
        if not models:
            raise ConfigError("models is empty; give the chunks that get_model returned on this rank, or a trainer's own")
        topology = current_topology(models)
        live = {name: tensor for name, tensor in megatron_model.iter_weights(models) if not megatron_model.is_adapter(name)}
        names = {"flavour": megatron_model.flavour_of(models), "experts": megatron_model.experts_of(models)}
        dtype = str(next(iter(live.values())).dtype).removeprefix("torch.")
        key = (topology, *names.values(), dtype, self._divisor)
        if self._placed is None or self._placed[0] != key:
            self._placed = (
                key,
                megatron_placements(self.model, topology, **names, dtype=dtype, make_vocab_size_divisible_by=self._divisor),
            )
        placements = self._placed[1]
        _check_live(live, placements[dist.get_rank()])
        tensors, adapters = self.model.tensors(dtype), megatron_model.adapters_in(models)
        if adapters is None:
            return Shards(topology, tensors, live, placements)
        adapted = frozenset(t.name for t in tensors if module_of(t.name) in adapters.modules)
        return Shards(topology, tensors, live, placements, megatron_model.adapters_by_weight(models), adapted)

    def adapter_shards(self, models: Sequence[torch.nn.Module]) -> Shards:
        """Describe the adapters of live models: tensors are their factors by HF name, as in PEFT without its prefix. Otherwise as
        :meth:`shards`. Raises ConfigError where the models have none.
        """
        adapters = megatron_model.adapters_in(models)
        if adapters is None:
            raise ConfigError("these models have no adapters: build them with lora=LoraSpec(...)")
        topology = current_topology(models)
        live = {name: tensor for name, tensor in megatron_model.iter_weights(models) if megatron_model.is_adapter(name)}
        # A pipeline stage may have no adapter; all parameters but a router's buffers are of one dtype.
        dtype = str(next(parameter.dtype for *_, parameter in megatron_model.iter_parameters(models))).removeprefix("torch.")
        key = (topology, dtype, self._divisor, adapters)
        if self._factors is None or self._factors[0] != key:
            options: dict[str, Any] = {"dtype": dtype, "make_vocab_size_divisible_by": self._divisor, "adapters": adapters}
            self._factors = key, adapters.tensors(self.model, dtype), megatron_placements(self.model, topology, **options)
        _, tensors, placements = self._factors
        _check_live(live, placements[dist.get_rank()])
        return Shards(topology, tensors, live, placements)

    def load_adapter(self, models: Sequence[torch.nn.Module], folder: str | Path) -> None:
        """Fill the adapters from a folder of PEFT's form. Call it before ``build_optimizer``, and after the base has its weights: PEFT
        saves those of embeddings and heads beside their adapters, and they must be the base's.

        Raises on every rank, before anything changes: CheckpointError (missing or truncated files, or others than a run wrote), ConfigError
        (another rank or scaling, or what is not supported), PlacementError (missing, unexpected and wrongly shaped tensors at once).
        Collective over all ranks.
        """
        folder = Path(folder)
        with agreed(device=compute_device()):
            shards = self.adapter_shards(models)
            adapters = megatron_model.adapters_in(models)
            assert adapters is not None
            check_adapter_folder(folder, adapters.spec)
            warning = None if self._folder is None else other_base(base_of_adapter(folder), self._folder)
            if warning is not None and dist.get_rank() == 0:
                _LOG.warning("%s", warning)
            stored = placed_adapter(self.model, adapters, folder)
            load = LoadPlanner(shards.tensors, (stored,)).plan(shards.placements[dist.get_rank()])
            files = load.open()
            self._check_base_copies(models, MappedTensors(base_copies(adapters, folder)), folder)
        check_written(folder)
        _load(shards, load, files)

    def load_adapter_shards(self, models: Sequence[torch.nn.Module], folder: str | Path) -> None:
        """Fill the adapters from Megatron's shards of any layout (``iter_XXXXXXX``), each rank from what it needs. Call it before
        ``build_optimizer``.

        Raises on every rank, before anything changes: CheckpointError (missing or damaged files, or adapters of another scaling),
        PlacementError (missing, unexpected and wrongly shaped tensors at once). Collective over all ranks.
        """
        with agreed(device=compute_device()):
            shards = self.adapter_shards(models)
            adapters = megatron_model.adapters_in(models)
            assert adapters is not None
            holdings = adapter_holdings_of(Path(folder), self.model, adapters)
            load = LoadPlanner(shards.tensors, holdings).plan(shards.placements[dist.get_rank()])
            files = load.open()
        _load(shards, load, files)

    def _check_base_copies(self, models: Sequence[torch.nn.Module], copies: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Raise ConfigError where this rank holds something else of these HF tensors."""
        if not copies:
            return
        shards = self.shards(models)
        for piece in shards.placements[dist.get_rank()].pieces:
            if piece.tensor in copies:
                held = region(shards.buffers[piece.buffer].detach(), piece.offset, piece.box.shape, piece.strides).cpu()
                copy = copies[piece.tensor][tuple(map(slice, piece.box.start, piece.box.stop))]
                check_base_copy(copy, held, piece.tensor, folder)

    def export_adapter(self, models: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every factor of the adapters once, by its HF name as in PEFT without its prefix, on every rank: new tensors, in the dtype
        of the parameters. Collective over all ranks: consume it to the end on all of them.
        """
        with agreed(device=compute_device()):
            shards = self.adapter_shards(models)
            plan = self._planned_adapter_export(shards)
        megatron_model.gather_parameters(models)
        exchange = Exchange(plan, shards.buffers, device=compute_device())
        for k, bucket in enumerate(plan.buckets):
            arriving = {t.name: empty_tensor(t) for t in bucket.tensors}
            exchange.deliver(k, [arriving])
            yield from ((t.name, arriving[t.name]) for t in bucket.tensors)

    def _planned_adapter_export(self, shards: Shards) -> Plan:
        """How :meth:`export_adapter` comes by its tensors; the same for all calls with such shards, so made once."""
        if self._adapter_export is None or self._adapter_export[0] is not shards.placements:
            whole = whole_tensors("export", shards.tensors)
            plan = build_plan(shards.tensors, shards.placements, [whole], bucket_bytes=EXPORT_BUCKET_BYTES)
            self._adapter_export = shards.placements, plan
        return self._adapter_export[1]

    def save_adapter(
        self,
        models: Sequence[torch.nn.Module],
        out_dir: str | Path,
        *,
        base_model: str | None = None,
        durable: bool = False,
        writes: Writes | None = None,
    ) -> None:
        """Write the adapters as PEFT does, for PEFT and vLLM; rank 0 writes. Collective over all ranks.

        Args:
            base_model: what the folder says that it adapts; by default the folder that the bridge was made from.
            durable, writes: as in :meth:`save_weights`.
        """
        out_dir, is_writer = Path(out_dir), dist.get_rank() == 0
        writes = DirectWrites(durable=durable) if writes is None else writes
        arrived = {f"{PREFIX}{name}": tensor for name, tensor in self.export_adapter(models) if is_writer}
        with agreed(device=compute_device()):
            adapters = megatron_model.adapters_in(models)
            if is_writer and adapters is not None:
                origin = None if self._folder is None else str(self._folder.resolve())
                content = adapter_config(adapters, origin if base_model is None else base_model)
                specs = [TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in arrived.items()]
                try:
                    out_dir.mkdir(parents=True, exist_ok=True)
                    (out_dir / CHECKSUMS).unlink(missing_ok=True)  # of older ones
                    with FileWriter(out_dir / ADAPTER_WEIGHTS, specs, writes) as writer:
                        for name, tensor in arrived.items():
                            writer.write(name, tensor.contiguous())
                    write_small_file(out_dir / ADAPTER_CONFIG, (json.dumps(content, indent=2) + "\n").encode(), durable=durable)
                except OSError as error:
                    raise CheckpointError(f"{error.filename or out_dir}: cannot be written ({error.strerror})") from error

    def load_weights(self, models: Sequence[torch.nn.Module], path: str | Path) -> None:
        """Fill the parameters from a safetensors checkpoint, or from Megatron's shards of any layout (see docs/checkpoints.md); each rank
        reads only the byte ranges it needs.

        Floating-point dtypes are cast to those of the parameters; vocabulary padding becomes zero. Raises on every rank,
        before anything changes: CheckpointError (truncated or missing files, or safetensors files that are not what a run wrote, where its
        ``checksums.json`` is beside them), PlacementError (all missing, unexpected and wrongly shaped tensors at once). Collective over all
        ranks.
        """
        with agreed(device=compute_device()):
            shards = self.shards(models)
            holdings = holdings_of(Path(path), self.model)
            load = LoadPlanner(shards.tensors, holdings).plan(shards.placements[dist.get_rank()])
            files = load.open()
            stored = {tensor.file for holding in holdings for tensor in holding.stored.values() if tensor.file.suffix == ".safetensors"}
        for folder in sorted({file.parent for file in stored}):
            check_written(folder, stored)
        _load(shards, load, files)

    def init_weights(self, models: Sequence[torch.nn.Module], *, seed: int, std: float | None = None) -> None:
        """Fill the parameters with random values, the same under every layout: those that a pretraining begins with.

        Args:
            seed: values depend on it and on the HF names of the tensors.
            std: deviation of matrices, in those that write into the residual stream divided by ``sqrt(2 * layers)``; None: the config's
                ``initializer_range``.

        Raises ConfigError for a model with a vision tower, whose first weights nothing here draws. Collective over all ranks.
        """
        with agreed(device=compute_device()):
            if self.model.vision is not None:
                raise ConfigError(f"{self.model.architecture} has a vision tower, which is not trained from random weights; load some")
            shards = self.shards(models)
            mine = shards.placements[dist.get_rank()]
            held = {piece.tensor for piece in mine.pieces}
            tensors = [tensor for tensor in shards.tensors if tensor.name in held]
            whole = whole_tensors("random", [replace(tensor, dtype="float32") for tensor in tensors])
            plan = build_plan(tensors, [whole], [mine], transforms=("cast",))
        draws = draws_of(self.model, self.hf_config.get("initializer_range", 0.02) if std is None else std)
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        with torch.no_grad():
            for name, copies in groupby((copy for bucket in plan.buckets for copy in bucket.copies), key=lambda copy: copy.tensor):
                bind(copies, {name: drawn(draws[name], name, shapes[name], seed, compute_device())}, shards.buffers).run()
            write_padding(mine.padding, shards.buffers)

    def export_weights(
        self, models: Sequence[torch.nn.Module], *, bucket_bytes: int = EXPORT_BUCKET_BYTES
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every HF name once with its full tensor, on every rank, in layer order. Names, and experts stacked or one
        by one, are those of the bridge's folder.

        A tensor that every rank holds whole, and here lies in order in one parameter (without TP and PP all but q, k and v), is a view
        of that parameter: clone it to keep it beyond the next optimizer step, and do not write to it. All others are new. Tensors are
        contiguous, on the device and in the dtype of the parameters.
        Adapters are merged, in fp32 and into new memory, which takes that of the weights they add to. Else memory is one
        bucket beside its messages, and the stacked experts of a layer. A tied model yields no ``lm_head``.
        Collective over all ranks: consume it to the end on all of them.
        """
        with agreed(device=compute_device()):
            shards = self.shards(models)
            export = self._planned_export(shards, bucket_bytes)
        megatron_model.gather_parameters(models)
        buffers = _as_exported(shards)
        exchange = Exchange(export.plan, buffers, device=compute_device())
        arriving = Arriving(export.files, export.held)
        for k, bucket in enumerate(export.plan.buckets):
            if arriving.begin(bucket):
                exchange.deliver(k, [arriving.buffers])
            for tensor in bucket.tensors:
                if tensor.name in export.held:
                    yield export.files[tensor.name].spec.name, in_place(tensor, export.held[tensor.name], buffers)
                elif (complete := arriving.completed(tensor)) is not None:
                    yield complete

    def _planned_export(self, shards: Shards, bucket_bytes: int) -> Export:
        """How :meth:`export_weights` comes by its tensors; the same for all calls with such shards, so made once."""
        if self._export is None or self._export[0] is not shards.placements or self._export[1] != bucket_bytes:
            files = self._form.file_tensors(self.model, shards.tensors)
            self._export = shards.placements, bucket_bytes, plan_export(shards.tensors, shards.placements, files, bucket_bytes)
        return self._export[2]

    def plan_save(self, models: Sequence[torch.nn.Module]) -> int:
        """Plan ahead what :meth:`save_weights` with files of its default size does, and :meth:`save_adapter` of models with adapters, which
        takes seconds of thousands of tensors.

        Returns the bytes of tensors that this rank will write. Not collective.
        """
        save = self._planned_save(self.shards(models), _FILE_BYTES)
        written = [spec for name in files_of(dist.get_rank(), save) for spec in save.specs[name]]
        if megatron_model.adapters_in(models) is not None:
            factors = self.adapter_shards(models)
            self._planned_adapter_export(factors)
            written += factors.tensors if dist.get_rank() == 0 else ()
        return sum(spec.nbytes for spec in written)

    def save_weights(
        self,
        models: Sequence[torch.nn.Module],
        out_dir: str | Path,
        *,
        max_shard_bytes: int = _FILE_BYTES,
        durable: bool = False,
        writes: Writes | None = None,
    ) -> None:
        """Write a Hugging Face checkpoint: safetensors files by several ranks at once, index, config, tokenizer.

        Every file is written by one rank, so network file systems are safe. Tensors of the bridge's folder that no rank has, as those of
        layers that predict further tokens, are written as they are there. What a model needs beside its weights
        (``rlsync.bridge.model_folder.TRAVELS``) is copied byte for byte from the folder the bridge was made from, but for the
        dtypes in ``config.json``, which become those of the parameters. ``out_dir`` must be visible to all ranks; older weights
        in it are replaced. Collective over all ranks.

        Args:
            max_shard_bytes: most bytes of a file, but for a tensor that is larger. Files are smaller, down to 256 MiB, where that gives
                more ranks one to write.
            durable: return only when the disk has the content of every file, index and configuration too.
            writes: what writes the tensors, for callers that have it done later; ``durable`` is then of all else.

        Raises, before a file changes: ConfigError where ``out_dir`` is the folder the bridge was made from; CheckpointError where
        it cannot be written to or holds weights under other names.
        """
        out_dir, rank = Path(out_dir), dist.get_rank()
        writes = DirectWrites(durable=durable) if writes is None else writes
        with agreed(device=compute_device()):
            shards = self.shards(models)
            save = self._planned_save(shards, max_shard_bytes)
            small_files = self._small_files(out_dir) if rank == 0 else ()
        megatron_model.gather_parameters(models)
        with agreed(device=compute_device()):
            buffers = _as_exported(shards)
            exchange = Exchange(save.plan, buffers, device=compute_device(), destination_ranks=writer_ranks(save))
        # Not before every rank has come so far: this removes the older weights.
        with agreed(device=compute_device()):
            if rank == 0:
                prepare_folder(out_dir)
        failure = write_files(out_dir, save, files_of(rank, save), exchange, buffers, writes)
        with agreed(device=compute_device()):
            if failure is not None:
                raise failure
        with agreed(device=compute_device()):
            if rank == 0:
                self._write_small_files(out_dir, small_files, shards.tensors[0].dtype, durable=durable)
                write_index(out_dir, save.specs, durable=durable)

    def _planned_save(self, shards: Shards, max_shard_bytes: int) -> Save:
        """What :meth:`save_weights` writes; the same for all calls with such shards, so made once: of 18,000 tensors it takes seconds."""
        kept, made = kept_tensors(self.model, self._folder), self._save
        if made is None or made[0] is not shards.placements or made[1] != max_shard_bytes or made[2].kept != kept:
            stored = self._form.file_tensors(self.model, shards.tensors)
            save = plan_save(shards.tensors, shards.placements, stored, kept, max_shard_bytes, EXPORT_BUCKET_BYTES)
            made = self._save = shards.placements, max_shard_bytes, save
        return made[2]

    def _small_files(self, out_dir: Path) -> tuple[Path, ...]:
        """What :meth:`save_weights` copies, as paths in the folder the bridge was made from."""
        if self._folder is None:
            return ()
        if out_dir.resolve() == self._folder.resolve():
            raise ConfigError(f"save_weights: {out_dir} is where the model came from, and a save cut short would lose it; choose another")
        return travelling_files(self._folder, but=out_dir)

    def _write_small_files(self, out_dir: Path, files: tuple[Path, ...], dtype: str, *, durable: bool) -> None:
        if self._folder is not None:
            copy_files(self._folder, files, out_dir, durable=durable)
        write_small_file(out_dir / CONFIG_NAME, with_dtype(self._config_text, dtype).encode("utf-8"), durable=durable)


def _load(shards: Shards, load: LoadPlan, files: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Copy from files into the buffers of this rank, and zero what pads them. Collective over all ranks."""
    with agreed(device=compute_device()), torch.no_grad():
        for bucket in load.plan.buckets:
            copy_all(bucket.copies, files, shards.buffers)
        write_padding(shards.placements[dist.get_rank()].padding, shards.buffers)


def _as_exported(shards: Shards) -> Mapping[str, torch.Tensor]:
    """The buffers of this rank with adapters added; takes the memory of the weights that have one."""
    names = list(shards.adapters)
    return {**shards.buffers, **dict(zip(names, merged(list(shards.adapters.values()), [shards.buffers[n] for n in names]), strict=True))}


def _check_live(live: Mapping[str, torch.Tensor], expected: Placement) -> None:
    """Compare live parameters with what the table gives this rank; PlacementError lists every difference."""
    wanted = {b.name: b for b in expected.buffers}
    findings = [f"{name}: in the table, not in the model" for name in wanted if name not in live]
    findings += [f"{name} {tuple(t.shape)}: in the model, not in the table" for name, t in live.items() if name not in wanted]
    findings += [
        f"{name}: the table gives {b.shape} {b.dtype}, the model has {tuple(live[name].shape)} {live[name].dtype}"
        for name, b in wanted.items()
        if name in live and (tuple(live[name].shape) not in _declared_shapes(b) or str(live[name].dtype) != f"torch.{b.dtype}")
    ]
    if findings:
        raise PlacementError(f"the model of {expected.holder} is not what its family's table says: {first_few(findings, separator='; ')}")


def _declared_shapes(buffer: BufferSpec) -> tuple[tuple[int, ...], ...]:
    """Shapes of a parameter that a buffer may be: its own, and for (experts, rows, columns) those that GroupedMLP gives its two."""
    if len(buffer.shape) != 3:
        return (buffer.shape,)
    experts, rows, columns = buffer.shape
    return buffer.shape, (rows, experts * columns), (experts * rows, columns)
