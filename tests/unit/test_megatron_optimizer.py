"""Claims about what a rank makes of a configuration: optimizers that cannot be had on this machine, gradients, packing."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rlsync.errors import ConfigError
from rlsync.megatron.optimizer import OptimizerOptions, build_optimizer
from workers.actor import ddp_options, packing_of
from workers.config.schema import ActorConfig, MegatronConfig


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_state_cannot_leave_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"optimizer_cpu_offload .* no GPU; set it to False"):
        build_optimizer([], OptimizerOptions(lr=1e-3, optimizer_cpu_offload=True))


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="TransformerEngine is there")
def test_the_optimizer_of_an_absent_library_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="use_precision_aware_optimizer is TransformerEngine's, which is not installed"):
        build_optimizer([], OptimizerOptions(lr=1e-3, use_precision_aware_optimizer=True))


def test_ranks_look_at_their_own_gradients_where_they_are_asked_to() -> None:
    """Of one that finds them not finite the others would hear by the deadline of a collective alone; the norm is the same on all."""
    assert ddp_options(ActorConfig()).check_for_nan_in_grad is False
    asked = MegatronConfig(check_for_nan_in_loss_and_grad=True)
    assert ddp_options(ActorConfig(megatron=asked)).check_for_nan_in_grad is True


def test_sequences_are_packed_where_that_is_fast_and_right_and_the_reason_is_said() -> None:
    for wanted, refusal, flavour, packed, why in (
        ("auto", None, "te", True, "attention is TransformerEngine's, and runner.packing auto"),
        ("auto", None, "local", False, "attention is not TransformerEngine's, and runner.packing auto"),
        ("auto", "a2a takes none", "te", False, "a2a takes none"),
        ("on", None, "local", True, "runner.packing is True"),
        ("off", None, "te", False, "runner.packing is False"),
    ):
        assert packing_of(wanted, refusal, flavour) == (packed, why)
    with pytest.raises(ConfigError, match=r"runner\.packing=True: a2a takes none"):
        packing_of("on", "a2a takes none", "te")
