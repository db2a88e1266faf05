"""The claim that a configuration key without a reader does not exist."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

from rlsync.models import PARTS
from rlsync.sync.config import SyncConfig
from workers.config import describe_config
from workers.config.schema import PART_RATES, ActorModelConfig, LoraConfig

WORKERS = Path(__file__).parents[2] / "workers"

# Read where the configuration is loaded: their only effect is what they refuse, or the key derived from them.
READ_WHILE_LOADING = {
    *("task_type", "adv_type", "loss_type", "rollout_backend", "training_backend", "type", "reward_type", "optimizer", "padding_side"),
    *("model_type", "pipeline_parallel_size", "bf16", "fp16", "global_batch_size", "training_batch_size_per_gpu"),
    *("eval_batch_size", "twin"),
}


def attributes_read() -> set[str]:
    """Names of all attributes that the runner's code reads, the configuration's own code left out but for what lays the actor out."""
    trees: list[ast.AST] = [ast.parse(path.read_text()) for path in WORKERS.rglob("*.py") if path.parent.name != "config"]
    rules = ast.parse((WORKERS / "config" / "validate.py").read_text())
    trees += [node for node in rules.body if isinstance(node, ast.FunctionDef) and node.name == "actor_topology"]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def unread(read: set[str]) -> list[str]:
    names = [field.name for field in fields(ActorModelConfig)]
    passed_by_name = set(names[names.index("recompute_method") :])  # ActorModelConfig.transformer_overrides
    passed_by_name |= {*(f"freeze_{part}" for part in PARTS), *PART_RATES}  # ActorModelConfig.frozen, OptimConfig.part_lr
    passed_by_name |= {field.name for field in fields(SyncConfig)}  # the library's own, given to it as a whole
    passed_by_name |= {field.name for field in fields(LoraConfig)}  # ActorConfig.lora_spec
    known = read | READ_WHILE_LOADING | passed_by_name
    return [described.name for described in describe_config() if described.name.rpartition(".")[2] not in known]


def test_every_key_is_read() -> None:
    assert unread(attributes_read()) == []


def test_a_key_that_nothing_reads_would_be_found() -> None:
    assert "rollout.max_running_requests" in unread(attributes_read() - {"max_running_requests"})
