"""What several tests on GPUs ask for."""

from __future__ import annotations

import pytest


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 in float32, also in processes that a test starts: TransformerEngine multiplies them in TF32 otherwise."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
