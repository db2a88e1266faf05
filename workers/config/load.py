"""hydra's DictConfig to a validated ``RunConfig``: resolve, build, derive, validate, and warn once about inert keys.

Knows no yaml file and no command line; the entry point hands over what hydra composed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlsync.errors import ConfigError
from workers.config.build import build, section_of
from workers.config.inert import inert_reason
from workers.config.schema import RunConfig
from workers.config.validate import broken_rules, raise_all

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a composed configuration says.

    Attributes:
        config: None where keys without a default lack a value.
        findings: everything that keeps it from being run, one sentence each. With findings, ``config`` is what it would be with the
            defaults of the keys that they name.
        inert: keys without effect, each with the reason.
    """

    config: RunConfig | None
    findings: tuple[str, ...]
    inert: tuple[tuple[str, str], ...]


def read_config(composed: DictConfig | Mapping[str, Any]) -> Reading:
    """The typed configuration of a run, and all that is wrong with it.

    Args:
        composed: what hydra composed, or a nested mapping. Interpolations are resolved here, so
            ``register_resolvers`` must have run when they use our resolvers.
    """
    inert: list[tuple[str, str]] = []

    def tolerate(dotted: str, value: Any) -> bool:
        reason = inert_reason(dotted, value)
        if reason is not None:
            inert.append((dotted, reason))
        return reason is not None

    try:
        values = _resolve(composed)
    except ConfigError as error:
        return Reading(None, (str(error),), ())
    built = build(RunConfig, values, tolerate)
    config = None if built.config is None else _derive(built.config)
    # Rules between keys say nothing about values that are not there.
    broken = list(broken_rules(config)) if config is not None and built.is_exact else []
    return Reading(config, (*built.errors, *broken), tuple(inert))


def load_config(composed: DictConfig | Mapping[str, Any]) -> RunConfig:
    """As ``read_config``, with one warning about inert keys.

    Raises:
        ConfigError: unknown, missing or wrongly typed keys, numbers out of bounds, a feature switched on that is not supported, or
            values that do not fit together; all of them.
    """
    reading = read_config(composed)
    raise_all(reading.findings)
    assert reading.config is not None, "without findings there is one"
    if reading.inert:
        reasons: dict[str, list[str]] = {}
        for name, reason in reading.inert:
            reasons.setdefault(reason, []).append(name)
        _log.warning("these keys have no effect: %s", "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items()))
    return reading.config


def config_as_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers, for ``config.yaml``; absent optional sections are left out."""
    return {name: value for name, value in asdict(config).items() if value is not None}


def _resolve(composed: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    node = composed if isinstance(composed, DictConfig) else OmegaConf.create(dict(composed))
    # Interpolations into what is no section would fail first, with words of their own.
    unresolved = OmegaConf.to_container(node, resolve=False)
    for name in (declared.name for declared in fields(RunConfig)):
        given = unresolved.get(name) if isinstance(unresolved, dict) else None
        if given is not None and not isinstance(given, Mapping):
            section = section_of(get_type_hints(RunConfig)[name])
            assert section is not None, "all that is at the top is sections"
            keys = ", ".join(f"{name}.{declared.name}" for declared in fields(section)[:3])
            raise ConfigError(f"{name}={given}: {name} is a section; set its keys: {keys}, ...")
    try:
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"configuration: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"configuration: expected a mapping, got {type(values).__name__}")
    return {str(k): v for k, v in values.items() if k != "hydra"}


def _derive(config: RunConfig) -> RunConfig:
    """Fill the keys whose null means another key's value."""
    runner, algorithm, actor, rollout = config.runner, config.algorithm, config.actor, config.rollout
    root = f"{runner.output_dir.rstrip('/')}/{runner.experiment_name}"
    logger = replace(
        runner.logger,
        log_path=_given(runner.logger.log_path, root),
        experiment_name=_given(runner.logger.experiment_name, runner.experiment_name),
    )
    sampling = replace(
        algorithm.sampling_params,
        max_new_tokens=_given(algorithm.sampling_params.max_new_tokens, runner.seq_length - config.data.max_prompt_length),
    )
    need_both = algorithm.importance_sampling_fix
    return replace(
        config,
        runner=replace(runner, logger=logger, max_tokens_per_mbs=_given(runner.max_tokens_per_mbs, runner.seq_length)),
        algorithm=replace(algorithm, sampling_params=sampling),
        rollout=replace(
            rollout,
            model=replace(
                rollout.model,
                precision=_given(rollout.model.precision, actor.model.precision),
                trust_remote_code=_given(rollout.model.trust_remote_code, actor.tokenizer.trust_remote_code),
            ),
            return_logprobs=need_both or _given(rollout.return_logprobs, not algorithm.recompute_logprobs),
        ),
        actor=_derive_actor(config, root),
    )


def _derive_actor(config: RunConfig, root: str) -> Any:
    actor, algorithm, hf_path = config.actor, config.algorithm, config.rollout.model.model_path
    samples = config.data.rollout_batch_size * algorithm.group_size
    convertor = actor.megatron.ckpt_convertor
    schedule = actor.lr_sched
    return replace(
        actor,
        micro_batch_size=_given(actor.micro_batch_size, algorithm.training_batch_size_per_gpu),
        global_batch_size=_given(actor.global_batch_size, samples // max(1, algorithm.n_minibatches)),
        tokenizer=replace(actor.tokenizer, tokenizer_model=_given(actor.tokenizer.tokenizer_model, hf_path)),
        lr_sched=replace(schedule, max_lr=_given(schedule.max_lr, actor.optim.lr), min_lr=_given(schedule.min_lr, actor.optim.min_lr)),
        megatron=replace(
            actor.megatron,
            ckpt_convertor=replace(
                convertor,
                hf_model_path=_given(convertor.hf_model_path, hf_path),
                save_path=_given(convertor.save_path, f"{root}/converted_ckpts/actor"),
            ),
        ),
    )


def _given(value: Any, fallback: Any) -> Any:
    return fallback if value is None else value
