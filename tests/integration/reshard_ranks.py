"""What the ranks of ``test_reshard`` do: Megatron's own resharding beside what the bridge loads under the other layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.resharding.refit import swap_model_weights

from rlsync import AutoBridge
from rlsync.layout.topology import Topology
from rlsync.megatron.model import iter_parameters
from rlsync.megatron.parallel import destroy_parallel, initialize_parallel


class _WithNumberedExperts(torch.nn.Module):
    """A chunk as the resharding wants it: of experts it knows the names of TEGroupedMLP only."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.pg_collection, self._found = chunk.config, chunk.pg_collection, (chunk,)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self._found[0].named_parameters():
            yield re.sub(r"local_experts\.(\d+)\.(linear_fc[12]\.weight)$", r"\2\1", name), parameter

    def named_modules(self, *_: Any, **__: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        return self._found[0].named_modules()


def reshard_as_megatron(cases: Sequence[Mapping[str, Any]]) -> None:
    """For each case: load under one layout, have Megatron reshard to another, and load that too: the same bits in every parameter."""
    for case in cases:
        source, _ = _built(case["folder"], case["before"], load=True)
        # Groups and models of both layouts exist at once.
        groups = parallel_state._global_process_group_list
        parallel_state.destroy_model_parallel()
        target, bridge = _built(case["folder"], case["after"], load=False)
        parallel_state._global_process_group_list += groups
        found = {name: parameter for _, _, name, parameter in iter_parameters(target)}
        with torch.no_grad():
            for parameter in found.values():
                parameter.fill_(float("nan"))
        swap_model_weights(_WithNumberedExperts(source[0]), _WithNumberedExperts(target[0]), "gloo")
        resharded = {name: parameter.detach().clone() for name, parameter in found.items()}
        bridge.load_weights(target, case["folder"])
        different = [name for name, parameter in found.items() if not torch.equal(parameter, resharded[name])]
        assert not different, f"{case}: Megatron has other values in {different}"
        print(f"RESHARDED {case['folder']} {len(found)} parameters", flush=True)
        destroy_parallel(keep_distributed=True)
    destroy_parallel()


def _built(folder: str, axes: Mapping[str, int], *, load: bool) -> tuple[list[torch.nn.Module], AutoBridge]:
    topology = Topology(**axes)
    initialize_parallel(topology, seed=1, timeout_s=300)
    # As many rows of the vocabulary under one tensor rank as under two.
    bridge = AutoBridge.from_pretrained(folder, make_vocab_size_divisible_by=8 // topology.tp_size)
    overrides = {"sequence_parallel": True} if topology.tp_size > 1 and bridge.model.transformer.get("num_moe_experts") else None
    return bridge.get_model(folder if load else None, topology=topology, bf16=False, wrap_with_ddp=False, overrides=overrides), bridge
