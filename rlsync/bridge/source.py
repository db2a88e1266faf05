"""Source of a sync: the live shards of a Megatron actor. Knows the bridge; knows no engine and no channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import get_args

import torch
import torch.distributed as dist

from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.coordinator.messages import AdapterFactors
from rlsync.copy.addresses import in_batches
from rlsync.copy.merge import MergeProgram
from rlsync.errors import ConfigError, PlacementError
from rlsync.layout.geometry import Placement, TensorSpec
from rlsync.megatron.lora import Adapter, compile_merging, merge_program
from rlsync.megatron.model import adapters_in, gather_parameters
from rlsync.models.lora import B, check_beside_base
from rlsync.sync.config import LoraSync
from rlsync.sync.source import Declared


class MegatronSource:
    """The ``Source`` of a Megatron actor: the parameters of this rank where they lie, without a copy.

    Models with LoRA adapters are sent in one of two ways, and the base parameters change in neither. ``merged``: each adapter is added to
    its weight in fp32, bucket by bucket, and the sum is cast. ``adapter``: A and B are sent beside the base, B multiplied by the scaling.

    Attributes:
        tensors: every HF tensor in layer order, in the dtype of the parameters; with ``lora="adapter"`` followed by every factor under its
            PEFT name without the ``base_model.model.`` prefix. The same on all ranks.
        placements: what each actor rank holds; index is the rank. The same on all ranks.
        buffers: global name -> parameter or persistent buffer of this rank; with ``lora="adapter"`` the factors, too.
        rank: of this process in torch's default process group.
        stable_memory: whether the parameters stay allocated between syncs.
        frozen: HF tensors whose parameters on this rank did not require gradients when the source was made, without those that have a
            merged adapter.
        declared: transform ``merge`` for every tensor with a merged adapter, or ``scale`` for every B.
    """

    def __init__(
        self, bridge: AutoBridge, models: Sequence[torch.nn.Module], *, stable_memory: bool = True, lora: LoraSync = "merged"
    ) -> None:
        """Check the models against the family's table. Not collective.

        Args:
            bridge: of the model.
            models: chunks of this rank as ``AutoBridge.get_model`` returned them, or a trainer's own, wrapped or not.
            stable_memory: False where parameters are offloaded between syncs; engines then unmap them, so that their memory can be freed.
            lora: how adapters are sent; the same as ``SyncConfig.lora``.

        Raises PlacementError where parameters are not those of the table, and ConfigError where ``lora="adapter"`` and the models have no
        adapters, or some that engines cannot hold.
        """
        if lora not in get_args(LoraSync):
            raise ConfigError(f"MegatronSource: lora is {lora!r}; known are {', '.join(get_args(LoraSync))}")
        shards = bridge.shards(models)
        self._models, self.stable_memory = models, stable_memory
        self.rank = dist.get_rank()
        self.tensors: tuple[TensorSpec, ...] = shards.tensors
        self.placements: tuple[Placement, ...] = shards.placements
        self.buffers: Mapping[str, torch.Tensor] = shards.buffers
        adapters, adapted = shards.adapters, shards.adapted
        if lora == "adapter":
            adapters, adapted = {}, frozenset()
            self._add_factors(bridge)
        else:
            if adapters:
                compile_merging(list(adapters.values()), [self.buffers[name] for name in adapters])
            self.declared = Declared(dict.fromkeys(adapted, "merge"), _Merging(adapters, self.buffers))
        idle = {name for name, buffer in self.buffers.items() if isinstance(buffer, torch.nn.Parameter) and not buffer.requires_grad}
        pieces = self.placements[self.rank].pieces
        trained = adapted | {piece.tensor for piece in pieces if piece.buffer not in idle}
        self.frozen = frozenset(piece.tensor for piece in pieces) - trained
        self._idle = tuple((name, self.buffers[name]) for name in sorted(idle))
        factors = {f"{weight} {name}": factor for weight, adapter in adapters.items() for name, factor in adapter.named_parameters()}
        sent = (*self.buffers.values(), *factors.values())
        # One of each memory: thousands of experts lie in a few buffers of the optimizer, and are offloaded with these.
        self._sent = tuple({tensor.untyped_storage()._cdata: tensor for tensor in sent if tensor.numel()}.values())
        names = {id(buffer): name for name, buffer in (*self.buffers.items(), *factors.items())}
        # Where each tensor is looked up when the model computes; a sync has no time to walk the modules.
        self._lookups = [
            (table, attribute, names[id(tensor)], tensor)
            for model in models
            for module in model.modules()
            for table in (module._parameters, module._buffers)
            for attribute, tensor in table.items()
            if tensor is not None and id(tensor) in names
        ]

    def _add_factors(self, bridge: AutoBridge) -> None:
        """Send the factors of adapters beside all else."""
        factors, adapters, first = bridge.adapter_shards(self._models), adapters_in(self._models), len(self.tensors)
        assert adapters is not None, "adapter_shards raises without"
        if findings := check_beside_base(bridge.model, adapters):
            raise ConfigError("; ".join(findings))
        spec = adapters.spec
        self.tensors += factors.tensors
        self.placements = tuple(
            replace(base, **{name: getattr(base, name) + getattr(more, name) for name in ("buffers", "pieces", "padding")})
            for base, more in zip(self.placements, factors.placements, strict=True)
        )
        self.buffers = {**self.buffers, **factors.buffers}
        scaled = [tensor.name for tensor in factors.tensors if tensor.name.endswith(B)] if spec.scaling != 1 else []
        self.declared = Declared(dict.fromkeys(scaled, "scale"), _Scaling(self.buffers, spec.scaling), AdapterFactors(spec.r, first))

    def begin(self, version: int) -> None:
        """Gather parameters that an optimizer step has left sharded (``overlap_param_gather``). Collective over the data-parallel groups.

        Raises PlacementError where a module has another parameter or buffer object than when this source was made, whose old values would
        be sent; and where a parameter requires gradients that was frozen then, which engines would not be sent again.
        """
        trained = [name for name, parameter in self._idle if parameter.requires_grad]
        if trained:
            raise PlacementError(
                f"{len(trained)} parameters were frozen at connect() and are trained now, among them {trained[0]}; "
                "make a new source and connect again"
            )
        looked_up = chain.from_iterable(in_batches(self._lookups))
        replaced = [name for table, attribute, name, parameter in looked_up if table.get(attribute) is not parameter]
        if replaced:
            raise PlacementError(
                f"{len(replaced)} parameters or buffers are other objects than at connect(), among them {replaced[0]}; "
                "make a new source and connect again"
            )
        gather_parameters(self._models, self._sent)


class _Merging:
    """Weights of this rank with their adapters, by name. The names of a bucket are asked for in every sync, and have a program."""

    def __init__(self, adapters: Mapping[str, Adapter], buffers: Mapping[str, torch.Tensor]) -> None:
        self._adapters, self._buffers = adapters, buffers
        self._programs: dict[tuple[str, ...], MergeProgram] = {}

    def __call__(self, names: Sequence[str]) -> list[torch.Tensor]:
        key = tuple(names)
        if key not in self._programs:
            self._programs[key] = merge_program([self._adapters[name] for name in names], [self._buffers[name] for name in names])
        return self._programs[key].run()


class _Scaling:
    """Factors of this rank times the scaling, by name: in fp32, those of thousands of experts by a few launches. Factors of a bucket are
    looked up once: to make a view of each in every sync takes longer than to multiply them."""

    def __init__(self, buffers: Mapping[str, torch.Tensor], scaling: float) -> None:
        self._buffers, self._scaling = buffers, scaling
        self._flat: dict[tuple[str, ...], tuple[list[torch.Tensor], list[int]]] = {}

    def __call__(self, names: Sequence[str]) -> Sequence[torch.Tensor]:
        key = tuple(names)
        if key not in self._flat:
            factors = [self._buffers[name].detach().view(-1) for name in names]
            self._flat[key] = factors, [factor.numel() for factor in factors]
        factors, sizes = self._flat[key]
        products = torch.empty(sum(sizes), dtype=torch.float32, device=factors[0].device)
        parts = products.split(sizes)
        torch._foreach_copy_(parts, factors)
        products.mul_(self._scaling)
        return parts
