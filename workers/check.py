"""What can be known about a run before anything of it is started: every finding at once, in about two seconds.

A run checks itself first; ``--check`` stops after that. Reads configuration, folders and the first rows of data files, and imports
neither torch, transformers, Ray, vLLM nor Megatron. A runner of another kind has a tuple of checks of its own.
"""

from __future__ import annotations

import importlib.util
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlsync.bridge.adapter_folder import check_adapter_folder, placed_adapter
from rlsync.errors import RlsyncError
from rlsync.layout.safetensors import read_checkpoint
from rlsync.models import check_config, model_of
from rlsync.models.lora import adapters_of, check_adapters
from rlsync.models.stacks import Model
from rlsync.models.stored import misfits
from workers.colocation import ColocationPlan, check_overlap, plan_colocation
from workers.config import (
    AnyConfig,
    RunConfig,
    SftConfig,
    Task,
    actor_topology,
    read_config,
    validate_machine,
    validate_model,
    validate_world,
)
from workers.gpus import count_gpus, gpu_bytes
from workers.judges import check_reward_function
from workers.memory import PredictedMemory, misfits_of_memory, predict_memory, shown
from workers.metrics_log import find_logger
from workers.model_folder import (
    check_chat_template,
    check_tokenizer_files,
    check_tokenizer_size,
    read_generation_config,
    read_hf_config,
    text_config,
    token_ids,
)
from workers.pictures import open_picture
from workers.placement import ComponentPlacement, PlacementMode, components_of, resolve_placement
from workers.problems import BadSamples, Problem, load_problems, load_supervised
from workers.ray_access import LOCAL, check_listens, cluster_address
from workers.results import becomes_of_earlier_run, check_writable
from workers.resume import DATA_STATE, check_ranks, find_beginning, run_folder
from workers.resume import check_model as check_restored_model
from workers.reward import unreadable_reference, unreadable_references
from workers.row_files import BadRow, RowFiles, find_files
from workers.sft_rows import Conversation, check_row, conversation, picture_problem, row_form
from workers.validation import validates, validation_notes

_FIRST_ROWS = 200
# Rows of each file whose pictures are opened.
_FIRST_PICTURES = 8
# Lines are counted for the number of steps where a file is not larger than this.
_MAX_COUNTED_BYTES = 2**28
# An array is read as a whole, for which there is no time where a file is larger than this.
_MAX_ARRAY_BYTES = 2**26


@dataclass(slots=True)
class Report:
    """What checks found, and what a run without findings will do.

    Attributes:
        config: None where the configuration cannot be read.
        findings: (what it is about, what is wrong and what to do).
        notes: what has no effect, or will only be known later.
        plan: (what it is about, what will happen).
        dp_size: of the actor, where the placement is known.
        num_ranks: actor ranks; None where the placement is not known.
        colocation: what leaves the GPUs when, where that is known; ``shares_gpus``: engines are on those of the actor.
        gpu_bytes: memory of the largest GPU here, where there is one.
        hf_config: content of the model's config.json, where it has no findings.
        memory: of the fullest GPU of the actor, where it could be predicted.
    """

    config: AnyConfig | None
    findings: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: list[tuple[str, str]] = field(default_factory=list)
    dp_size: int = 1
    num_ranks: int | None = None
    colocation: ColocationPlan | None = None
    shares_gpus: bool = False
    gpu_bytes: int | None = None
    hf_config: Mapping[str, Any] | None = None
    memory: PredictedMemory | None = None

    def found(self, about: str, text: str) -> None:
        if text not in (known for _, known in self.findings):
            self.findings.append((about, text))

    def as_dict(self) -> dict[str, Any]:
        """For JSON. ``memory`` is in bytes, of the fullest GPU of the actor; null where it could not be predicted."""
        findings = [{"about": about, "text": text} for about, text in self.findings]
        memory = None if self.memory is None else self.memory.as_dict()
        return {"findings": findings, "notes": self.notes, "plan": dict(self.plan), "memory": memory}

    def take(self, about: str, check: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call; where it raises one of our errors that is a finding, and the result None."""
        try:
            return check(*arguments)
        except RlsyncError as error:
            for text in _findings_of(error):
                self.found(about, text)
            return None


# The configuration is that of the kind of run that the check is for.
Check = Callable[[Any, Report], None]


def check_run(composed: DictConfig | Mapping[str, Any], checks: Sequence[Check], task: Task = "reasoning") -> Report:
    """Every finding about a run of this kind with this configuration."""
    reading = read_config(composed, task)
    report = Report(reading.config, [("configuration", text) for text in reading.findings])
    report.notes += [f"{name} has no effect: {reason}" for name, reason in reading.inert]
    if reading.config is not None:
        for check in checks:
            check(reading.config, report)
    return report


def check_devices(config: AnyConfig, report: Report) -> None:
    """Placement, layout and batches on the devices of this machine, or as far as they can be known without those of a cluster."""
    placement = config.cluster.component_placement
    address, num_gpus = cluster_address(config.cluster.num_nodes), 0
    if address == LOCAL:
        num_gpus = count_gpus()
        report.gpu_bytes = gpu_bytes() if num_gpus else None
    else:
        report.take("devices", check_listens, address)
        report.notes.append(f"nodes and devices are counted when Ray is joined at {address}")
        if any(value == "all" for value in placement.values()):
            return
    resolved: ComponentPlacement | None = report.take(
        "devices", resolve_placement, placement, num_gpus or None, components_of(config)
    )  # fmt: skip
    if resolved is None:
        return
    report.num_ranks = len(resolved.actor)
    report.take("devices", check_overlap, config, resolved.mode)
    engines = report.take("devices", resolved.engines, config.rollout.tensor_parallel_size)
    dp_size = report.take("devices", validate_world, config, len(resolved.actor))
    report.dp_size = dp_size or 1
    topology = report.take("devices", actor_topology, config.actor.model, report.dp_size)
    if address == LOCAL:
        report.take("devices", lambda: validate_machine(config, on_gpu=num_gpus > 0, is_installed=_is_installed))
        colocation = report.take("devices", lambda: plan_colocation(config, resolved.mode, on_gpu=num_gpus > 0))
        report.notes += [] if colocation is None else colocation.notes
        report.colocation, report.shares_gpus = colocation, resolved.mode is PlacementMode.COLLOCATED
    if engines is not None and dp_size is not None and topology is not None:
        axes = (
            ("TP", topology.tp_size), ("PP", topology.pp_size), ("VPP", topology.vpp_size), ("CP", topology.cp_size),
            ("DP", topology.dp_size), ("EP", topology.ep_size), ("ETP", topology.etp_size),
        )  # fmt: skip
        layout = " ".join(f"{axis} {size}" for axis, size in axes if size > 1)
        kind = "process slots" if address == LOCAL and not num_gpus else "GPUs"
        report.plan.append(("actor", f"{topology.world_size} ranks{f' ({layout})' if layout else ''} on {kind} {_range(resolved.actor)}"))
        if not engines:
            return
        size = config.rollout.tensor_parallel_size
        engine_text = f"{len(engines)}{f' of {size} {kind} each' if size > 1 else ''} on {kind} {_range(resolved.rollout)}"
        report.plan.append(("engines", f"{engine_text}, {resolved.mode.value}"))
        if config.runner.async_steps:
            report.plan.append(("rollouts", "a step ahead of training"))


def check_model(config: AnyConfig, report: Report) -> None:
    """Architecture, layout, rope and limits of the model, or of the one that the run will make."""
    folder = Path(config.model_path)
    seeded = config.seeded_model
    if seeded is not None and Path(seeded.path).absolute() == folder.absolute():
        hf_config: Mapping[str, Any] | None = report.take("model", lambda: seeded.config_json)
        where = "seeded_model.hf_config"
    elif _will_be_made(config, folder):
        report.plan.append(("model", f"a tiny one, made in {folder}"))
        return
    else:
        hf_config, where = report.take("model", read_hf_config, folder, config.model_key), str(folder / "config.json")
    if hf_config is None:
        return
    findings = check_config(hf_config)
    for text in findings:
        report.found("model", f"{where}: {text}")
    if findings:
        return
    report.hf_config, model = hf_config, model_of(hf_config)
    before = len(report.findings)
    report.take("model", validate_model, config, hf_config)
    topology = report.take("model", actor_topology, config.actor.model, report.dp_size)
    if len(report.findings) == before and topology is not None:
        for text in check_config(hf_config, topology):
            report.found("model", f"{where}: {text}")
    if config.runner.seq_length > model.rope.reach(model.max_positions):
        report.found(
            "model",
            f"runner.seq_length ({config.runner.seq_length}) exceeds max_position_embeddings ({model.max_positions}) of {where}; "
            "Lower runner.seq_length",
        )
    is_made, begins_at_random = where == "seeded_model.hf_config", not config.actor.megatron.convert_from_hf
    random = ", with random weights" if is_made or begins_at_random else ""
    made = f"{random}, made by the run unless it is there" if is_made else random
    precision, size = config.actor.model.precision, sum(tensor.size for tensor in model.tensors())
    parameters = f"{size / 1e9:.2f} B" if size >= 1e7 else f"{size / 1e6:.2f} M"
    report.plan.append(
        ("model", f"{model.architecture}, {model.num_layers} layers, {parameters} parameters, {precision}, in {folder}{made}")
    )


def check_memory(config: AnyConfig, report: Report) -> None:
    """What the actor's GPUs have to hold. Comes after devices and model, and asks only where they have no findings."""
    hf_config, plan = report.hf_config, report.colocation or ColocationPlan()
    if hf_config is None or report.num_ranks is None or any(about in ("devices", "model") for about, _ in report.findings):
        return
    topology = actor_topology(config.actor.model, report.dp_size)
    report.memory = report.take(
        "memory", lambda: predict_memory(config, hf_config, topology, plan, shared=report.shares_gpus, device=report.gpu_bytes)
    )
    if report.memory is not None:
        report.plan.append(("memory", shown(report.memory)))
        misfits = list(misfits_of_memory(config, report.memory))
        for text in misfits:
            report.found("memory", text)
        if report.memory.is_close and not misfits:
            report.notes.append(f"the actor may not fit on its GPUs: {shown(report.memory)}, and the prediction may be a tenth off")


def check_weights(config: AnyConfig, report: Report) -> None:
    """The headers of the weight files that a run starts from; no tensor is read."""
    actor = config.actor
    folder = Path(str(actor.megatron.ckpt_convertor.hf_model_path))
    reads_weights = actor.megatron.use_hf_ckpt and actor.megatron.convert_from_hf
    if not reads_weights or _will_be_made(config, folder) or not (folder / "config.json").is_file():
        return
    stored = report.take("weights", read_checkpoint, folder)
    hf_config = report.take("model", read_hf_config, folder, config.model_key)
    model = None if hf_config is None or check_config(hf_config) else model_of(hf_config)
    _check_adapter(config, model, report)
    if stored is None or model is None:
        return
    # Whether a tied model's head is a copy of its embedding is known when it is read.
    shapes = {name: tensor.spec.shape for name, tensor in stored.items() if not (model.tied and name == "lm_head.weight")}
    kept = sum(model.is_kept(name) for name in stored)
    if kept:
        text = f"{kept} tensors of layers that predict further tokens are not trained: saved folders have them as {folder} has"
        report.notes.append(text)
    for text in misfits(model, shapes):
        report.found("weights", f"{folder} does not fit {model.architecture}: {text[:500]}")


def _check_adapter(config: AnyConfig, model: Model | None, report: Report) -> None:
    """The folder of adapters that a run begins with: what they compute, and for a model whether all of them are there and no others."""
    spec, folder = config.actor.lora_spec, config.actor.lora.adapter_path
    if spec is None or folder is None:
        return
    findings = len(report.findings)
    report.take("weights", check_adapter_folder, folder, spec)
    if model is not None and len(report.findings) == findings and not check_adapters(model, spec):
        report.take("weights", placed_adapter, model, adapters_of(model, spec), Path(folder))


def check_tokenizer(config: AnyConfig, report: Report) -> None:
    """The tokenizer's files, its size beside the model's, end-of-sequence ids and the chat template."""
    folder, model = Path(str(config.actor.tokenizer.tokenizer_model)), Path(config.model_path)
    given = None if config.seeded_model is None else config.seeded_model.tokenizer
    if given is not None:
        report.take("tokenizer", lambda: check_tokenizer_files(Path(given), trust_remote_code=False))
    if _will_be_made(config, folder):
        return
    trusting = config.actor.tokenizer.trust_remote_code
    before = len(report.findings)
    report.take("tokenizer", lambda: check_tokenizer_files(folder, trust_remote_code=trusting))
    has_config = (model / "config.json").is_file()
    hf_config = report.take("model", read_hf_config, model, config.model_key) if has_config else None
    if config.data.apply_chat_template and len(report.findings) == before:
        takes_pictures = hf_config is not None and not check_config(hf_config) and model_of(hf_config).vision is not None
        report.take("tokenizer", lambda: check_chat_template(folder, takes_pictures=takes_pictures))
    if not has_config:
        return
    if hf_config is not None:
        report.take("model", token_ids, text_config(hf_config).get("eos_token_id"), f"eos_token_id of {model / 'config.json'}")
    generation = report.take("model", read_generation_config, model)
    if generation is not None:
        report.take("model", token_ids, generation.get("eos_token_id"), f"eos_token_id of {model / 'generation_config.json'}")


def check_data(config: RunConfig, report: Report) -> None:
    """Data files and their first rows, as far as those tell; the run reads the rest."""
    data, bad = config.data, BadSamples()
    report.notes += validation_notes(config, _num_rows(data.val_data_paths, data.val_data_size))
    steps = (_check_picture_rows if data.has_pictures else _check_problems)(config, bad, report)
    form = f"{data.rollout_batch_size} prompts x {config.algorithm.group_size} samples a step"
    report.plan.append(("data", f"{form} from {', '.join(data.train_data_paths)}"))
    if validates(config):
        report.plan.append(("validation", _validation_plan(config)))
    report.plan.append(
        ("steps", "as many as the data has" if steps is None else f"{steps}" if steps == config.runner.max_steps else f"up to {steps}")
    )


def _check_problems(config: RunConfig, bad: BadSamples, report: Report) -> int | None:
    """Text problems; most steps that they make, where that is known."""
    data = config.data
    problems: list[Problem] = []
    for path in (*data.train_data_paths, *data.val_data_paths):
        file = Path(path)
        if file.suffix == ".json" and file.is_file() and file.stat().st_size > _MAX_ARRAY_BYTES:
            report.notes.append(f"{path} is read by the run: an array of that size takes too long here")
        elif not _will_be_made(config, file):
            problems += report.take("data", lambda path=path: _first_problems(config, path, bad)) or []
    unreadable = _Asked(problems, config)
    if config.warm_start is not None:
        for path in config.warm_start.data_paths:
            if not _will_be_made(config, Path(path)):
                report.take("data", load_supervised, [path], _FIRST_ROWS)
    _check_prompts(config, problems, bad, report)
    for problem in unreadable.problems():
        bad.add(problem.where, unreadable_reference(problem.answers[0]))
    report.notes += report.take("data", bad.settle, data.on_bad_sample) or ()
    steps = _num_steps(config)
    _check_enough(config, problems, bad, steps, report)
    return steps


def _check_picture_rows(config: RunConfig, bad: BadSamples, report: Report) -> int | None:
    """Questions about pictures; most steps that they make, where that is known."""
    data, form = config.data, row_form(config.data)
    problems: list[Problem] = []

    def look(content: Any, where: str) -> Sequence[Any]:
        found = picture_problem(content, form, metadata=config.reward.takes_metadata)
        problems.append(Problem("", found.answers, where))
        return found.images

    num_rows = _check_rows(config, data.train_data_paths, look, bad, report)
    _check_rows(config, data.val_data_paths, look, bad, report)
    if config.warm_start is not None:
        _check_rows(config, config.warm_start.data_paths, lambda content, where: conversation(content, form).images, bad, report)
    for problem in _Asked(problems, config).problems():
        bad.add(problem.where, unreadable_reference(problem.answers[0]))
    report.notes += report.take("data", bad.settle, data.on_bad_sample) or ()
    num_rows = num_rows if num_rows is None or data.data_size is None else min(num_rows, data.data_size)
    return _steps_of(num_rows, data.rollout_batch_size, "data.rollout_batch_size", config, report)


def check_sft_data(config: SftConfig, report: Report) -> None:
    """Data files of supervised fine-tuning and the first rows of each, as far as those tell; the run reads the rest."""
    data, bad, form = config.data, BadSamples(), row_form(config.data)

    def look(content: Any, where: str) -> Sequence[Any]:
        found = check_row(content, form)
        return found.images if isinstance(found, Conversation) else ()

    num_rows = _check_rows(config, data.train_data_paths, look, bad, report)
    _check_rows(config, data.val_data_paths, look, bad, report)
    report.notes += report.take("data", bad.settle, data.on_bad_sample) or ()
    batch = config.actor.global_batch_size or 1
    # Documents are packed.
    steps = _steps_of(None if data.type == "text" else num_rows, batch, "actor.global_batch_size", config, report)
    report.plan.append(("data", f"{batch} examples a step from {', '.join(data.train_data_paths)}"))
    report.plan.append(("steps", "as many as the data has" if steps is None else f"{steps}"))
    if data.val_data_paths and (config.runner.val_check_interval > 0 or config.runner.val_before_train):
        answers = ", and answers of the engines" if config.validation.generate else ""
        report.plan.append(("validation", f"loss{answers} on {', '.join(data.val_data_paths)}"))


def _check_rows(
    config: AnyConfig, paths: Sequence[str], look: Callable[[Any, str], Sequence[Any]], bad: BadSamples, report: Report
) -> int | None:
    """Rows of some files together, where that can be known, after a look at the first of each: ``look`` gets a row's content and what to
    call the row, and returns references to its pictures, or raises BadRow."""
    num_rows: int | None = 0
    for path in paths:
        files = None if _will_be_made(config, Path(path)) else report.take("data", find_files, [path])
        if files is not None and sum(file.stat().st_size for file in files if file.suffix != ".parquet") > _MAX_COUNTED_BYTES:
            report.notes.append(f"{path} is read by the run: files of that size take too long here")
            files = None
        rows: RowFiles | None = None if files is None else report.take("data", RowFiles, [path])
        for row in range(0 if rows is None else min(_FIRST_ROWS, len(rows))):
            assert rows is not None
            where, content = rows.read(row)
            try:
                pictures = look(content, where)
                for reference in pictures if row < _FIRST_PICTURES else ():
                    open_picture(reference, rows.folder(row))
            except BadRow as reason:
                bad.add(where, str(reason))
        num_rows = None if num_rows is None or rows is None else num_rows + len(rows)
    return num_rows


def _steps_of(num_rows: int | None, batch: int, key: str, config: AnyConfig, report: Report) -> int | None:
    """Most steps that so many rows make; None where that is not known before they are read. Too few rows are a finding."""
    most, paths = config.runner.max_steps, config.data.train_data_paths
    if num_rows is not None and num_rows < batch and most != 0 and not report.findings:
        report.found("data", f"Train dataloader is empty! {', '.join(paths)}: {num_rows} rows, fewer than {key} ({batch})")
    steps = None if num_rows is None else config.runner.max_epochs * (num_rows // batch)
    return steps if most < 0 else most if steps is None else min(most, steps)


def check_reward(config: RunConfig, report: Report) -> None:
    """The file of a reward function."""
    report.take("reward", check_reward_function, config.reward.reward_type)


def check_loggers(config: AnyConfig, report: Report) -> None:
    """Loggers that are named and not installed."""
    for name in config.runner.logger.logger_backends:
        report.take("loggers", find_logger, name)


def check_beginning(config: AnyConfig, report: Report) -> None:
    """The results folder, and the checkpoint to go on from."""
    beginning = report.take("resume", find_beginning, config)
    folder = run_folder(config)
    if beginning is None:
        return
    report.plan += [("resume", note.strip()) for note in beginning.notes]
    state = None if beginning.resume is None else beginning.resume / DATA_STATE
    if state is not None and state.is_file() and _is_damaged(state):
        report.found("resume", f"{state} cannot be read; resume from an older checkpoint, or remove it to start the data anew")
    model_path = Path(config.model_path)
    if (model_path / "config.json").is_file():
        hf_config = report.take("resume", read_hf_config, model_path, config.model_key)
        if hf_config is not None:
            report.take("resume", check_restored_model, beginning, hf_config, config.model_key)
    if report.num_ranks is not None:
        report.take("resume", check_ranks, beginning, report.num_ranks)
    report.take("results", check_writable, folder)
    aside = report.take("results", becomes_of_earlier_run, config, beginning.resume)
    if aside is not None:
        report.plan.append(("results", f"hold an earlier run, which a start sets aside as {aside}"))
    start = "from the start" if beginning.resume is None else f"after step {beginning.step} of {beginning.resume}"
    if 0 <= config.runner.max_steps <= beginning.step:
        start = f"nothing is to do: runner.max_steps is {config.runner.max_steps}, and {beginning.step} steps are done"
    report.plan.append(("begins", f"{start}; results go to {folder}"))


GRPO_CHECKS: tuple[Check, ...] = (
    check_devices,
    check_model,
    check_memory,
    check_weights,
    check_tokenizer,
    check_data,
    check_reward,
    check_loggers,
    check_beginning,
)
SFT_CHECKS: tuple[Check, ...] = (
    check_devices, check_model, check_memory, check_weights, check_tokenizer, check_sft_data, check_loggers, check_beginning,
)  # fmt: skip


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _is_damaged(archive: Path) -> bool:
    """Whether a file of ``torch.save`` is not what was written, by its own sums, at which torch does not look."""
    try:
        with zipfile.ZipFile(archive) as content:
            return content.testzip() is not None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError):
        # What zipfile makes of a flipped bit: another way to compress, a password that is asked for, a name that is no text.
        return True


class _Asked:
    """References that are being tried while other checks go on: math-verify takes a second to be imported."""

    def __init__(self, problems: Sequence[Problem], config: RunConfig) -> None:
        self._problems = problems
        references = [answer for problem in problems for answer in problem.answers] if config.reward.reward_type == "math" else []
        self._pool = ThreadPoolExecutor(1)
        self._asked = self._pool.submit(unreadable_references, references, num_processes=1, timeout_s=config.reward.timeout_s)

    def problems(self) -> Iterator[Problem]:
        """Those that no response could ever solve."""
        unreadable = self._asked.result()
        self._pool.shutdown()
        return (problem for problem in self._problems if unreadable and unreadable.issuperset(problem.answers))


def _first_problems(config: RunConfig, path: str, bad: BadSamples) -> list[Problem]:
    data = config.data
    return load_problems(
        [path],
        prompt_key=data.prompt_key,
        answer_key=data.answer_key,
        data_size=data.data_size,
        bad=bad,
        rows_per_file=_FIRST_ROWS,
        metadata=config.reward.takes_metadata,
    )


def _check_enough(config: RunConfig, problems: Sequence[Problem], bad: BadSamples, steps: int | None, report: Report) -> None:
    """Whether the training files hold a batch."""
    data = config.data
    files = [Path(path) for path in data.train_data_paths]
    starts, names = tuple(map(str, files)), ", ".join(data.train_data_paths)
    lost = {where for where, _ in bad.found if where.startswith(starts)}
    left = {problem.where for problem in problems if problem.where.startswith(starts)} - lost
    # With fewer rows than are looked at, these are all.
    are_all_known = len(lost) < _FIRST_ROWS and all(file.is_file() and file.stat().st_size <= _MAX_ARRAY_BYTES for file in files)
    if data.on_bad_sample == "skip" and lost and not left and are_all_known:
        report.found("data", f"all rows of {names} are bad samples, which data.on_bad_sample=skip leaves out: nothing is left to train on")
    elif left and steps == 0 and config.runner.max_steps != 0:
        report.found(
            "data",
            f"Train dataloader is empty! {names}: fewer problems than data.rollout_batch_size ({data.rollout_batch_size}); "
            "lower it, or give more problems",
        )


def _check_prompts(config: RunConfig, problems: Sequence[Problem], bad: BadSamples, report: Report) -> None:
    """What the tokenizer makes of the first prompts that are text."""
    texts = [problem for problem in problems if isinstance(problem.prompt, str)]
    if len(texts) < len(problems) and not config.data.apply_chat_template:
        where = next(problem.where for problem in problems if not isinstance(problem.prompt, str))
        report.found("data", f"{where}: a prompt is a message list: set data.apply_chat_template=True")
    path = Path(str(config.actor.tokenizer.tokenizer_model)) / "tokenizer.json"
    if not texts or not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        report.found("tokenizer", f"no tokenizer can be made from {path}: {error}")
        return
    hf_path = Path(config.model_path)
    if (hf_path / "config.json").is_file():
        hf_config = report.take("model", read_hf_config, hf_path, config.model_key) or {}
        size = tokenizer.get_vocab_size(with_added_tokens=False)
        report.take("tokenizer", check_tokenizer_size, size, text_config(hf_config).get("vocab_size"), path.parent)
    tokenizer.no_truncation()
    encoded = tokenizer.encode_batch([f"{problem.prompt}{config.data.prompt_suffix}" for problem in texts], add_special_tokens=False)
    rows = [encoding.ids for encoding in encoded]
    if not any(rows):
        report.found("tokenizer", "the tokenizer makes no token of any prompt; its files are incomplete, or those of another model")
        return
    for problem, row in zip(texts, rows, strict=True):
        if not row:
            bad.add(problem.where, f"the prompt {str(problem.prompt)[:40]!r} has no tokens")
    shortest, limit = min(map(len, rows)), config.data.max_prompt_length
    if shortest > limit and config.data.filter_prompt_by_length:
        report.found(
            "data",
            f"all of the first {len(rows)} prompts are longer than data.max_prompt_length ({limit}); the shortest has {shortest} tokens",
        )


def _num_steps(config: RunConfig) -> int | None:
    """Most steps that a run can have, or None where that is not known before the data is read."""
    most, data = config.runner.max_steps, config.data
    rows = _num_rows(data.train_data_paths, data.data_size)
    if rows is None:
        return most if most >= 0 else None
    steps = config.runner.max_epochs * (rows // data.rollout_batch_size)
    return steps if most < 0 else min(most, steps)


def _num_rows(names: Sequence[str], most: int | None) -> int | None:
    """Rows that a run takes from some data files, or None where that is not known before it reads them."""
    paths = [Path(name) for name in names]
    if not all(path.is_file() and path.suffix not in (".json", ".parquet") and path.stat().st_size <= _MAX_COUNTED_BYTES for path in paths):
        return None
    rows = 0
    for path in paths:
        with path.open("rb") as stream:
            rows += sum(1 for line in stream if line.strip())
    return rows if most is None else min(rows, most)


def _validation_plan(config: RunConfig) -> str:
    data, runner = config.data, config.runner
    first = ["before the first step"] if runner.val_before_train else []
    every = ["after every step" if runner.val_check_interval == 1 else f"every {runner.val_check_interval} steps and after the last"]
    when = " and ".join(first + (every if runner.val_check_interval > 0 else []))
    limit = "" if data.val_data_size is None else f"the first {data.val_data_size} problems of "
    return f"{when}: one greedy response to {limit or 'each problem of '}{', '.join(data.val_data_paths)}"


def _will_be_made(config: AnyConfig, path: Path) -> bool:
    """Whether a path that is not there yet belongs to what the run makes first."""
    makers = [made.path for made in (config.arithmetic, config.pictures, config.seeded_model) if made is not None]
    return not path.exists() and any(path.absolute().is_relative_to(Path(maker).absolute()) for maker in makers)


def _findings_of(error: RlsyncError) -> list[str]:
    lines = str(error).splitlines()
    if len(lines) > 1 and lines[0].endswith(":") and all(line.startswith("  ") for line in lines[1:]):
        return [line.strip() for line in lines[1:]] if lines[0] == "configuration:" else [str(error)]
    return [str(error)]


def _range(devices: Sequence[int]) -> str:
    return str(devices[0]) if len(devices) == 1 else f"{devices[0]}-{devices[-1]}"
