"""What the ranks of ``test_checkpoint`` do; each function runs on every rank."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from safetensors.torch import load_file

from rlsync import AutoBridge
from rlsync.bridge import checkpoint as checkpoints
from rlsync.bridge import checkpoint_folder
from rlsync.copy import writes
from rlsync.copy.writes import HostMemory
from rlsync.errors import CheckpointError, RlsyncError
from rlsync.layout.topology import Topology
from rlsync.megatron import optimizer_state
from rlsync.megatron.model import DdpOptions, gather_parameters, iter_parameters, iter_weights
from rlsync.megatron.optimizer import OptimizerOptions, SchedulerOptions, build_optimizer, build_scheduler
from rlsync.megatron.optimizer_state import distributed_parts, parameter_ranges
from rlsync.megatron.parallel import destroy_parallel, initialize_parallel
from rlsync.megatron.train import train_step
from rlsync.models.memory import TrainingOptions, training_memory
from tests.vision_models import VISION_START


class Trainer:
    """A tiny training run: tokens and losses depend on the step and the random state alone."""

    def __init__(
        self,
        folder: str,
        topology: dict[str, int],
        *,
        fp16: bool = False,
        ddp: Mapping[str, Any] = MappingProxyType({"use_distributed_optimizer": True}),
        optimizer: OptimizerOptions = OptimizerOptions(lr=1e-2),  # noqa: B008
        scheduler: SchedulerOptions = SchedulerOptions(max_lr=1e-2),  # noqa: B008
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.topology = Topology(**topology)
        if parallel_state.model_parallel_is_initialized():
            destroy_parallel(keep_distributed=True)
        initialize_parallel(self.topology, seed=3, timeout_s=300)
        self.bridge = AutoBridge.from_pretrained(folder)
        self.models = self.bridge.get_model(
            folder, topology=self.topology, bf16=False, fp16=fp16, ddp=DdpOptions(**ddp), overrides=overrides
        )
        self.optimizer = build_optimizer(self.models, optimizer)
        self.scheduler = build_scheduler(self.optimizer, scheduler)
        self.step = 0

    def train(self) -> float:
        # Drawn from the global generator, so that a random state that is not restored shows.
        tokens = torch.randint(0, VISION_START if "vision_config" in self.bridge.hf_config else 131, (2, 12))
        self.step += 1
        loss = lambda scores, microbatch: (-scores.log_probs[:, 1:].mean() / self.topology.dp_size, {})  # noqa: E731
        return train_step(self.models, self.optimizer, [{"tokens": tokens}], loss, scheduler=self.scheduler).metrics["loss"]

    def save(self, root: str) -> None:
        staged = self.staged(root)
        checkpoints.save_checkpoint(staged / "actor", self.bridge, self.models, **self.state())
        self.publish(staged)

    def staged(self, root: str) -> Path:
        if dist.get_rank() == 0:
            checkpoint_folder.stage_checkpoint(root, self.step)
        dist.barrier()
        return Path(root) / f".global_step_{self.step}.partial"

    def publish(self, staged: Path) -> None:
        if dist.get_rank() == 0:
            checkpoint_folder.publish_checkpoint(staged)
        dist.barrier()

    def begin_save(self, root: str) -> tuple[Path, checkpoints.DeferredSave]:
        staged, memory = self.staged(root), HostMemory()
        return staged, checkpoints.begin_checkpoint(staged / "actor", self.bridge, self.models, memory=memory, **self.state())

    def assert_a_save_finds_its_memory(self, root: str) -> None:
        """A deferred save writes into ``root`` what was taken ahead, but for counters and random states."""
        memory = HostMemory()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writes, "_PIECE_BYTES", 2**13)
            checkpoints.prepare_saves(self.bridge, self.models, memory, saves_optimizer=True)
            ahead = torch.tensor(len(memory._pieces) * writes._PIECE_BYTES)
            saving = checkpoints.begin_checkpoint(root, self.bridge, self.models, memory=memory, **self.state())
            written = torch.tensor(saving._writes._size)
            saving.finish()
        # Of the ranks together: tensors as small as these are written by the first rank of a folder alone.
        dist.all_reduce(ahead)
        dist.all_reduce(written)
        assert abs(ahead - written) < 0.02 * written, (int(ahead), int(written))

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def load(self, folder: Path | str, *, random_state: bool = True) -> checkpoint_folder.Restored:
        restored = checkpoints.load_checkpoint(
            Path(folder) / "actor",
            self.bridge,
            self.models,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            random_state=random_state,
        )
        self.step = restored.step
        return restored

    def weights(self) -> list[torch.Tensor]:
        gather_parameters(self.models)
        return [p.detach().clone() for _, _, _, p in iter_parameters(self.models)]


def train_and_save(folder: str, topology: dict[str, int], root: str) -> None:
    """Two steps, save, two more; then back to the saved step and the same two again. A deferred save of the second step, which is not
    written before the fourth, holds what the other holds."""
    trainer = Trainer(folder, topology)
    trainer.train(), trainer.train()
    trainer.save(root)
    may_write, write = threading.Event(), writes.DirectWrites.put
    writes.DirectWrites.put = lambda self, *arguments: may_write.wait() and write(self, *arguments)
    staged, deferred = trainer.begin_save(f"{root}/deferred")
    after = [trainer.train(), trainer.train()]
    assert not deferred.is_written() and not (staged / "actor" / checkpoint_folder.TRACKER).exists()
    may_write.set()
    deferred.finish()
    assert deferred.is_written()
    writes.DirectWrites.put = write
    trainer.publish(staged)
    trainer.assert_a_save_finds_its_memory(f"{root}/ahead")
    restored = trainer.load(checkpoint_folder.latest_checkpoint(root))
    assert restored == checkpoint_folder.Restored(2, complete=True)
    assert [trainer.train(), trainer.train()] == after, "the steps after a resume differ"
    here = torch.get_rng_state()
    trainer.load(checkpoint_folder.latest_checkpoint(root), random_state=False)
    assert torch.equal(torch.get_rng_state(), here), "a random state that was not asked for"
    print("SAID " + json.dumps(after), flush=True)


def resume(folder: str, topology: dict[str, int], root: str) -> None:
    """Fresh processes: resume the newest checkpoint and take two steps."""
    trainer = Trainer(folder, topology)
    assert trainer.load(checkpoint_folder.latest_checkpoint(root)).complete
    print("SAID " + json.dumps([trainer.train(), trainer.train()]), flush=True)


def resume_in_another_order(folder: str, topology: dict[str, int], root: str) -> None:
    """As a release of the model's code that registers queries' norms after keys': moments are those that a run in the saved order gets."""
    expected, orders = {}, []
    for swaps in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if swaps:
                made = SelfAttention.__init__

                def reordered(self: SelfAttention, *arguments: Any, made: Any = made, **options: Any) -> None:
                    made(self, *arguments, **options)
                    self._modules["q_layernorm"] = self._modules.pop("q_layernorm")

                patch.setattr(SelfAttention, "__init__", reordered)
            trainer = Trainer(folder, topology)
        trainer.load(checkpoint_folder.latest_checkpoint(root))
        orders.append([name for _, _, name, _ in iter_parameters(trainer.models)])
        found = moments(trainer)
        expected = expected or found
        assert found.keys() == expected.keys()
        different = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not different, different
    print("SAID " + json.dumps("another order" if orders[0] != orders[1] else "the same order"), flush=True)


def resume_with_other_options(folder: str, topology: dict[str, int], root: str, distributed: bool) -> None:
    """A resumed optimizer has its own options and the saved state: its step is the one of the saved optimizer under those options.

    Megatron-Core 0.19 finds the saved state of a group by its rates, as older ones are made to here.
    """
    for module in (import_module("megatron.core.optimizer.optimizer"), optimizer_state):
        module.param_group_identifier_keys = tuple(sorted({"max_lr", "min_lr", *module.param_group_identifier_keys}))
    ddp = {"use_distributed_optimizer": distributed}
    before = OptimizerOptions(lr=1e-2, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01)
    after = OptimizerOptions(lr=1e-4, adam_beta1=0.5, adam_beta2=0.75, adam_eps=1e-3, weight_decay=0.3)
    decay = {"start_weight_decay": 0.01, "end_weight_decay": 0.01}
    trainer = Trainer(folder, topology, ddp=ddp, optimizer=before, scheduler=SchedulerOptions(max_lr=1e-2, lr_decay_iters=10, **decay))
    trainer.train(), trainer.train()
    trainer.save(root)
    trainer.assert_a_save_finds_its_memory(f"{root}/ahead")
    for group in trainer.optimizer.param_groups:
        group.update(betas=(0.5, 0.75), eps=1e-3, weight_decay=0.3 * group["wd_mult"], lr=1e-4 * (1 - 2 / 4))
    trainer.scheduler.step = lambda increment: None
    trainer.train()
    expected = trainer.weights()

    decay = {"start_weight_decay": 0.3, "end_weight_decay": 0.3}
    schedule = SchedulerOptions(max_lr=1e-4, lr_decay_style="linear", lr_decay_iters=4, **decay)
    resumed = Trainer(folder, topology, ddp=ddp, optimizer=after, scheduler=schedule)
    assert resumed.load(checkpoint_folder.latest_checkpoint(root)).complete
    groups = [(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in resumed.optimizer.param_groups if g["wd_mult"]]
    assert groups == [(5e-5, (0.5, 0.75), 1e-3, 0.3)] * len(groups) and groups, groups
    resumed.train()
    assert [g["lr"] for g in resumed.optimizer.param_groups] == [1e-4 * (1 - 3 / 4)] * len(resumed.optimizer.param_groups)
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights(), expected, strict=True)), "the update is not the asked one"


def resume_with_another_loss_scale(folder: str, topology: dict[str, int], root: str, distributed: bool) -> None:
    """fp16: a static scale is the run's own; a dynamic one goes on from a dynamic one, and starts anew after a static one."""
    ddp = {"use_distributed_optimizer": distributed}

    def scale_after(then: float | None, now: float | None) -> float:
        before = OptimizerOptions(lr=1e-3, loss_scale=then, initial_loss_scale=2.0**8)
        saved = Trainer(folder, topology, fp16=True, ddp=ddp, optimizer=before)
        saved.train()
        saved.save(root)
        if distributed:  # else there are no moments where a step was skipped
            saved.assert_a_save_finds_its_memory(f"{root}/ahead")
        resumed = Trainer(folder, topology, fp16=True, ddp=ddp, optimizer=OptimizerOptions(lr=1e-3, loss_scale=now))
        resumed.load(checkpoint_folder.latest_checkpoint(root))
        return resumed.optimizer.get_loss_scale().item()

    assert [scale_after(64.0, 32.0), scale_after(None, 32.0), scale_after(None, None), scale_after(64.0, None)] == [32, 32, 2**8, 2**16]


def resume_with_other_shards(folder: str, topology: dict[str, int], root: str) -> None:
    """The state of a distributed optimizer is cut into other gradient buckets; an optimizer that is not sharded is refused on all ranks."""
    trainer = Trainer(folder, topology)
    trainer.train()
    trainer.save(root)
    trainer.train()
    buckets = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    for ddp, fits in (
        ({"use_distributed_optimizer": False}, False),
        ({**buckets, "bucket_size": 5000}, True),
        ({**buckets, "bucket_size": 1}, True),
        ({"use_distributed_optimizer": True, "grad_reduce_in_fp32": False}, True),
    ):
        resumed = Trainer(folder, topology, ddp=ddp)
        before = resumed.weights()
        try:
            resumed.load(checkpoint_folder.latest_checkpoint(root))
            resumed.train()
        except CheckpointError as error:
            print("SAID " + json.dumps(str(error)), flush=True)
            assert not fits and all(torch.equal(a, b) for a, b in zip(resumed.weights(), before, strict=True))
        else:
            # The gradient's norm is summed in another order.
            assert fits and all(
                torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(resumed.weights(), trainer.weights(), strict=True)
            )


def resume_with_other_buckets(folder: str, topology: dict[str, int], root: str) -> None:
    """Main parameters and moments are those of the saved parameter, by name and bit, however gradients are cut into buckets.

    Two of the cuts leave equally many elements in other places: what only counts them takes one for the other.
    """
    cuts: dict[int, set[str]] = {}
    for saved_size in (46_251, 120_501):
        ddp = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
        trainer = Trainer(folder, topology, ddp={**ddp, "bucket_size": saved_size})
        trainer.train(), trainer.train()
        trainer.save(root)
        expected = moments(trainer)
        for size in (58_501, 83_501, None, 1, 5_000):
            resumed = Trainer(folder, topology, ddp={**ddp, "bucket_size": size})
            (buffer,) = (
                resumed.optimizer.chained_optimizers[0].buffers
                if hasattr(resumed.optimizer, "chained_optimizers")
                else resumed.optimizer.buffers
            )
            cuts.setdefault(buffer.numel_unpadded, set()).add(str(parameter_ranges(resumed.optimizer)))
            resumed.load(checkpoint_folder.latest_checkpoint(root))
            found = moments(resumed)
            assert found.keys() == expected.keys()
            different = [name for name in expected if not torch.equal(found[name], expected[name])]
            assert not different, f"saved with {saved_size}, resumed with {size}: {different}"
    print("SAID " + json.dumps(max(map(len, cuts.values()))), flush=True)


def moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Main parameter and moments of every parameter of the one data-parallel rank, by name."""
    (part,) = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    return {
        f"{name}.{key}": value.detach().clone()
        for _, _, name, parameter in iter_parameters(trainer.models)
        for key, value in part._get_main_param_and_optimizer_states(parameter).items()
    }


def assert_memory_as_predicted(trainer: Trainer, case: Mapping[str, Any]) -> None:
    """The bytes of weights, gradients and optimizer are those on paper, but for what aligns parameters in their buffers."""
    options = TrainingOptions(dtype="float32", micro_batch_tokens=24, chunk_tokens=24, sequence_parallel="overrides" in case)
    stage = trainer.topology.coordinates(dist.get_rank()).pp_rank
    paper = training_memory(trainer.bridge.model, trainer.topology, options)[stage]
    weights = {p.data_ptr(): p.nbytes for _, p in iter_weights(trainer.models)}
    gradients = sum(b.grad_data.nbytes for model in trainer.models for b in (*model.buffers, *model.expert_parallel_buffers))
    parts = distributed_parts(trainer.optimizer)
    state = sum(t.nbytes for part in parts for each in part.optimizer.state.values() for t in each.values() if t.ndim)
    padding = 4 * 128 * trainer.topology.world_size * len(weights)
    for found, expected in ((sum(weights.values()), paper.weights), (gradients, paper.gradients), (state, paper.optimizer)):
        assert abs(found - expected) <= padding and abs(found / expected - 1) < 0.1, (case, found, expected)


def resume_elsewhere(cases: list[dict[str, Any]], root: str) -> None:
    """Two steps, save, a third; the same third step from the checkpoint under another layout; and from there back under the first.

    A case may say ``fp16``, and ``distributed``: whether the optimizers then and now are.
    """
    for number, case in enumerate(cases):
        roots = [str(Path(root, f"{number}-{name}")) for name in ("a", "b", "c")]
        then, now = case.get("distributed", (True, True))
        is_half = case.get("fp16", False)

        def started(topology: dict[str, int], distributed: bool, case: Any = case, is_half: bool = is_half) -> Trainer:
            options = OptimizerOptions(lr=1e-3 if is_half else 1e-2, initial_loss_scale=2.0**8)
            ddp = {"use_distributed_optimizer": distributed}
            return Trainer(case["folder"], topology, overrides=case.get("overrides"), fp16=is_half, ddp=ddp, optimizer=options)

        def third(trainer: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
            # What is drawn does not depend on the layout.
            torch.manual_seed(100 + trainer.step)
            return trainer.train(), {name: t.clone() for name, t in trainer.bridge.export_weights(trainer.models)}

        first = started(case["then"], then)
        for _ in range(2):
            third(first)
        if then and not is_half:
            assert_memory_as_predicted(first, case)
        first.save(roots[0])
        first.assert_a_save_finds_its_memory(str(Path(root, f"{number}-ahead")))
        expected = third(first)
        moved = started(case["now"], now)
        assert moved.load(checkpoint_folder.latest_checkpoint(roots[0])) == checkpoint_folder.Restored(2, complete=True, moved=True)
        moved.save(roots[1])
        found = third(moved)
        assert abs(found[0] - expected[0]) < (1e-2 if is_half else 1e-5), (case, found[0], expected[0])
        far = max((found[1][name].float() - tensor.float()).abs().max().item() for name, tensor in expected[1].items())
        assert far < (2e-3 if is_half else 1e-4), (case, far)
        back = started(case["then"], then)
        assert back.load(checkpoint_folder.latest_checkpoint(roots[1])).moved
        assert back.optimizer.get_loss_scale().item() == first.optimizer.get_loss_scale().item()
        back.save(roots[2])
        again = third(back)
        assert again[0] == expected[0] and all(torch.equal(again[1][name], tensor) for name, tensor in expected[1].items()), case
        print(f"MOVED {case['then']} {far:.1e}", flush=True)


def resume_weights(folder: str, topology: dict[str, int], actor_parent: str) -> None:
    """Weights that were wiped come back from the HF folder alone, bit for bit; then training goes on."""
    trainer = Trainer(folder, topology)
    for _, _, _, parameter in iter_parameters(trainer.models):
        parameter.data.fill_(float("nan"))
    restored = trainer.load(actor_parent)
    assert restored == checkpoint_folder.Restored(7, complete=False)
    saved = load_file(Path(actor_parent, "actor", "hf_checkpoint", "model.safetensors"))
    exported = dict(trainer.bridge.export_weights(trainer.models))
    assert set(exported) == set(saved) and all(torch.equal(t, saved[name]) for name, t in exported.items())
    print("SAID " + json.dumps(trainer.train()), flush=True)


def resume_truncated(folder: str, topology: dict[str, int], root: str) -> None:
    """A rank's truncated file is an error on every rank, and no rank's weights changed."""
    trainer = Trainer(folder, topology)
    before = [p.clone() for _, _, _, p in iter_parameters(trainer.models)]
    try:
        trainer.load(checkpoint_folder.latest_checkpoint(root))
    except RlsyncError as error:
        print("SAID " + json.dumps(str(error)), flush=True)
    assert all(torch.equal(a, p) for a, (_, _, _, p) in zip(before, iter_parameters(trainer.models), strict=True))


def resume_damaged(folder: str, topology: dict[str, int], roots: dict[str, str]) -> None:
    """Each damaged run is one of our errors on every rank, and no rank's weights changed."""
    trainer = Trainer(folder, topology)
    before = trainer.weights()
    said_by_kind = {}
    for kind, root in roots.items():
        try:
            trainer.load(Path(root) / "global_step_2")
        except RlsyncError as error:
            said_by_kind[kind] = f"{type(error).__name__}: {error}"
        assert all(torch.equal(a, b) for a, b in zip(trainer.weights(), before, strict=True)), kind
    print("SAID " + json.dumps(said_by_kind), flush=True)


def killed_while_saving(folder: str, topology: dict[str, int], root: str, die_at: str) -> None:
    """Save step 1 completely, then die with SIGKILL inside the save of step 2: when files are there, when half of what belongs into them
    is, before the tracker, before the rename, and in the thread of a deferred save."""
    trainer = Trainer(folder, topology)
    trainer.train()
    trainer.save(root)
    trainer.train()
    module = {"publish_checkpoint": checkpoint_folder, "close": writes.DirectWrites}.get(die_at, checkpoints)
    original = getattr(module, die_at)

    def die(*args, **kwargs):
        if die_at == "create_rank_files":
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, die_at, die)
    if die_at == "close":
        trainer.begin_save(root)[1].finish()
    trainer.save(root)
