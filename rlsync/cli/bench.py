"""``rlsync bench``: how long a sync takes on this machine, beside what the links allow and what others do, in one run; with ``--train``
how fast the actor trains, beside a plain matrix product."""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rlsync.bench import run as bench
from rlsync.bench import spec as specs
from rlsync.bench import training, work
from rlsync.bridge.model_folder import TRAVELS, travelling_files
from rlsync.cli.scene import AXES, ENGINES, sizes
from rlsync.cli.shapes import SHAPES, shape_of
from rlsync.engine.handles.adapters import MAX_LORA_RANKS, least_max_lora_rank
from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.models import model_of
from rlsync.models.stacks import Model
from rlsync.sync.config import LORA

# Of an engine whose data-parallel ranks are processes of their own there is no measurement.
_ENGINES = {name: field for name, field in ENGINES.items() if name != "dp"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help=f"{', '.join(SHAPES)}, or a config.json, or the folder that holds it, with its processor where the model takes pictures; "
        "weights are random, nothing is downloaded",
    )
    add("--actor", default="tp=1", help="sizes of the actor's axes, as tp=2,pp=1; also vpp, cp, dp, ep, etp")
    add("--rollout", default="tp=1", help="the engines, as tp=2,engines=2; ep=tp for expert parallelism")
    add("--placement", choices=specs.PLACEMENTS, default="collocated", help="engines on the actor's GPUs, or on the ones after them")
    add("--transport", help="weight_sync.transport; this and the next four may be lists, as direct,loaders: every combination is run")
    add("--sink", help="weight_sync.sink")
    add(
        "--mode",
        help="params: straight from the actor's parameters where that can be; ring: always through staging buckets; "
        "moved: as params, with the weights away between syncs",
    )
    add("--bucket-bytes", help="weight_sync.bucket_bytes")
    add("--num-slots", help="weight_sync.num_slots")
    add("--verify", help="weight_sync.verify")
    add("--lora", type=int, default=0, metavar="R", help="the actor has adapters of this rank on all linear layers")
    add("--lora-sync", help="weight_sync.lora, with --lora; merged,adapter by default, each on engines of its own")
    add("--peers", help=f"of {', '.join(specs.PEERS)}; none; default: all that can be on this placement and device")
    add("--steps", type=int, default=10, help="measured steps of each case")
    add("--warmup", type=int, default=3, help="steps before them")
    add(
        "--layers",
        choices=("auto", "local", "te"),
        default="auto",
        help="of the actor: Megatron-Core's local ones, TransformerEngine's, or auto: TransformerEngine's where it is installed",
    )
    add("--cuda-graphs", action="store_true", help="let the engines compile and capture, which takes a minute more to start")
    add("--timeout-s", type=float, default=120.0, help="weight_sync.timeout_s, and of each call of an engine")
    add("--deadline-s", type=float, default=1200.0, help="of the whole bench; then all processes are killed")
    add("--out", type=Path, default=Path("rlsync-bench"), help="folder for bench.json, bench.png and logs/")
    train = parser.add_argument_group("training", "with --train no engine is started, and of the above count only --model, --actor, "
                                      "--lora, --steps, --warmup, --layers, --deadline-s and --out")  # fmt: skip
    add = train.add_argument
    add("--train", action="store_true", help="optimizer steps and scoring passes of the actor instead of syncs")
    add("--sequence-length", type=int, default=4096, help="tokens of the longest sequence")
    add("--sequences", type=int, default=8, help="of a step, on each data-parallel replica")
    add("--lengths", default="equal", help="of the sequences: equal; spread, over two powers of ten; or numbers with commas, repeated")
    add("--micro-batch-tokens", type=int, help="most positions of a microbatch, padding counted; default: --sequence-length")
    add("--score-micro-batch-tokens", type=int, help="the same of scoring passes; default: that of steps")
    add("--packing", action="store_true", help="runner.packing: sequences one after the other instead of padded")
    add("--chunk-tokens", type=int, help="actor.model.logits_chunk_tokens")
    add("--profile", action="store_true", help="say of one more step and pass what the GPU of rank 0 does in it, by kinds of kernels")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of Megatron's TransformerConfig, DistributedDataParallelConfig or OptimizerConfig that actor.model or actor.optim "
        "has, as sequence_parallel=True; may be given often",
    )
    add("--peak-tflops", type=float, help="dense bf16 rate of a GPU that is not known here, in 10^12 operations a second")


def run(arguments: argparse.Namespace) -> int:
    """Run the bench and print its tables; 1 where a process or a case failed, or a case left other weights than the rest.

    Raises ConfigError or PlacementError before anything starts.
    """
    _check_kind(arguments)
    if not 0 < arguments.deadline_s < math.inf:
        raise ConfigError(f"--deadline-s is {arguments.deadline_s:g}; it must be more than 0 seconds")
    deadline_s = time.monotonic() + arguments.deadline_s
    with tempfile.TemporaryDirectory(prefix="rlsync-bench-") as name:
        if arguments.train:
            planned = plan_training(arguments, Path(name))
            _make_out(arguments.out)
            return 0 if bench.measure_training(planned, arguments.out, deadline_s, arguments.peak_tflops) else 1
        spec = plan(arguments, Path(name))
        _make_out(arguments.out)
        return 0 if bench.measure(spec, arguments.out, deadline_s) else 1


def _make_out(out: Path) -> None:
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # results are written when all is measured
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); name another folder") from None


def plan(arguments: argparse.Namespace, folder: Path) -> specs.Spec:
    """All that the bench will do, and config.json in ``folder``. Raises ConfigError or PlacementError for what cannot be."""
    _check_counts(arguments, "steps", "warmup")
    lora_sync = _check_lora(arguments)
    config = {**shape_of(arguments.model), "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    axes = sizes(arguments.actor, AXES, "--actor")
    engines = {"tp_size": 1, "ep_size": 1, "num_engines": 1, **sizes(arguments.rollout, _ENGINES, "--rollout")}
    devices = _devices()
    common = {"timeout_s": arguments.timeout_s, "verify": arguments.verify}
    num_actors = Topology(**axes).world_size
    actor_gpus, engine_gpus = specs.devices_of(arguments.placement, num_actors, engines["num_engines"], engines["tp_size"], devices)
    spec = specs.Spec(
        model=arguments.model,
        config=config,
        axes=axes,
        num_engines=engines["num_engines"],
        engine_tp=engines["tp_size"],
        engine_ep=engines["ep_size"],
        placement=arguments.placement,
        cases=specs.cases(
            {**{option: getattr(arguments, option.replace("-", "_")) for option in specs.LISTS}, "lora-sync": lora_sync},
            {key: value for key, value in common.items() if value is not None},
        ),
        peers=specs.peers(
            arguments.peers,
            specs.scene(arguments.placement, devices, actor_gpus, engine_gpus),
            lora="adapter" if arguments.lora else "merged",
        ),
        lora_r=arguments.lora,
        steps=arguments.steps,
        warmup=arguments.warmup,
        timeout_s=arguments.timeout_s,
        start_s=arguments.deadline_s,
        folder=str(folder),
        actor_gpus=actor_gpus,
        engine_gpus=engine_gpus,
        devices=devices,
        cuda_graphs=arguments.cuda_graphs,
        layers=specs.layers_of(arguments.layers, devices),
        token=secrets.token_hex(16),
    )
    # Both sides on paper: what does not fit is said before anything starts.
    work.lay_out(spec)
    if model_of(config).vision is not None:
        _bring_processor(Path(arguments.model), folder)
    (folder / "config.json").write_text(json.dumps(config))
    return spec


def _bring_processor(source: Path, folder: Path) -> None:
    """Copy what the engine of a model that takes pictures reads beside config.json. Raises ConfigError where it is not there."""
    found = travelling_files(source, but=folder) if source.is_dir() else ()
    for kind in ("tokenizer", "processor"):
        if not any(fnmatchcase(path.name, pattern) for path in found for pattern in TRAVELS[kind]):
            raise ConfigError(
                f"--model {source} takes pictures, and its engine reads a {kind}, which is not there; give the folder of the model, "
                f"which holds {' or '.join(TRAVELS[kind][:2])}"
            )
    for path in found:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)


def _check_lora(arguments: argparse.Namespace) -> str | None:
    """What --lora-sync is, with its default. Raises ConfigError where there are no adapters, or engines do not hold such ones."""
    if arguments.lora < 0 or (arguments.lora and least_max_lora_rank(arguments.lora) is None):
        raise ConfigError(f"--lora is {arguments.lora}; give a rank up to {MAX_LORA_RANKS[-1]}, the most that engines hold, or 0 for none")
    if arguments.lora:
        return ",".join(LORA) if arguments.lora_sync is None else arguments.lora_sync
    if arguments.lora_sync is not None:
        raise ConfigError(f"--lora-sync {arguments.lora_sync} without --lora, the rank of the actor's adapters; give it")
    return None


# Fields that --set gives to another part than TransformerConfig.
_OF_DDP = ("use_distributed_optimizer", "grad_reduce_in_fp32", "overlap_grad_reduce", "overlap_param_gather", "bucket_size")
_OF_OPTIMIZER = ("optimizer_cpu_offload", "optimizer_offload_fraction", "use_precision_aware_optimizer", "log_num_zeros_in_grad")


def plan_training(arguments: argparse.Namespace, folder: Path) -> training.TrainSpec:
    """All that a bench of training will do. Raises ConfigError for what cannot be, before anything starts."""
    _check_counts(
        arguments, "steps", "warmup", "sequences", "sequence-length", "micro-batch-tokens", "score-micro-batch-tokens", "chunk-tokens"
    )
    _check_lora(arguments)
    axes = sizes(arguments.actor, AXES, "--actor")
    config = {**shape_of(arguments.model), "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    topology, devices = Topology(**axes), _devices()
    if devices and topology.world_size > len(devices):
        raise ConfigError(f"--actor {arguments.actor} needs {topology.world_size} GPUs, and {len(devices)} are visible; make it smaller")
    if arguments.profile and not devices:
        raise ConfigError("--profile says what a GPU does, and no GPU is visible; leave it out")
    if arguments.sequence_length < 2:
        raise ConfigError(f"--sequence-length is {arguments.sequence_length}; a sequence of less than 2 tokens has none to learn")
    if arguments.peak_tflops is not None and not 0 < arguments.peak_tflops < math.inf:
        raise ConfigError(f"--peak-tflops is {arguments.peak_tflops:g}; it must be more than 0")
    model, given = model_of(config, topology), _settings(arguments.set)
    if model.vision is not None:
        raise ConfigError(f"--train has sequences of text, and {model.architecture} takes pictures; take the model of its language part")
    if misfits := [*_misfits_of_types(config, given)]:
        raise ConfigError("; ".join(misfits))
    ddp = {"use_distributed_optimizer": True, **{name: given.pop(name) for name in _OF_DDP if name in given}}
    optimizer = {"lr": 1e-5, **{name: given.pop(name) for name in _OF_OPTIMIZER if name in given}}
    layers = specs.layers_of(arguments.layers, devices)
    if misfits := [*_misfits_of_switches({**given, **ddp, **optimizer}, model, topology, has_gpus=bool(devices))]:
        raise ConfigError("; ".join(misfits))
    if given:
        # The imports take seconds.
        import torch

        from rlsync.megatron.config import model_config
        from rlsync.megatron.packing import packing_refusal

        built = model_config(config, topology=topology, dtype=torch.bfloat16, overrides=given, is_transformer_engine=layers == "te")
        if arguments.packing and (refusal := packing_refusal(built.transformer)) is not None:
            raise ConfigError(f"--packing: {refusal}")
    longest = arguments.sequence_length
    budget = longest if arguments.micro_batch_tokens is None else arguments.micro_batch_tokens
    scored = budget if arguments.score_micro_batch_tokens is None else arguments.score_micro_batch_tokens
    lengths = training.lengths_of(arguments.lengths, longest, arguments.sequences)
    return training.TrainSpec(
        model=arguments.model,
        config=config,
        axes=axes,
        layers=layers,
        # Else stages would pad every microbatch to the longest.
        switches={"variable_seq_lengths": topology.pp_size > 1, **given},
        ddp=ddp,
        optimizer=optimizer,
        microbatches=training.cut(lengths, budget, packing=arguments.packing),
        score_microbatches=training.cut(lengths, scored, packing=arguments.packing, option="--score-micro-batch-tokens"),
        packing=arguments.packing,
        lora_r=arguments.lora,
        chunk_tokens=arguments.chunk_tokens,
        profile=arguments.profile,
        steps=arguments.steps,
        warmup=arguments.warmup,
        start_s=arguments.deadline_s,
        folder=str(folder),
        devices=devices[: topology.world_size],
    )


def _misfits_of_types(config: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """Values that are no truth values or numbers where a field is one: as a word, ``false`` would switch on."""
    if not given:
        return
    # The imports take seconds.
    import torch

    from rlsync.megatron.config import model_config
    from rlsync.megatron.model import DdpOptions
    from rlsync.megatron.optimizer import OptimizerOptions

    transformer = model_config(config, topology=Topology(), dtype=torch.bfloat16).transformer
    types: dict[str, Any] = {}
    for owner in (type(transformer), OptimizerOptions, DdpOptions):
        types |= get_type_hints(owner)
    for name, value in given.items():
        kind = types.get(name)
        kinds = set(get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind])
        if kinds <= {bool, int, float, NoneType} and not (type(value) in kinds or (float in kinds and type(value) is int)):
            yield f"--set {name}={value}: write {'True or False' if bool in kinds else 'a number'}, as Python has it"


def _misfits_of_switches(given: Mapping[str, Any], model: Model, topology: Topology, *, has_gpus: bool) -> Iterator[str]:
    """What ranks would find out of switches when they build model and optimizer, or in their first pass."""
    if "num_experts" in model.dims and topology.tp_size > 1 and not given.get("sequence_parallel"):
        yield (
            f"{model.architecture} has experts, which Megatron trains under tp={topology.tp_size} on parts of the sequence only; give "
            "--set sequence_parallel=True"
        )
    if given.get("overlap_param_gather") and not (given["use_distributed_optimizer"] and given.get("overlap_grad_reduce")):
        yield "--set overlap_param_gather=True needs use_distributed_optimizer and overlap_grad_reduce True"
    if given.get("use_precision_aware_optimizer") and not given["use_distributed_optimizer"]:
        yield "--set use_precision_aware_optimizer=True needs use_distributed_optimizer True"
    if given.get("optimizer_cpu_offload") and not has_gpus:
        yield "--set optimizer_cpu_offload=True moves the optimizer's state from GPUs to the host, and no GPU is visible; leave it out"
    if given.get("use_precision_aware_optimizer") and not (has_gpus and find_spec("transformer_engine")):
        yield "--set use_precision_aware_optimizer=True needs a GPU and TransformerEngine, and one of them is not here; leave it out"
    if "optimizer_offload_fraction" in given and not given.get("optimizer_cpu_offload"):
        yield "--set optimizer_offload_fraction is of optimizer_cpu_offload, which is off; give --set optimizer_cpu_offload=True too"


# What only a bench of syncs reads, and what only one of training does.
_OF_SYNCS = (
    "rollout",
    "placement",
    "transport",
    "sink",
    "mode",
    "bucket_bytes",
    "num_slots",
    "verify",
    "lora_sync",
    "peers",
    "cuda_graphs",
    "timeout_s",
)
_OF_TRAINING = (
    "sequence_length",
    "sequences",
    "lengths",
    "micro_batch_tokens",
    "score_micro_batch_tokens",
    "packing",
    "chunk_tokens",
    "profile",
    "set",
    "peak_tflops",
)


def _check_kind(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for options of the other kind of bench."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    others = _OF_SYNCS if arguments.train else _OF_TRAINING
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name) != parser.get_default(name)]
    if given:
        kind = "syncs, and --train starts no engine" if arguments.train else "training; give --train too"
        raise ConfigError(f"{', '.join(given)} belong to a bench of {kind}")


def _settings(words: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` of --set; a value is a Python literal, or else a word."""
    found: dict[str, Any] = {}
    for word in words:
        name, has_value, value = word.partition("=")
        if not has_value or not name or name in found:
            raise ConfigError(f"--set {word!r}: write NAME=VALUE, each name once")
        try:
            found[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[name] = value
    return found


def _check_counts(arguments: argparse.Namespace, *options: str) -> None:
    for option in options:
        given = getattr(arguments, option.replace("-", "_"))
        if given is not None and given < 1:
            raise ConfigError(f"--{option} is {given}; it must be at least 1")


def _devices() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES may name, in torch's order; none on CPU. Makes no context."""
    import torch

    count = torch.cuda.device_count()
    named = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return tuple(named[:count]) if named else tuple(map(str, range(count)))
