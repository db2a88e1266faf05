"""Topology: sizes and ranks of the parallel axes of a Megatron run. Integers only; knows no process group.

Rank order follows Megatron-Core's default ``tp-cp-ep-dp-pp``: tp varies fastest, then cp, then dp, then pp
(``megatron.core.parallel_state.initialize_model_parallel``). Expert axes factor the same ranks as
``etp-ep-edp-pp``.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlsync.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """Sizes of the parallel axes and the uneven pipeline split; hashable, comparable, JSON-able by field.

    ``first_stage_layers`` / ``last_stage_layers`` are layer counts of the first and last pipeline stage (all their
    virtual chunks together), or None for an even split.
    """

    tp_size: int = 1
    pp_size: int = 1
    vpp_size: int = 1
    cp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    etp_size: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size", "vpp_size", "cp_size", "dp_size", "ep_size", "etp_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"topology: {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("first_stage_layers", "last_stage_layers"):
            if (layers := getattr(self, name)) is not None and layers < 1:
                raise ConfigError(f"topology: {name} is {layers}; it must be at least 1")
        if self.vpp_size > 1 and self.pp_size == 1:
            raise ConfigError(
                f"topology: vpp_size {self.vpp_size} needs a pp_size above 1, which is 1: virtual stages interleave pipeline stages"
            )
        per_stage = self.tp_size * self.cp_size * self.dp_size
        if per_stage % (self.ep_size * self.etp_size):
            raise ConfigError(f"topology: ep_size x etp_size = {self.ep_size * self.etp_size} must divide tp x cp x dp = {per_stage}")

    @property
    def world_size(self) -> int:
        return self.tp_size * self.cp_size * self.dp_size * self.pp_size

    @property
    def experts_have_own_replicas(self) -> bool:
        """Whether an expert's weights are on other ranks than all else that a rank holds, where a model has experts."""
        return self.ep_size > 1 or self.etp_size != self.tp_size

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a global rank on every axis."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"topology: rank {rank} outside world of {self.world_size}")
        tp = rank % self.tp_size
        cp = rank // self.tp_size % self.cp_size
        dp = rank // (self.tp_size * self.cp_size) % self.dp_size
        per_stage = self.tp_size * self.cp_size * self.dp_size
        inner = rank % per_stage
        return Coordinates(
            rank=rank,
            tp_rank=tp,
            cp_rank=cp,
            dp_rank=dp,
            pp_rank=rank // per_stage,
            etp_rank=inner % self.etp_size,
            ep_rank=inner // self.etp_size % self.ep_size,
        )

    def layers_of(self, num_layers: int, pp_rank: int, vpp_rank: int = 0) -> range:
        """Global indices (0-based) of the transformer layers of one virtual chunk.

        Same arithmetic as ``get_transformer_layer_offset`` of Megatron-Core 0.16: chunk ``v`` of the first stage is
        followed by chunk ``v`` of the others, then chunk ``v + 1``.
        """
        per_chunk = self._layers_per_chunk(num_layers)
        before = sum(sum(per_chunk) for _ in range(vpp_rank)) + sum(per_chunk[:pp_rank])
        return range(before, before + per_chunk[pp_rank])

    def _layers_per_chunk(self, num_layers: int) -> list[int]:
        """Layers of one virtual chunk on each pipeline stage."""
        fixed = {
            stage: count for stage, count in ((0, self.first_stage_layers), (self.pp_size - 1, self.last_stage_layers)) if count is not None
        }
        if fixed and self.pp_size == 1:
            raise ConfigError(
                f"topology: first_stage_layers {self.first_stage_layers} and last_stage_layers {self.last_stage_layers} need a pp_size "
                "above 1, which is 1"
            )
        middle_layers, middle_stages = num_layers - sum(fixed.values()), self.pp_size - len(fixed)
        if middle_layers < 0 or (middle_stages == 0 and middle_layers) or (middle_stages and middle_layers % middle_stages):
            raise ConfigError(
                f"topology: {num_layers} layers cannot be split over pp_size {self.pp_size} with "
                f"first_stage_layers {self.first_stage_layers}, last_stage_layers {self.last_stage_layers}: "
                f"{middle_layers} layers remain for {middle_stages} stages; other numbers for the first and the last stage (Megatron's "
                "decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers) make an uneven split"
            )
        per_stage = [fixed.get(s, middle_layers // middle_stages if middle_stages else 0) for s in range(self.pp_size)]
        for stage, count in enumerate(per_stage):
            if count % self.vpp_size or count == 0:
                raise ConfigError(
                    f"topology: stage {stage} holds {count} of {num_layers} layers, which vpp_size {self.vpp_size} must divide"
                )
        return [count // self.vpp_size for count in per_stage]


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank stands on each axis of a Topology."""

    rank: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    etp_rank: int
    ep_rank: int

    @property
    def leads_replica(self) -> bool:
        """Whether this is the first rank of its data-parallel replica."""
        return (self.tp_rank, self.cp_rank, self.pp_rank) == (0, 0, 0)
