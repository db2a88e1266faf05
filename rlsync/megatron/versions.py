"""What differs between the releases of Megatron-Core that are supported, 0.16 to 0.19, and nowhere else in this package.

A name that a release lacks is asked for here, by the name itself and not by a version number, so that a release between two known ones
is what it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import experts

from rlsync.models import ExpertModule

_EXPERT_MODULES: tuple[ExpertModule, ...] = ("SequentialMLP", "TEGroupedMLP", "GroupedMLP")


def expert_modules() -> Mapping[ExpertModule, type]:
    """Modules that hold the experts of a layer, by name. Releases from 0.17 on have no GroupedMLP, which joins experts in two weights."""
    found: dict[ExpertModule, Any] = {name: getattr(experts, name, None) for name in _EXPERT_MODULES}
    return {name: module for name, module in found.items() if module is not None}


def joins_experts(config: TransformerConfig, *, is_te: bool) -> bool:
    """Whether experts of layers of this config are a GroupedMLP's, where no layer is at hand that could tell.

    ``is_te``: layers are TransformerEngine's.
    """
    if not config.moe_grouped_gemm or "GroupedMLP" not in expert_modules():
        return False
    return bool(config.moe_use_legacy_grouped_gemm) or not is_te
