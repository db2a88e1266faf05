"""What the ranks of ``test_checkpoint`` do; each function runs on every rank."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rlsync import AutoBridge
from rlsync import checkpoint as checkpoints
from rlsync.errors import CheckpointError, RlsyncError
from rlsync.layout.topology import Topology
from rlsync.megatron.model import DdpOptions, iter_parameters
from rlsync.megatron.optimizer import OptimizerOptions, SchedulerOptions, build_optimizer, build_scheduler
from rlsync.megatron.parallel import initialize_parallel
from rlsync.megatron.train import train_step


class Trainer:
    """A tiny training run: tokens and losses depend on the step and the random state alone."""

    def __init__(self, folder: str, topology: dict[str, int]) -> None:
        self.topology = Topology(**topology)
        initialize_parallel(self.topology, seed=3, timeout_s=60)
        self.bridge = AutoBridge.from_pretrained(folder)
        ddp = DdpOptions(use_distributed_optimizer=True)
        self.models = self.bridge.get_model(folder, topology=self.topology, bf16=False, ddp=ddp)
        self.optimizer = build_optimizer(self.models, OptimizerOptions(lr=1e-2))
        self.scheduler = build_scheduler(self.optimizer, SchedulerOptions(max_lr=1e-2))
        self.step = 0

    def train(self) -> float:
        # Drawn from the global generator, so that a random state that is not restored shows.
        tokens = torch.randint(0, 131, (2, 12))
        self.step += 1
        loss = lambda scores, microbatch: (-scores.log_probs[:, 1:].mean() / self.topology.dp_size, {})  # noqa: E731
        return train_step(self.models, self.optimizer, [{"tokens": tokens}], loss, scheduler=self.scheduler).metrics["loss"]

    def save(self, root: str) -> None:
        staged = Path(root) / f".global_step_{self.step}.partial"
        if dist.get_rank() == 0:
            checkpoints.stage_checkpoint(root, self.step)
        dist.barrier()
        checkpoints.save_checkpoint(
            staged / "actor", self.bridge, self.models, step=self.step, optimizer=self.optimizer, scheduler=self.scheduler
        )
        if dist.get_rank() == 0:
            checkpoints.publish_checkpoint(staged)
        dist.barrier()

    def load(self, folder: Path | str) -> checkpoints.Restored:
        restored = checkpoints.load_checkpoint(
            Path(folder) / "actor", self.bridge, self.models, optimizer=self.optimizer, scheduler=self.scheduler
        )
        self.step = restored.step
        return restored


def train_and_save(folder: str, topology: dict[str, int], root: str) -> None:
    """Two steps, save, two more; then back to the saved step and the same two again."""
    trainer = Trainer(folder, topology)
    trainer.train(), trainer.train()
    trainer.save(root)
    after = [trainer.train(), trainer.train()]
    restored = trainer.load(checkpoints.latest_checkpoint(root))
    assert restored == checkpoints.Restored(2, complete=True)
    assert [trainer.train(), trainer.train()] == after, "the steps after a resume differ"
    print("SAID " + json.dumps(after), flush=True)


def resume(folder: str, topology: dict[str, int], root: str) -> None:
    """Fresh processes: resume the newest checkpoint and take two steps."""
    trainer = Trainer(folder, topology)
    assert trainer.load(checkpoints.latest_checkpoint(root)).complete
    print("SAID " + json.dumps([trainer.train(), trainer.train()]), flush=True)


def resume_refused(folder: str, topology: dict[str, int], root: str) -> None:
    """Another layout: refused by name on every rank, nothing changed; HF weights alone are said to be incomplete."""
    trainer = Trainer(folder, topology)
    before = [p.clone() for _, _, _, p in iter_parameters(trainer.models)]
    try:
        trainer.load(checkpoints.latest_checkpoint(root))
    except CheckpointError as error:
        print("SAID " + json.dumps(str(error)), flush=True)
    assert all(torch.equal(a, p) for a, (_, _, _, p) in zip(before, iter_parameters(trainer.models), strict=True))


def resume_weights(folder: str, topology: dict[str, int], actor_parent: str) -> None:
    """Weights that were wiped come back from the HF folder alone, bit for bit; then training goes on."""
    trainer = Trainer(folder, topology)
    for _, _, _, parameter in iter_parameters(trainer.models):
        parameter.data.fill_(float("nan"))
    restored = trainer.load(actor_parent)
    assert restored == checkpoints.Restored(7, complete=False)
    saved = load_file(Path(actor_parent, "actor", "hf_checkpoint", "model.safetensors"))
    exported = dict(trainer.bridge.export_weights(trainer.models))
    assert set(exported) == set(saved) and all(torch.equal(t, saved[name]) for name, t in exported.items())
    print("SAID " + json.dumps(trainer.train()), flush=True)


def resume_truncated(folder: str, topology: dict[str, int], root: str) -> None:
    """A rank's truncated file is an error on every rank, and no rank's weights changed."""
    trainer = Trainer(folder, topology)
    before = [p.clone() for _, _, _, p in iter_parameters(trainer.models)]
    try:
        trainer.load(checkpoints.latest_checkpoint(root))
    except RlsyncError as error:
        print("SAID " + json.dumps(str(error)), flush=True)
    assert all(torch.equal(a, p) for a, (_, _, _, p) in zip(before, iter_parameters(trainer.models), strict=True))


def killed_while_saving(folder: str, topology: dict[str, int], root: str, die_at: str) -> None:
    """Save step 1 completely, then die with SIGKILL inside the save of step 2."""
    trainer = Trainer(folder, topology)
    trainer.train()
    trainer.save(root)
    trainer.train()
    original = getattr(checkpoints, die_at)

    def die(*args, **kwargs):
        if die_at == "write_rank_state":  # half of the files are there
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(checkpoints, die_at, die)
    trainer.save(root)
