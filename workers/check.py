"""What can be known about a run before anything of it is started: every finding at once, in about two seconds.

A run checks itself first; ``--check`` stops after that. Reads configuration, folders and the first rows of data files, and imports
neither torch, transformers, Ray, vLLM nor Megatron. A runner of another kind has a tuple of checks of its own.
"""

from __future__ import annotations

import importlib.util
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlsync.bridge.adapter_folder import base_of_adapter, check_adapter_folder, other_base, placed_adapter
from rlsync.coordinator.server import check_bind_host
from rlsync.errors import ConfigError
from rlsync.layout.safetensors import read_checkpoint
from rlsync.models import check_config, model_of
from rlsync.models.lora import adapters_of, check_adapters
from rlsync.models.moe import further_layers_note
from rlsync.models.stacks import Model
from rlsync.models.stored import misfits
from workers.check_data import check_data, check_sft_data
from workers.check_report import Check, Report, will_be_made
from workers.colocation import ColocationPlan, check_overlap, plan_colocation
from workers.config import (
    AnyConfig,
    RunConfig,
    Task,
    actor_topology,
    read_config,
    validate_engines_on_machine,
    validate_machine,
    validate_model,
    validate_world,
)
from workers.config.unread_keys import keys_of_gpus
from workers.gpus import count_gpus, gpu_bytes
from workers.judges import check_reward_function
from workers.memory import misfits_of_memory, predict_memory, shown
from workers.metrics_log import check_exporter, find_logger
from workers.model_folder import (
    check_chat_template,
    check_same_model,
    check_tokenizer_files,
    read_generation_config,
    read_hf_config,
    text_config,
    token_ids,
)
from workers.pictures import PROCESSOR_FILES, check_picture_limits
from workers.placement import ComponentPlacement, PlacementMode, components_of, device_range, resolve_placement
from workers.ray_access import LOCAL, check_listens, cluster_address
from workers.results import becomes_of_earlier_run, check_writable, places_of_results
from workers.resume import DATA_STATE, find_beginning, note_on_ranks, run_folder
from workers.resume import check_model as check_restored_model


def check_run(composed: DictConfig | Mapping[str, Any], checks: Sequence[Check], task: Task = "reasoning") -> Report:
    """Every finding about a run of this kind with this configuration."""
    reading = read_config(composed, task)
    report = Report(reading.config, [("configuration", text) for text in reading.findings])
    report.notes += [f"{name} has no effect: {reason}" for name, reason in reading.inert]
    if reading.config is not None:
        for check in checks:
            # What a check reads by itself may be closed, too.
            report.take("files", check, reading.config, report)
    return report


def check_devices(config: AnyConfig, report: Report) -> None:
    """Placement, layout and batches on the devices of this machine, or as far as they can be known without those of a cluster."""
    placement = config.cluster.component_placement
    address, num_gpus = cluster_address(config.cluster.num_nodes), 0
    if address == LOCAL:
        num_gpus = count_gpus()
        report.on_gpus = num_gpus > 0
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
        if config.has_engines:
            report.take("devices", check_bind_host, config.weight_sync.bind_host)
        report.take("devices", lambda: validate_machine(config, on_gpu=report.on_gpus, is_installed=_is_installed))
        if not report.on_gpus:
            told = {note.partition(" has no effect")[0] for note in report.notes}
            report.notes += [f"{name} has no effect: there are no GPUs" for name in keys_of_gpus(config) if name not in told]
        colocation = report.take("devices", lambda: plan_colocation(config, resolved.mode, on_gpu=report.on_gpus))
        report.notes += [] if colocation is None else colocation.notes
        report.colocation, report.shares_gpus = colocation, resolved.mode is PlacementMode.COLLOCATED
    if engines is not None and dp_size is not None and topology is not None:
        axes = (
            ("TP", topology.tp_size), ("PP", topology.pp_size), ("VPP", topology.vpp_size), ("CP", topology.cp_size),
            ("DP", topology.dp_size), ("EP", topology.ep_size), ("ETP", topology.etp_size),
        )  # fmt: skip
        layout = " ".join(f"{axis} {size}" for axis, size in axes if size > 1)
        kind = "GPUs" if report.on_gpus else "process slots"
        report.plan.append(
            ("actor", f"{topology.world_size} ranks{f' ({layout})' if layout else ''} on {kind} {device_range(resolved.actor)}")
        )
        if not engines:
            return
        size = config.rollout.tensor_parallel_size
        engine_text = f"{len(engines)}{f' of {size} {kind} each' if size > 1 else ''} on {kind} {device_range(resolved.rollout)}"
        report.plan.append(("engines", f"{engine_text}, {resolved.mode.value}{_in_turns(config, len(engines))}"))
        if config.runner.async_steps:
            report.plan.append(("rollouts", "a step ahead of training"))


def _in_turns(config: AnyConfig, num_engines: int) -> str:
    """Where an engine has more samples of a step than it runs at once: the last ones wait for the first."""
    if not isinstance(config, RunConfig):
        return ""
    most, algorithm = config.rollout.max_running_requests, config.algorithm
    each = -(-config.data.rollout_batch_size // num_engines) * (algorithm.group_size if algorithm.sampling_params.do_sample else 1)
    return "" if each <= most else f"; up to {each} samples of a step each, {most} at once (rollout.max_running_requests)"


def check_model(config: AnyConfig, report: Report) -> None:
    """Architecture, layout, rope and limits of the model, or of the one that the run will make."""
    folder = Path(config.model_path)
    seeded = config.seeded_model
    if seeded is not None and Path(seeded.path).absolute() == folder.absolute():
        hf_config: Mapping[str, Any] | None = report.take("model", lambda: seeded.config_json)
        where = "seeded_model.hf_config"
    elif will_be_made(config, folder):
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
    report.take("model", lambda: validate_engines_on_machine(config, hf_config, on_gpu=report.on_gpus))
    topology = report.take("model", actor_topology, config.actor.model, report.dp_size)
    if len(report.findings) == before and topology is not None:
        for text in check_config(hf_config, topology):
            report.found("model", f"{where}: {text}")
    if model.vision is not None and where != "seeded_model.hf_config":
        report.take("model", _check_image_processor, config, folder)
    if "num_experts" not in model.dims:
        told = {note.partition(" has no effect")[0] for note in report.notes}
        given = (
            f"actor.model.{name}" for name, value in config.actor.model.transformer_overrides().items() if name.startswith("moe_") and value
        )
        report.notes += [f"{name} has no effect: {model.architecture} has no experts" for name in given if name not in told]
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


def _check_image_processor(config: AnyConfig, folder: Path) -> None:
    """The files of an image processor, where the run makes one, and its limits. Raises ConfigError."""
    data = config.data
    if data.type in ("math", "reasoning", "text"):
        return
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise ConfigError(f"{folder} holds no image processor ({' or '.join(PROCESSOR_FILES)}); copy the model's into it")
    check_picture_limits(folder, min_pixels=data.min_pixels, max_pixels=data.max_pixels)


def check_memory(config: AnyConfig, report: Report) -> None:
    """What the actor's GPUs have to hold. Comes after devices, model and data, and asks only where the first two have no findings."""
    hf_config, plan = report.hf_config, report.colocation or ColocationPlan()
    if hf_config is None or report.num_ranks is None or any(about in ("devices", "model") for about, _ in report.findings):
        return
    topology = actor_topology(config.actor.model, report.dp_size)
    seen: dict[str, Any] = {"pictures": report.picture_sizes, "shared": report.shares_gpus}
    seen |= {"on_gpus": report.on_gpus, "device": report.gpu_bytes}
    report.memory = report.take("memory", lambda: predict_memory(config, hf_config, topology, plan, **seen))
    if report.memory is not None:
        report.plan.append(("memory", shown(report.memory)))
        misfits = list(misfits_of_memory(config, report.memory))
        for text in misfits:
            report.found("memory", text)
        if report.memory.is_close and not misfits:
            report.notes.append(f"the actor may not fit on its GPUs: {shown(report.memory)}, and the prediction may be a tenth off")
        if report.gpu_bytes is not None and not report.picture_sizes and model_of(hf_config).vision is not None:
            report.notes.append("the predicted memory is without activations of pictures: no training row that has some was looked at")


_INITIAL = "actor.megatron.ckpt_convertor.hf_model_path"


def check_weights(config: AnyConfig, report: Report) -> None:
    """The headers of the weight files that a run starts from; no tensor is read."""
    actor = config.actor
    folder = Path(str(actor.megatron.ckpt_convertor.hf_model_path))
    reads_weights = actor.megatron.use_hf_ckpt and actor.megatron.convert_from_hf
    if not reads_weights or will_be_made(config, folder):
        return
    if not actor.megatron.mbridge:
        converted = Path(str(actor.megatron.ckpt_convertor.save_path)).absolute()
        report.take("results", check_writable, converted, "actor.megatron.ckpt_convertor.save_path")
    is_models = folder.absolute() == Path(config.model_path).absolute()
    hf_config = report.take("model", read_hf_config, folder, config.model_key if is_models else _INITIAL)
    if hf_config is None:
        return
    stored = report.take("weights", read_checkpoint, folder)
    model = None if check_config(hf_config) else model_of(hf_config)
    if not is_models and model is not None and report.hf_config is not None:
        report.take("weights", check_same_model, folder, hf_config, Path(config.model_path), report.hf_config)
    _check_adapter(config, model, report)
    if stored is None or model is None:
        return
    # Whether a tied model's head is a copy of its embedding is known when it is read.
    shapes = {name: tensor.spec.shape for name, tensor in stored.items() if not (model.tied and name == "lm_head.weight")}
    note = further_layers_note(hf_config, sum(model.is_kept(name) for name in stored), folder)
    report.notes += [] if note is None else [note]
    for text in misfits(model, shapes):
        report.found("weights", f"{folder} does not fit {model.architecture}: {text}")


def _check_adapter(config: AnyConfig, model: Model | None, report: Report) -> None:
    """The folder of adapters that a run begins with: what they compute, and for a model whether all of them are there and no others."""
    spec, folder = config.actor.lora_spec, config.actor.lora.adapter_path
    if spec is None or folder is None:
        return
    findings = len(report.findings)
    report.take("weights", check_adapter_folder, folder, spec)
    if model is not None and len(report.findings) == findings and not check_adapters(model, spec):
        report.take("weights", placed_adapter, model, adapters_of(model, spec), Path(folder))
        warning = other_base(base_of_adapter(folder), Path(config.model_path))
        report.notes += [] if warning is None else [warning]


def check_tokenizer(config: AnyConfig, report: Report) -> None:
    """The tokenizer's files, its size beside the model's, end-of-sequence ids and the chat template."""
    folder, model = Path(str(config.actor.tokenizer.tokenizer_model)), Path(config.model_path)
    given = None if config.seeded_model is None else config.seeded_model.tokenizer
    if given is not None:
        report.take("tokenizer", lambda: check_tokenizer_files(Path(given), trust_remote_code=False))
    if will_be_made(config, folder):
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


def check_reward(config: RunConfig, report: Report) -> None:
    """The file of a reward function."""
    report.take("reward", check_reward_function, config.reward.reward_type)
    if not config.algorithm.sampling_params.do_sample:
        report.notes.append(
            "algorithm.sampling_params.do_sample=False: all responses to a prompt are the same one, and so are their rewards, from which "
            "nothing is learned then"
        )


def check_loggers(config: AnyConfig, report: Report) -> None:
    """Loggers that are named and not installed, and the port for Prometheus."""
    for name in config.runner.logger.logger_backends:
        report.take("loggers", find_logger, name)
    if (port := config.runner.logger.prometheus_port) > 0:
        report.take("loggers", check_exporter, config.runner.logger.prometheus_host, port)


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
    if report.num_ranks is not None and (note := note_on_ranks(beginning, report.num_ranks)) is not None:
        report.plan.append(("resume", note))
    for place, key in places_of_results(config).items():
        report.take("results", check_writable, place, key)
    for key in ("arithmetic", "pictures", "seeded_model"):
        made = getattr(config, key)
        if made is not None and not Path(made.path).exists():
            report.take("results", check_writable, Path(made.path).absolute(), f"{key}.path")
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
    check_weights,
    check_tokenizer,
    check_data,
    check_memory,
    check_reward,
    check_loggers,
    check_beginning,
)
SFT_CHECKS: tuple[Check, ...] = (
    check_devices, check_model, check_weights, check_tokenizer, check_sft_data, check_memory, check_loggers, check_beginning,
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
