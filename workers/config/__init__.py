"""Configuration of a run: hydra's yaml in, frozen dataclasses out.

register_resolvers(); sys.argv[1:] = hydra_arguments(sys.argv[1:])     # before hydra.main
config = load_config(composed)                                         # RunConfig or SftConfig, validated
validate_model(config, hf_config)                                      # once config.json is read
dp_size = validate_world(config, actor_world_size)                     # once the placement is resolved
"""

from __future__ import annotations

from workers.config.command_line import hydra_arguments, lenient_overrides
from workers.config.fields import Precision, Task
from workers.config.grpo import AlgorithmConfig, DataConfig, RewardConfig, RunConfig, WarmStartConfig
from workers.config.load import Reading, config_as_dict, load_config, read_config, register_resolvers
from workers.config.machine import validate_engines_on_machine, validate_machine
from workers.config.schema import ActorConfig, ArithmeticConfig, RolloutConfig, RunnerConfig
from workers.config.sft import SftAlgorithmConfig, SftConfig, SftDataConfig, ValidationConfig
from workers.config.tasks import AnyConfig, KeyDescription, config_table, describe_config
from workers.config.validate import actor_topology, validate, validate_model, validate_world

__all__ = [
    "ActorConfig",
    "AlgorithmConfig",
    "AnyConfig",
    "ArithmeticConfig",
    "DataConfig",
    "KeyDescription",
    "Precision",
    "Reading",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "RunnerConfig",
    "SftAlgorithmConfig",
    "SftConfig",
    "SftDataConfig",
    "Task",
    "ValidationConfig",
    "WarmStartConfig",
    "actor_topology",
    "config_as_dict",
    "config_table",
    "describe_config",
    "hydra_arguments",
    "lenient_overrides",
    "load_config",
    "read_config",
    "register_resolvers",
    "validate",
    "validate_engines_on_machine",
    "validate_machine",
    "validate_model",
    "validate_world",
]
