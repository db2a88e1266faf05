"""Random first weights of a pretraining: drawn by HF name, so that they are the same under every parallel layout.

Deviations are Megatron's: one for all matrices, and that divided by ``sqrt(2 * layers)`` for those that write into the residual stream.
Owns how a tensor is drawn; must not know who holds it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rlsync.models.stacks import Model

# Linear layers whose output is added to the residual stream, by their names in Megatron.
_RESIDUAL = frozenset({"linear_proj", "linear_fc2"})


@dataclass(frozen=True, slots=True)
class Draw:
    """How a tensor gets its first values.

    Attributes:
        deviation: of the normal distribution around zero that a matrix is drawn from; None for a vector.
        value: that every element of a vector has: 1 in the weights of norms, 0 in biases.
    """

    deviation: float | None
    value: float = 0.0


def draws_of(model: Model, std: float) -> Mapping[str, Draw]:
    """How every tensor of a text model is drawn, by HF name."""
    found: dict[str, Draw] = {}
    for bound in model.parameters():
        module, _, kind = bound.local.rpartition(".")
        deviation = std / math.sqrt(2 * model.num_layers) if module.rpartition(".")[2] in _RESIDUAL else std
        for name, shape in bound.hf:
            found.setdefault(name, Draw(deviation) if len(shape) > 1 else Draw(None, float(kind == "weight")))
    return found


def drawn(draw: Draw, name: str, shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """The whole tensor in fp32. Values depend on the name, the seed and the kind of device."""
    if draw.deviation is None:
        return torch.full(shape, draw.value, device=device)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, device=device).normal_(0, draw.deviation, generator=generator)
