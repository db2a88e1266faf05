"""hydra's DictConfig to a validated ``RunConfig`` or ``SftConfig``: resolve, build, derive, validate, and warn once about inert keys.

Owns the conversion of plain mappings to the dataclasses of ``tasks``, with all findings at once. Knows no yaml file and no rule between
keys.
"""

from __future__ import annotations

import logging
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, overload

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlsync.errors import ConfigError
from workers.config.fields import Task, annotations_of, bounds_of, dotted_keys, section_of
from workers.config.foreign_keys import hint, inert_reason, other_name
from workers.config.grpo import RunConfig
from workers.config.schema import ActorConfig
from workers.config.sft import SftConfig
from workers.config.tasks import CONFIG_OF_TASK, AnyConfig
from workers.config.unread_keys import unread_keys
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

    config: AnyConfig | None
    findings: tuple[str, ...]
    inert: tuple[tuple[str, str], ...]


# The scripts that run a task.
SCRIPTS: Mapping[Task, str] = {
    "reasoning": "examples/reasoning/run_main_grpo_math.sh",
    "sft": "examples/sft/run_vlm_sft.sh and run_llm_sft.sh",
}


def read_config(composed: DictConfig | Mapping[str, Any], task: Task = "reasoning") -> Reading:
    """The typed configuration of a run, and all that is wrong with it.

    Args:
        composed: what hydra composed, or a nested mapping. Interpolations are resolved here, so
            ``register_resolvers`` must have run when they use our resolvers.
        task: the kind of run that it has to be of, also where ``runner.task_type`` is left out.
    """
    inert: list[tuple[str, str]] = []
    node = composed if isinstance(composed, DictConfig) else OmegaConf.create(dict(composed))
    named = _task_of(node, task)
    if named != task:
        return Reading(None, (f"runner.task_type is {named}: such a run is started by {SCRIPTS[named]}, not by {SCRIPTS[task]}",), ())
    cls = CONFIG_OF_TASK[task]

    def tolerate(dotted: str, value: Any) -> bool:
        reason = inert_reason(dotted, value, task)
        if reason is not None:
            inert.append((dotted, reason))
        return reason is not None

    try:
        values, interpolated = _resolve(node, cls)
        if task == "sft":
            _name_as_here(values)
    except ConfigError as error:
        return Reading(None, (str(error),), ())
    built: Built[Any] = build(cls, values, tolerate)
    config = None if built.config is None else _derive(built.config)
    # Rules between keys say nothing about values that are not there.
    is_exact = built.is_exact and not interpolated.dropped
    broken = list(broken_rules(config)) if config is not None and is_exact else []
    if built.config is not None and config is not None:
        inert += unread_keys(built.config, config)
    return Reading(config, (*interpolated.told_with(built.errors), *broken), tuple(inert))


def _task_of(node: DictConfig, default: Task) -> Task:
    """The kind of run that ``runner.task_type`` names; ``default`` without it, and where its value is none, which ``build`` refuses."""
    try:
        named = OmegaConf.select(node, "runner.task_type")
    except OmegaConfBaseException:
        return default
    return named if isinstance(named, str) and named in CONFIG_OF_TASK else default  # type: ignore[return-value]


def _name_as_here(values: dict[str, Any]) -> None:
    """Put what RLinf's SFT configurations name otherwise under the names that it has here.

    Raises ConfigError where both names are given and differ.
    """
    for theirs, ours in (
        ("data.eval_data_paths", "data.val_data_paths"),
        ("actor.model.seq_length", "runner.seq_length"),
        ("actor.model.model_path", "rollout.model.model_path"),
    ):
        section, _, name = theirs.rpartition(".")
        there = _select(values, section)
        if there is None or there.get(name) is None:
            continue
        target, _, our_name = ours.rpartition(".")
        here = _select(values, target, make=True)
        if here is None:  # what is no section is told by ``build``
            continue
        if here.setdefault(our_name, there[name]) != there[name]:
            raise ConfigError(f"{ours} ({here[our_name]}) and {theirs} ({there[name]}) are the same key in an SFT run; leave one out")
        if name == "eval_data_paths":
            del there[name]
    model = _select(values, "rollout.model", make=True)
    if model is not None:
        model.setdefault("model_path", "???")  # as hydra writes it; a rule names the key that is missing
    if isinstance(values.get("runner"), dict):
        values["runner"].setdefault("task_type", "sft")


def _select(values: dict[str, Any], dotted: str, *, make: bool = False) -> dict[str, Any] | None:
    """The section of a dotted name, or None where there is none and it cannot, or is not to, be made."""
    found: Any = values
    for name in dotted.split("."):
        if make and name not in found:
            found[name] = {}
        found = found.get(name)
        if not isinstance(found, dict):
            return None
    return found


@overload
def load_config(composed: DictConfig | Mapping[str, Any], task: Literal["reasoning"] = "reasoning") -> RunConfig: ...


@overload
def load_config(composed: DictConfig | Mapping[str, Any], task: Literal["sft"]) -> SftConfig: ...


def load_config(composed: DictConfig | Mapping[str, Any], task: Task = "reasoning") -> AnyConfig:
    """``read_config`` with one warning about inert keys.

    Raises:
        ConfigError: unknown, missing or wrongly typed keys, numbers out of bounds, a feature switched on that is not supported, or
            values that do not fit together; all of them.
    """
    reading = read_config(composed, task)
    raise_all(reading.findings)
    assert reading.config is not None, "without findings there is one"
    if reading.inert:
        reasons: dict[str, list[str]] = {}
        for name, reason in reading.inert:
            reasons.setdefault(reason, []).append(name)
        _log.warning("these keys have no effect: %s", "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items()))
    return reading.config


def config_as_dict(config: AnyConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers, for ``config.yaml``, loggers and checkpoints; absent optional sections are left out.

    So are name and password in the address of a proxy, because others read what these are given.
    """
    found = {name: value for name, value in asdict(config).items() if value is not None}
    logger = found["runner"]["logger"]
    if logger["wandb_proxy"] is not None:
        logger["wandb_proxy"] = re.sub(r"^(\w+://)?[^/]*@", r"\1***@", logger["wandb_proxy"])
    return found


def _resolve(node: DictConfig, cls: type[AnyConfig]) -> tuple[dict[str, Any], _Interpolated]:
    """The values of all keys that have one, and what is to be said about the others."""
    # Interpolations into what is no section would fail first, with words of their own.
    unresolved = OmegaConf.to_container(node, resolve=False)
    for name in (declared.name for declared in fields(cls)):
        given = unresolved.get(name) if isinstance(unresolved, dict) else None
        if given is not None and not isinstance(given, Mapping):
            section = section_of(annotations_of(cls)[name])
            assert section is not None, "all that is at the top is sections"
            keys = ", ".join(f"{name}.{declared.name}" for declared in fields(section)[:3])
            raise ConfigError(f"{name}={given}: {name} is a section; set its keys: {keys}, ...")
    if not isinstance(unresolved, dict):
        raise ConfigError(f"configuration: expected a mapping, got {type(unresolved).__name__}")
    plain = {str(name): value for name, value in unresolved.items() if name != "hydra"}
    interpolated = _Interpolated(plain, cls)
    if not interpolated.is_any:
        return plain, interpolated
    interpolated.settle_missing()
    interpolated.settle_failing()
    values = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    assert isinstance(values, dict), "it was made of one"
    return {str(name): value for name, value in values.items()}, interpolated


_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


class _Interpolated:
    """The keys of a configuration whose value is computed from other keys; those that cannot be are taken out, and have their defaults.

    Attributes:
        findings: why they cannot, a sentence for each cause.
        dropped: their dotted names.
        sources: for each failure that a wrong value may have caused, the keys that were read and the finding without such a cause.
    """

    def __init__(self, values: dict[str, Any], cls: type[AnyConfig]) -> None:
        """Takes what is missing (``???``) out of ``values``, and changes them in place later on too."""
        self.findings: list[str] = []
        self.dropped: set[str] = set()
        self.sources: list[tuple[tuple[str, ...], str]] = []
        self._values, self._cls = values, cls
        self._readers: dict[str, tuple[str, ...]] = {}
        for path, value in list(_plain_keys(values)):
            if value == "???":
                self._section(path).pop(path[-1])
            elif "${" in str(value):
                self._readers[".".join(path)] = tuple(_REFERENCE.findall(str(value)))

    @property
    def is_any(self) -> bool:
        """Whether a value is computed from others; else all of them are what they say."""
        return bool(self._readers)

    def settle_missing(self) -> None:
        """Give keys that are read and not given their default; without one, a finding names the key and its readers."""
        missing: dict[str, list[str]] = {}
        for reader, sources in self._readers.items():
            for source in sources:
                if not self._is_given(source) and not self._take_default(source):
                    missing.setdefault(source, []).append(reader)
        for source, readers in missing.items():
            self.findings.append(f"{source} is missing; {', '.join(readers)} need{'s' * (len(readers) == 1)} it")
            for reader in readers:
                self._drop(reader)
        while lost := [name for name, sources in self._readers.items() if self.dropped.intersection(sources)]:
            for name in lost:
                self._drop(name)

    def settle_failing(self) -> None:
        """Take out what still cannot be computed."""
        node = OmegaConf.create(self._values)
        failed: dict[str, str] = {}
        for name in self._readers:
            try:
                value = OmegaConf.select(node, name)
                if OmegaConf.is_config(value):
                    OmegaConf.to_container(value, resolve=True)
            except (OmegaConfBaseException, ConfigError) as error:
                failed[name] = str(error).splitlines()[0]
        for name, reason in failed.items():
            if not failed.keys() & set(self._readers[name]):
                self.sources.append((self._readers[name], f"{name} cannot be computed: {reason}"))
        for name in failed:
            self._drop(name)

    def told_with(self, errors: Sequence[str]) -> list[str]:
        """The findings and ``errors`` about the resolved keys, each cause once."""
        lacking = {name for name in self.dropped for error in errors if error.startswith(f"{name} is required")}
        missing = {finding.partition(" is missing; ")[0] for finding in self.findings}
        told = [error for error in errors if error.partition(" is required")[0] not in lacking | missing]
        wrong = [finding for sources, finding in self.sources if not any(e.startswith((f"{s}:", f"{s} ")) for s in sources for e in errors)]
        return [*self.findings, *wrong, *told]

    def _section(self, path: Sequence[str]) -> dict[str, Any]:
        section = self._values
        for name in path[:-1]:
            section = section[name]
        return section

    def _is_given(self, dotted: str) -> bool:
        value: Any = self._values
        for name in dotted.split("."):
            if not isinstance(value, Mapping):
                return value is not None  # an element of a list, or of what is itself computed
            if name not in value:
                return False
            value = value[name]
        return True

    def _take_default(self, dotted: str) -> bool:
        """Whether the key has a default, which then becomes its value. A section that is left out as a whole has none."""
        cls: type = self._cls
        section, names = self._values, dotted.split(".")
        for depth, name in enumerate(names):
            declared = {declared.name: declared for declared in fields(cls)}.get(name)
            inner = None if declared is None else section_of(annotations_of(cls)[name])
            if declared is None or (inner is None) != (depth == len(names) - 1):
                return False
            if inner is None:
                if declared.default is MISSING:
                    return False
                section[name] = declared.default
                return True
            if declared.default is None and name not in section:
                return False
            if not isinstance(section.setdefault(name, {}), dict):
                return False
            cls, section = inner, section[name]
        return False

    def _drop(self, dotted: str) -> None:
        self.dropped.add(dotted)
        self._readers.pop(dotted, None)
        path = dotted.split(".")
        self._section(path).pop(path[-1], None)


def _plain_keys(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every key that is no section."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _plain_keys(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


def _derive(config: AnyConfig) -> AnyConfig:
    """Fill the keys whose null means another key's value."""
    runner, actor, rollout = config.runner, config.actor, config.rollout
    root = f"{runner.output_dir.rstrip('/')}/{runner.experiment_name}"
    logger = replace(
        runner.logger,
        log_path=_given(runner.logger.log_path, root),
        experiment_name=_given(runner.logger.experiment_name, runner.experiment_name),
    )
    model = replace(
        rollout.model,
        precision=_given(rollout.model.precision, actor.model.precision),
        trust_remote_code=_given(rollout.model.trust_remote_code, actor.tokenizer.trust_remote_code),
    )
    derived = replace(
        config,
        runner=replace(runner, logger=logger, max_tokens_per_mbs=_given(runner.max_tokens_per_mbs, runner.seq_length)),
        rollout=replace(rollout, model=model),
        actor=_derive_actor(actor, config.model_path, root),
    )
    return _derive_grpo(derived) if isinstance(derived, RunConfig) else _derive_sft(derived)


def _derive_actor(actor: ActorConfig, model_path: str, root: str) -> ActorConfig:
    convertor, schedule = actor.megatron.ckpt_convertor, actor.lr_sched
    return replace(
        actor,
        tokenizer=replace(actor.tokenizer, tokenizer_model=_given(actor.tokenizer.tokenizer_model, model_path)),
        lr_sched=replace(schedule, max_lr=_given(schedule.max_lr, actor.optim.lr), min_lr=_given(schedule.min_lr, actor.optim.min_lr)),
        megatron=replace(
            actor.megatron,
            ckpt_convertor=replace(
                convertor,
                hf_model_path=_given(convertor.hf_model_path, model_path),
                save_path=_given(convertor.save_path, f"{root}/converted_ckpts/actor"),
            ),
        ),
    )


def _derive_grpo(config: RunConfig) -> RunConfig:
    runner, algorithm, actor, rollout = config.runner, config.algorithm, config.actor, config.rollout
    sampling = replace(
        algorithm.sampling_params,
        max_new_tokens=_given(algorithm.sampling_params.max_new_tokens, runner.seq_length - config.data.max_prompt_length),
    )
    fix = _given(algorithm.importance_sampling_fix, runner.async_steps > 0 and algorithm.recompute_logprobs)
    samples = config.data.rollout_batch_size * algorithm.group_size
    return replace(
        config,
        algorithm=replace(algorithm, sampling_params=sampling, importance_sampling_fix=fix),
        rollout=replace(
            rollout,
            return_logprobs=_given(rollout.return_logprobs, True if fix or not algorithm.recompute_logprobs else None),
            enable_return_routed_experts=_given(rollout.enable_return_routed_experts, actor.megatron.router_replay == "R3"),
        ),
        actor=replace(
            actor,
            micro_batch_size=_given(actor.micro_batch_size, algorithm.training_batch_size_per_gpu),
            global_batch_size=_given(actor.global_batch_size, samples // max(1, algorithm.n_minibatches)),
        ),
    )


def _derive_sft(config: SftConfig) -> SftConfig:
    actor = config.actor
    return replace(
        config,
        rollout=replace(config.rollout, return_logprobs=_given(config.rollout.return_logprobs, False)),
        actor=replace(actor, eval_batch_size=_given(actor.eval_batch_size, actor.micro_batch_size)),
    )


def _given(value: Any, fallback: Any) -> Any:
    return fallback if value is None else value


T = TypeVar("T")


class _Mismatch(Exception):
    """A value that does not fit its annotation; the message says what was expected."""


class _OutOfBounds(Exception):
    """A number that its key cannot have; the message says what it must be."""


@dataclass(slots=True)
class _Findings:
    """What one build collected.

    Attributes:
        errors: all of them.
        num_values: how many of them say that a value cannot be taken, so that the key has its default instead.
        is_lacking: a key without a default has no value.
    """

    known: tuple[str, ...]
    task: Task
    tolerate: Callable[[str, Any], bool]
    errors: list[str] = field(default_factory=list)
    num_values: int = 0
    is_lacking: bool = False

    def unknown(self, dotted: str, value: Any) -> None:
        """Name a key, or the keys of a section that is none."""
        said = hint(dotted, self.known, self.task)
        keys = value if isinstance(value, Mapping) else {}
        if keys and (not said.startswith("did you mean") or any(other_name(f"{dotted}.{name}", self.task) for name in keys)):
            for name, inner in keys.items():
                if not self.tolerate(f"{dotted}.{name}", inner):
                    self.unknown(f"{dotted}.{name}", inner)
        else:
            self.errors.append(f"unknown key {dotted}: {said}")

    def value(self, message: str) -> None:
        self.errors.append(message)
        self.num_values += 1


@dataclass(frozen=True, slots=True)
class Built(Generic[T]):
    """What ``build`` made of a mapping.

    Attributes:
        config: None where a key without a default has no value that can be taken.
        errors: what is wrong with keys, one sentence each.
        is_exact: every value is the one that was given; otherwise keys that ``errors`` names have their defaults.
    """

    config: T | None
    errors: tuple[str, ...]
    is_exact: bool


def build(cls: type[T], values: Mapping[str, Any], tolerate: Callable[[str, Any], bool]) -> Built[T]:
    """``cls`` filled from nested mappings, with every unknown, missing, wrongly typed or impossible key by its full dotted name.

    Args:
        tolerate: called with the dotted name and value of each key without a field; True accepts it. A ConfigError that it raises
            is one more finding.
    """
    task: Task = "sft" if issubclass(cls, SftConfig) else "reasoning"
    findings = _Findings(known=tuple(dotted_keys(cls)), task=task, tolerate=tolerate)
    result = _build(cls, values, "", findings)
    return Built(None if findings.is_lacking else result, tuple(findings.errors), is_exact=not findings.num_values)


def _build(cls: type, values: Mapping[str, Any], prefix: str, findings: _Findings) -> Any:
    hints = annotations_of(cls)
    declared = {f.name: f for f in fields(cls)}
    for name, value in values.items():
        if name not in declared:
            try:
                tolerated = findings.tolerate(prefix + str(name), value)
            except ConfigError as error:
                findings.errors.append(str(error))
                continue
            if not tolerated:
                findings.unknown(prefix + str(name), value)
    arguments = {name: _field(values, declaration, hints[name], prefix + name, findings) for name, declaration in declared.items()}
    try:
        return cls(**arguments)
    except ConfigError as error:  # a section of the library checks itself; all its keys have defaults
        findings.value(str(error))
        return cls()


def _field(values: Mapping[str, Any], declaration: Field[Any], annotation: Any, dotted: str, findings: _Findings) -> Any:
    name, section = declaration.name, section_of(annotation)
    if name in values and section is not None and isinstance(values[name], Mapping):
        return _build(section, values[name], f"{dotted}.", findings)
    if name in values and section is None:
        try:
            return _filled(_bounded(_convert(values[name], annotation), declaration), declaration, annotation)
        except _Mismatch as mismatch:
            findings.value(f"{dotted}: expected {mismatch}, got {values[name]!r}")
        except _OutOfBounds as finding:
            findings.value(f"{dotted} ({values[name]}) {finding}{', or null' if type(None) in get_args(annotation) else ''}")
    elif name in values and values[name] is not None:
        findings.value(f"{dotted}: expected a section with keys, got {values[name]!r}")
    elif declaration.default is MISSING and section is None:
        findings.errors.append(f"{dotted} is required: {declaration.metadata['doc']}")
    if declaration.default is not MISSING:
        return declaration.default
    if section is not None:
        return _build(section, {}, f"{dotted}.", findings)
    findings.is_lacking = True
    return None


def _bounded(value: Any, declaration: Field[Any]) -> Any:
    bounds = bounds_of(declaration)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and bounds is not None:
        finding = bounds.finding(value)
        if finding is not None:
            raise _OutOfBounds(finding)
    return value


def _filled(value: Any, declaration: Field[Any], annotation: Any) -> Any:
    """An empty text would be a path: that of the folder in which the run was started."""
    if isinstance(value, str) and not value.strip() and declaration.default != "":
        raise _Mismatch("a string that is not empty" + (", or null" if type(None) in get_args(annotation) else ""))
    return value


def _convert(value: Any, annotation: Any) -> Any:
    """A plain value as its annotation wants it; ints are taken for floats, strings of digits for neither."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        *others, last = [a for a in args if a is not type(None)]
        for other in others:
            try:
                return _convert(value, other)
            except _Mismatch:
                pass
        return _convert(value, last)
    if origin is Literal:
        if isinstance(value, bool) and ("on" if value else "off") in args:
            return "on" if value else "off"  # as YAML reads these without quotes
        if value not in args or isinstance(value, bool):
            raise _Mismatch("one of " + ", ".join(map(str, args)))
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, args[0]) for item in items)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _Mismatch("a mapping")
        return {str(k): v for k, v in value.items()}
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)):
        return value
    raise _Mismatch({bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[annotation])


# torch's dtype names to the precisions of this configuration: OmegaConf nodes cannot hold a torch.dtype.
_PRECISION_OF_DTYPE = {
    **dict.fromkeys(("float32", "float", "fp32"), "fp32"),
    **dict.fromkeys(("bfloat16", "bf16"), "bf16"),
    **dict.fromkeys(("float16", "half", "fp16"), "fp16"),
}


def register_resolvers() -> None:
    """Make ``${multiply:}``, ``${int_div:}``, ``${subtract:}``, ``${not:}`` and ``${torch.dtype:}`` known to OmegaConf. Idempotent."""
    resolvers: dict[str, Callable[..., Any]] = {
        "multiply": lambda a, b: a * b,
        "int_div": lambda a, b: a // b,
        "subtract": lambda a, b: a - b,
        "not": lambda value: not value,
        "torch.dtype": _precision_of_dtype,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def _precision_of_dtype(name: str) -> str:
    precision = _PRECISION_OF_DTYPE.get(str(name).removeprefix("torch."))
    if precision is None:
        raise ConfigError(f"${{torch.dtype:{name}}}: known names are {', '.join(_PRECISION_OF_DTYPE)}")
    return precision
