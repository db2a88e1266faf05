"""The code of ``rlsync.plan.transforms``: a function for each row, by its name."""

from __future__ import annotations

import sys
from typing import cast as typed

import torch


def transformed(view: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    """What a transform makes of the elements of a view, in their shape; the view itself where ``name`` is empty."""
    return typed(torch.Tensor, getattr(sys.modules[__name__], name)(view, dtype)) if name else view


def merge(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The cast of a sum: ``view`` is of the weight to which its source has added the adapters."""
    return cast(view, dtype)


def scale(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The cast of a product: ``view`` is of the factor that its source has multiplied, in float32."""
    return cast(view, dtype)


def cast(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to nearest, as torch does it."""
    return view.to(dtype)
