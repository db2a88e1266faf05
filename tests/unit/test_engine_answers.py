"""Claims about what keeps an engine whose sync did not complete from answering: real model classes of vLLM, without their layers."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from vllm.model_executor.models.gpt2 import GPT2LMHeadModel
from vllm.model_executor.models.llama import LlamaForCausalLM

from rlsync.engine.compat.engine import LOGITS, allow_answers, forbid_answers

HIDDEN = torch.arange(3.0)


def without_layers(model_class: type[torch.nn.Module]) -> torch.nn.Module:
    """A model whose logits are the hidden states."""
    model = model_class.__new__(model_class)
    torch.nn.Module.__init__(model)
    model.lm_head = torch.nn.Identity()
    model.logits_processor = lambda head, hidden, **_: head(hidden)
    return model


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, GPT2LMHeadModel])
def test_every_way_to_logits_that_a_model_has_is_closed_until_a_sync_commits(model_class: type[torch.nn.Module]) -> None:
    model = without_layers(model_class)
    ways = [name for name in ("compute_logits", "compute_logits_local") if hasattr(model_class, name)]
    assert "compute_logits" in ways
    for _ in range(2):
        forbid_answers(model, "its sync did not complete")
        assert [name for name in ("compute_logits", "compute_logits_local") if hasattr(model, name)] == ways
        for name in ways:
            with pytest.raises(RuntimeError, match="refuses to answer: its sync did not complete"):
                getattr(model, name)(HIDDEN)
    for _ in range(2):
        allow_answers(model)
        assert all(torch.equal(getattr(model, name)(HIDDEN), HIDDEN) for name in ways)


def test_the_runners_of_the_installed_vllm_know_no_other_way() -> None:
    """Red for a new one of a new version. Those of drafters are refused with their weights."""
    package = find_spec("vllm")
    assert package is not None and package.origin is not None
    runners = list(Path(package.origin).parent.glob("v1/worker/**/*model_runner*.py"))
    called = {name for path in runners for name in re.findall(r"\bself\.model\.(\w*logits\w*)\(", path.read_text())}
    assert "compute_logits" in called and called <= set(LOGITS)
