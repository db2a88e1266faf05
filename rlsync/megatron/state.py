"""Everything one rank needs to continue training where it stopped: model shards, optimizer, schedule, random state.

Owns the content of ``model_optim_rng.pt`` and ``distrib_optim.pt``, keys as in Megatron's ``torch`` checkpoint format, and which rank
writes what of them. Must not know how folders are named, staged or tracked. Files hold tensors and plain containers only, so they load with
``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from rlsync.copy.torch_files import bytes_of, create_torch_file, places_of, tensors_in
from rlsync.copy.writes import Writes, share_of
from rlsync.errors import CheckpointError, first_few
from rlsync.layout.torch_files import read_torch_file
from rlsync.megatron.model import adapters_in, gather_parameters, global_names, is_adapter, iter_parameters, iter_weights, unwrap
from rlsync.megatron.optimizer_state import (
    SavedOrder,
    ShardedParameter,
    check_optimizer_state,
    distributed_optimizer_content,
    distributed_parts,
    first_rank_of,
    load_optimizer_state,
    optimizer_config,
    optimizer_state,
    parameter_names,
    parameter_ranges,
    saved_states,
    sharded_parameters,
    state_of_shard,
    whole_parameter_names,
)
from rlsync.megatron.parallel import current_topology
from rlsync.megatron.rng import check_rng_state, gathered_rng_states, set_rng_state
from rlsync.models.shards import (
    ADAPTERS_SCALING,
    DISTRIBUTED_OPTIMIZER_FILE,
    EXTRA_STATE,
    PADDED_VOCABULARY,
    PLANES,
    RANK_STATE_FILE,
    WHOLE_NAMES,
    both_names,
    chunk_keys,
    weights_only_state,
)

# Of the content of these files: raise it with the keys of ``rank_state``. What was written under another number need not be readable.
STATE_FORMAT = 4

# What torch and Megatron raise of damaged or foreign content.
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
# A smaller tensor is written by the first rank of a folder alone.
_SHARED_BYTES = 2**16


def create_rank_files(folder: Path, state: Mapping[str, Any], optimizer: MegatronOptimizer | None) -> None:
    """Create the files of a rank's folder for what ``rank_state`` returned, without the bytes of tensors. Only one rank of a folder calls
    it: the first of its data-parallel groups. Not collective."""
    create_torch_file(folder / RANK_STATE_FILE, state)
    content = None if optimizer is None else distributed_optimizer_content(optimizer)
    if content is not None:
        create_torch_file(folder / DISTRIBUTED_OPTIMIZER_FILE, content)


def put_rank_state(folder: Path, state: Mapping[str, Any], writes: Writes, *, part: int, parts: int) -> None:
    """Put this rank's part of the tensors in what ``rank_state`` returned, which is equal on the ``parts`` ranks of the folder, into the
    file that ``create_rank_files`` made. Not collective."""
    file, tensors = folder / RANK_STATE_FILE, dict(tensors_in(state))
    places = {where: view.stored(".".join(where)) for where, view in places_of(file).items()}
    shared = [where for where, place in places.items() if place.end - place.begin >= _SHARED_BYTES]
    if part == 0:
        for where in places.keys() - set(shared):
            writes.put(file, places[where].begin, bytes_of(tensors[where]))
    for index, begin, end in share_of([places[where].end - places[where].begin for where in shared], part, parts):
        place, data = places[shared[index]], bytes_of(tensors[shared[index]])
        assert data.numel() == place.end - place.begin, place.spec.name
        writes.put(file, place.begin + begin, data[begin:end])
    writes.close(file)


def put_shards(folder_of: Callable[[int], Path], optimizer: MegatronOptimizer, writes: Writes) -> None:
    """Put what this rank keeps of a distributed optimizer into the files that ``create_rank_files`` made; nothing for other optimizers.
    ``folder_of`` gives the folder of a rank. Not collective."""
    files = [folder_of(first_rank_of(part)) / DISTRIBUTED_OPTIMIZER_FILE for part in distributed_parts(optimizer)]
    contents = {file: read_torch_file(file) for file in dict.fromkeys(files)}
    for shard in sharded_parameters(optimizer):
        file = files[shard.part]
        (places,) = contents[file][shard.part][shard.buffer].values()
        for plane, state in state_of_shard(optimizer, shard).items():
            writes.put(file, places[plane].begin + shard.begin * state.itemsize, bytes_of(state))
    for file in contents:
        writes.close(file)


def bytes_of_state(models: Sequence[torch.nn.Module], *, parts: int, has_optimizer: bool) -> int:
    """About what ``put_rank_state`` and ``put_shards`` will write of this rank, by the sizes of chunks whose optimizer need not exist yet.
    Not collective.

    Args:
        parts: ranks that share the folder of this rank.
        has_optimizer: whether the optimizer will be saved, too: main parameters and moments in float32.
    """
    is_distributed, alone = has_optimizer and models[0].ddp_config.use_distributed_optimizer, adapters_in(models) is not None
    shared = sum(tensor.nbytes for name, tensor in iter_weights(models) if is_adapter(name) or not alone)
    own = 0
    for *_, parameter in iter_parameters(models):
        plane = parameter.numel() * torch.float32.itemsize if has_optimizer and parameter.requires_grad else 0
        if is_distributed:
            own += len(PLANES) * plane // _replicas_of(parameter)
        else:
            # Without one, parameters in float32 are the main ones.
            shared += (len(PLANES) - (parameter.dtype is torch.float32)) * plane
    return shared // parts + own


def _replicas_of(parameter: torch.nn.Parameter) -> int:
    """Ranks that have a parameter's state of a distributed optimizer between them; Megatron marks experts by ``allreduce``."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_world_size()


def read_rank_state(
    folder: Path | str,
    models: Sequence[torch.nn.Module],
    *,
    folder_of: Callable[[int], Path],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    random_state: bool = True,
) -> tuple[dict[str, Any], list[tuple[ShardedParameter, dict[str, Tensor]]]]:
    """Arguments of ``restore_rank_state`` and ``restore_shards``, read and checked. Not collective.

    With them, under the same topology, training continues bit for bit. Of the state of a distributed optimizer only what this rank keeps
    is read, and not before it is restored.

    Args:
        folder_of: the folder of another rank.

    Raises:
        CheckpointError: a file is missing, unreadable or damaged, was written under another topology or by another model, or
            lacks the optimizer or schedule asked for. Nothing has changed then.
    """
    path = Path(folder, RANK_STATE_FILE)
    state = _read(path, dict)
    _check_kinds(state, str(path))
    _check_complete(state, optimizer, scheduler, str(path))
    _check_topology(state["topology"], asdict(current_topology(models)), str(folder))
    _check_options(state, _options(models, optimizer), str(folder))
    for key, model in _keyed(models):
        _check_tensors(dict(_tensors(model)), _section(state, key, str(folder)), str(folder), global_names(model))
    if optimizer is not None:
        _check_is_sharded(Path(folder, DISTRIBUTED_OPTIMIZER_FILE), optimizer)
    try:
        if optimizer is not None:
            check_optimizer_state(optimizer, state["optimizer"])
        if scheduler is not None:
            int(state["opt_param_scheduler"]["num_steps"])
        if random_state:
            check_rng_state(_own_random_state(state))
    except _DAMAGED as error:
        raise _unfit(str(path), error) from error
    if optimizer is None:
        return state, []
    files = {index: folder_of(first_rank_of(part)) / DISTRIBUTED_OPTIMIZER_FILE for index, part in enumerate(distributed_parts(optimizer))}
    contents = {path: _read(path, list, mapped=True) for path in set(files.values())}
    source = ", ".join(map(str, sorted(contents)))
    try:
        by_part = {index: contents[path] for index, path in files.items()}
        # Older checkpoints have no names.
        saved = SavedOrder(_section(state, "parameter_ranges", str(folder)), state.get("parameter_names"))
        return state, saved_states(by_part, saved, optimizer, _names(models), source)
    except _DAMAGED as error:
        raise CheckpointError(f"{source} does not hold what {RANK_STATE_FILE} says ({type(error).__name__}: {error})") from error


def rank_state(
    models: Sequence[torch.nn.Module],
    *,
    step: int,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> dict[str, Any]:
    """Content of ``model_optim_rng.pt``, equal on the DP group. Collective over the DP group.

    Tensors of the model and of a non-distributed optimizer are the live ones, not copies.
    """
    gather_parameters(models)
    topology, chunks = asdict(current_topology(models)), {key: dict(_tensors(model)) for key, model in _keyed(models)}
    state = weights_only_state(topology, step, unwrap(models[0]).vocab_size, chunks)
    state |= {"rng_state": gathered_rng_states(), "options": _options(models, optimizer)}
    if optimizer is not None:
        state["optimizer"] = optimizer_state(optimizer)
        state["parameter_ranges"] = parameter_ranges(optimizer)
        state["parameter_names"] = parameter_names(optimizer, _names(models))
        state[WHOLE_NAMES] = whole_parameter_names(optimizer, _names(models))
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    return state


def restore_rank_state(
    state: Mapping[str, Any],
    models: Sequence[torch.nn.Module],
    *,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    random_state: bool = True,
    source: str = "the state given",
) -> int:
    """Put back what ``rank_state`` returned; returns its step. Not collective.

    Options of optimizer and schedule stay those they were built with. Without ``random_state`` the generators stay as they are.
    A distributed optimizer is complete only after ``restore_shards``.

    Raises:
        CheckpointError: as ``read_rank_state``; ``source`` names the state in its messages.
    """
    _check_kinds(state, source)
    _check_complete(state, optimizer, scheduler, source)
    _check_topology(state["topology"], asdict(current_topology(models)), source)
    _restore_tensors(state, models, source)
    try:
        if optimizer is not None:
            load_optimizer_state(optimizer, state["optimizer"])
        if scheduler is not None:
            # Only how far it is: what it makes of the steps is the run's own. Megatron would take the saved shape over.
            scheduler.num_steps = int(state["opt_param_scheduler"]["num_steps"])
            scheduler.step(0)
        if random_state:
            set_rng_state(_own_random_state(state))
    except _DAMAGED as error:
        raise _unfit(source, error) from error
    return int(state["iteration"])


def _names(models: Sequence[torch.nn.Module]) -> dict[int, str]:
    """Global names of parameters, by ``id``."""
    return {id(parameter): name for _, _, name, parameter in iter_parameters(models)}


def _own_random_state(state: Mapping[str, Any]) -> Any:
    return state["rng_state"][parallel_state.get_data_parallel_rank(with_context_parallel=True)]


def _unfit(source: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{source}: its optimizer, schedule or random state is damaged or of another kind ({type(error).__name__}: {error}); "
        "load its weights alone"
    )


def _options(models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    """Options that decide the form of the saved state and that neither names nor sizes of parallel axes tell."""
    # Padded by make_vocab_size_divisible_by; the model's own count is not known here.
    adapters = adapters_in(models)
    # What factors are multiplied by, which their shapes do not tell.
    options: dict[str, Any] = {
        PADDED_VOCABULARY: unwrap(models[0]).vocab_size,
        ADAPTERS_SCALING: None if adapters is None else adapters.spec.scaling,
    }
    if optimizer is not None:
        config = optimizer_config(optimizer)
        options |= {name: getattr(config, name) for name in ("optimizer_cpu_offload", "use_precision_aware_optimizer")}
    return options


def _keyed(models: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """Chunks under the keys Megatron gives them."""
    return list(zip(chunk_keys(len(models)), models, strict=True))


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint keeps, by local name: adapters alone of a model that has some, whose base no step changes; else parameters and
    persistent buffers, without TransformerEngine's ``_extra_state``."""
    has_adapters = adapters_in([model]) is not None
    for name, value in unwrap(model).state_dict().items():
        if is_adapter(name) if has_adapters else not name.endswith(EXTRA_STATE):
            yield name, value.detach()


def _restore_tensors(state: Mapping[str, Any], models: Sequence[torch.nn.Module], source: str) -> None:
    chunks = [(dict(_tensors(model)), _section(state, key, source)) for key, model in _keyed(models)]
    for (live, stored), model in zip(chunks, models, strict=True):
        _check_tensors(live, stored, source, global_names(model))
    with torch.no_grad():
        for live, stored in chunks:
            for name, tensor in live.items():
                tensor.copy_(stored[name])


def _read(path: Path, kind: type, *, mapped: bool = False) -> Any:
    """Content of a file. With ``mapped`` its tensors are the file's memory, read when they are looked at."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError:
        # torch's message advises to run what is in the file.
        raise CheckpointError(
            f"{path} cannot be read: it is damaged, or another trainer wrote it with objects beside tensors and numbers; "
            "resume from a folder of rlsync, or start a new run from Hugging Face weights"
        ) from None
    except _DAMAGED as error:
        raise CheckpointError(f"{path} cannot be read, it may be truncated: {type(error).__name__}: {error}") from error
    if not isinstance(content, kind):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a {kind.__name__}; rlsync did not write it")
    return content


def _section(state: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in state:
        raise CheckpointError(f"{source} holds no {key!r}, only {', '.join(sorted(state))}")
    return state[key]


def _check_kinds(state: Mapping[str, Any], source: str) -> None:
    """Sections that every checkpoint has."""
    if "options" not in state and "topology" in state:
        raise CheckpointError(
            f"{source} holds no 'options': an earlier build of rlsync wrote it; start a new run from the Hugging Face weights beside it, "
            "actor/hf_model"
        )
    for key, kind in (("iteration", int), ("topology", dict), ("options", dict), ("rng_state", list)):
        if not isinstance(_section(state, key, source), kind):
            raise CheckpointError(f"{source} holds {key!r} as a {type(state[key]).__name__}, expected a {kind.__name__}")


def _check_complete(
    state: Mapping[str, Any], optimizer: MegatronOptimizer | None, scheduler: OptimizerParamScheduler | None, source: str
) -> None:
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    if len(state["rng_state"]) != ranks:
        raise CheckpointError(f"{source} holds the random states of {len(state['rng_state'])} data-parallel ranks, {ranks} are running")
    wanted = {"optimizer": optimizer, "opt_param_scheduler": scheduler}
    absent = [key for key, part in wanted.items() if part is not None and key not in state]
    if absent:
        raise CheckpointError(f"{source} was saved without {' and '.join(absent)}; load its weights alone (actor.megatron.no_load_optim)")


def _check_is_sharded(path: Path, optimizer: MegatronOptimizer) -> None:
    if path.is_file() != bool(distributed_parts(optimizer)):
        then, now = ("a", "none") if path.is_file() else ("no", "one")
        raise CheckpointError(
            f"{path} {'is there' if path.is_file() else 'is missing'}: the run that wrote this folder used {then} distributed optimizer, "
            f"this one uses {now}; resume with the saved use_distributed_optimizer"
        )


def _check_topology(stored: Mapping[str, Any], running: Mapping[str, Any], source: str) -> None:
    different = [f"{name} {stored.get(name)} then, {value} now" for name, value in running.items() if stored.get(name) != value]
    if different:
        raise CheckpointError(f"{source} was written under another topology: {'; '.join(different)}")


def _check_options(state: Mapping[str, Any], running: Mapping[str, Any], source: str) -> None:
    stored = _section(state, "options", source)
    different = [f"{name} {stored[name]} then, {value} now" for name, value in running.items() if stored.get(name, value) != value]
    if different:
        keys = "make_vocab_size_divisible_by" if stored.get(PADDED_VOCABULARY) != running[PADDED_VOCABULARY] else "values"
        raise CheckpointError(f"{source}: {'; '.join(different)}; resume with the saved {keys}")


def _check_tensors(live: Mapping[str, Tensor], stored: Mapping[str, Tensor], source: str, global_name: Callable[[str], str]) -> None:
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise CheckpointError(f"{source} holds something else than tensors by name as its model; rlsync did not write it")
    called = {name: both_names(global_name(name), name) for name in live}
    findings = [f"{called[name]} is missing" for name in live if name not in stored]
    findings += [f"{name} is unexpected" for name in stored if name not in live]
    findings += [
        f"{called[name]}: expected {tuple(tensor.shape)} {tensor.dtype}, got {tuple(stored[name].shape)} {stored[name].dtype}"
        for name, tensor in live.items()
        if name in stored and (stored[name].shape != tensor.shape or stored[name].dtype != tensor.dtype)
    ]
    if findings:
        raise CheckpointError(f"{source} does not hold this model: {first_few(findings, separator='; ')}")
