"""What the ranks of ``test_sft_actor`` do; each function runs on every rank, without Ray and without engines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsync.errors import ConfigError
from rlsync.megatron.parallel import destroy_parallel
from rlsync.megatron.train import _prepared
from tests.integration.actor_ranks import set_up
from workers.config import SftConfig, actor_topology, lenient_overrides, load_config, register_resolvers
from workers.model_folder import read_hf_config
from workers.preparation import load_tokenizer, prepare_model
from workers.resume import Beginning
from workers.row_loader import LEFT_OUT
from workers.sft_actor import SftRank
from workers.sft_data import SftExample
from workers.sft_preparation import open_loader

STEPS, BATCH, MICRO = 3, 8, 2
# A large epsilon keeps Adam from blowing up the rounding differences of gradients near zero.
OPTIM = {"lr": 2e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5}


def sft_config(world: str, sections: Mapping[str, Mapping[str, Any]]) -> SftConfig:
    """A configuration around an arithmetic world; ``sections`` are dotted section names to keys that differ."""
    values: dict[str, Any] = {
        "cluster": {"component_placement": {"actor": "0-1"}},
        "runner": {"seq_length": 24, "experiment_name": "sft", "output_dir": str(Path(world).parent)},
        "data": {
            "train_data_paths": [f"{world}/supervised.jsonl"], "val_data_paths": [f"{world}/held_out.jsonl"], "answer_key": "response",
            "apply_chat_template": False, "shuffle": False,
        },
        "actor": {
            "model": {"precision": "fp32", "model_path": f"{world}/model"}, "optim": dict(OPTIM), "megatron": {"mbridge": True},
            "micro_batch_size": MICRO, "eval_batch_size": 4, "global_batch_size": BATCH,
        },
    }  # fmt: skip
    for section, keys in sections.items():
        into = values
        for name in section.split("."):
            into = into.setdefault(name, {})
        into.update(keys)
    return load_config(values, "sft")


def start(config: SftConfig) -> SftRank:
    """A rank that may train, on as many replicas as there are ranks for."""
    model = config.actor.model
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    actor = SftRank(config, actor_topology(model, int(os.environ["WORLD_SIZE"]) // replica))
    set_up(actor)
    actor.begin(None)
    return actor


def position(config: SftConfig) -> Mapping[str, Any]:
    return open_loader(config, load_tokenizer(config, read_hf_config(Path(config.model_path), config.model_key))).state_dict()


def train_as_transformers(cases: Sequence[Mapping[str, Any]], world: str) -> None:
    """Three steps and a validation in each case: losses, norms, counts and weights are those of transformers and torch's AdamW; with
    adapters, of PEFT, which begins with those that the run begins with."""
    for case in cases:
        config = sft_config(world, case)
        actor = start(config)
        adapter = Path(world, "adapter")
        if config.actor.lora_spec is not None:
            actor._bridge.save_adapter(actor._models, adapter)
        actor.open_data(position(config))
        found = [actor.train() for _ in range(STEPS)]
        check_positions(actor, config)
        state, validated = actor.data_state(), actor.validate()
        trained = dict(actor._bridge.export_weights(actor._models))
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, ([{n: v for n, v in m.items() if not n.startswith("time/")} for m in found], validated))
        assert all(other == everywhere[0] for other in everywhere), f"{case}: ranks report different metrics"
        if dist.get_rank() == 0:
            assert state is not None and state["handed_out"] == STEPS
            reference = AutoModelForCausalLM.from_pretrained(config.model_path, dtype=torch.float32, attn_implementation="eager")
            if config.actor.lora_spec is not None:
                reference = peft.PeftModel.from_pretrained(reference, adapter, is_trainable=True)
            compare(case, config, reference.train(), found, validated, trained)
        # No rank may close connections while another still asks.
        destroy_parallel(keep_distributed=True)


def check_positions(actor: SftRank, config: SftConfig) -> None:
    """Micro-batches of the rows with which the data begins, cut by tokens, go through the model within the budget. Collective."""
    rows = [SftExample(ids, mask, None, None, "a row") for ids, mask in unequal_rows(config.actor.global_batch_size)]
    if not config.runner.enable_dynamic_batch_size:
        return
    microbatches = actor._microbatches(rows)
    assert sum(len(m["tokens"]) for m in microbatches) == len(rows)
    positions = [p.tokens.numel() for p in _prepared(actor._models, microbatches, packing=actor._passes["packing"])]
    assert max(positions) * config.actor.model.context_parallel_size <= config.runner.max_tokens_per_mbs, positions


def unequal_rows(count: int) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Tokens and loss masks: a long row and short ones, all of lengths that ranks can divide."""
    lengths = [16, *[4] * (count - 1)]
    return [((1,) * length, (False, *(True,) * (length - 1))) for length in lengths]


def compare(
    case: Any,
    config: SftConfig,
    reference: Any,
    found: Sequence[Mapping[str, float]],
    validated: Mapping[str, float],
    trained: Mapping[str, torch.Tensor],
) -> None:
    decayed, plain = ([p for p in reference.parameters() if p.requires_grad and (p.dim() > 1) is many] for many in (True, False))
    adam = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for params, decay in ((decayed, OPTIM["weight_decay"]), (plain, 0.0)) if params],
        lr=OPTIM["lr"], eps=OPTIM["adam_eps"], betas=(OPTIM["adam_beta1"], OPTIM["adam_beta2"]),
    )  # fmt: skip
    rows = list(tokenized(config, config.data.train_data_paths[0]))
    for step, metrics in enumerate(found):
        losses = [token_losses(reference, *row) for row in rows[step * BATCH : (step + 1) * BATCH]]
        mean = torch.cat(losses).mean()
        per_microbatch = torch.stack([torch.cat(losses[i : i + MICRO]).mean() for i in range(0, BATCH, MICRO)]).mean()
        objective = per_microbatch if config.algorithm.loss_agg_func == "micro-batch-mean" else mean
        adam.zero_grad()
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), OPTIM["clip_grad"])
        adam.step()
        wanted = {
            "train/loss": objective.item(), "train/lm_loss": mean.item(), "train/grad_norm": norm.item(), "train/update_success": 1.0,
            "train/num_tokens": sum(map(len, losses)), "perf/total_num_tokens": sum(len(p) + len(a) for p, a in rows[:BATCH]),
        }  # fmt: skip
        if step:
            del wanted["perf/total_num_tokens"]
        for name, value in wanted.items():
            assert abs(metrics[name] - value) <= 1e-5 * max(1.0, abs(value)), f"{case}, step {step}: {name} {metrics[name]}, wanted {value}"
    if config.actor.lora_spec is not None:
        reference = reference.merge_and_unload()
    for name, tensor in reference.state_dict().items():
        if name in trained:
            torch.testing.assert_close(trained[name].cpu(), tensor, atol=2e-6, rtol=1e-4, msg=f"{case}: {name}")
    with torch.no_grad():
        held_out = [token_losses(reference, *row) for row in tokenized(config, config.data.val_data_paths[0])]
    assert abs(validated["val/loss"] - torch.cat(held_out).mean().item()) <= 1e-5, (case, validated)
    assert (validated["val/num_tokens"], validated["val/num_examples"]) == (sum(map(len, held_out)), len(held_out))
    print(f"EQUAL {json.dumps(case)}", flush=True)


def tokenized(config: SftConfig, path: str) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and answer of each row in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(config.model_path)
    for row in map(json.loads, Path(path).read_text().splitlines()):
        yield tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]


def token_losses(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")


def see_alike(cases: Sequence[Mapping[str, Any]], world: str, rows: str) -> None:
    """Two steps on rows with pictures and without, and a validation, in each layout (keys of ``actor.model``): the numbers of the first."""
    data = {"type": "vlm", "prompt_key": "question", "answer_key": "answer", "image_keys": ["image"], "apply_chat_template": True}
    paths = {"train_data_paths": [rows], "val_data_paths": [rows], "val_data_size": 5}
    wanted: list[float] = []
    for case in cases:
        model = {"model_path": f"{world}/model", **case}
        config = sft_config(world, {"runner": {"seq_length": 96}, "data": {**data, **paths}, "actor.model": model})
        actor = start(config)
        actor.open_data(position(config))
        metrics = [actor.train(), actor.train(), actor.validate()]
        names = ("train/lm_loss", "train/grad_norm", "train/num_tokens", "val/loss", "val/num_tokens")
        found = [step[name] for step in metrics for name in names if name in step]
        wanted = wanted or found
        assert len(found) == 8 and all(abs(a - b) <= 1e-5 * max(1.0, abs(b)) for a, b in zip(found, wanted, strict=True)), (
            case,
            found,
            wanted,
        )
        print(f"EQUAL {case}", flush=True)
        destroy_parallel(keep_distributed=True)


def meet_a_bad_row(world: str, rows: str) -> None:
    """A row that one replica cannot use ends all ranks with its file and line, and none waits."""
    config = sft_config(world, {"data": {"train_data_paths": [rows]}})
    actor = start(config)
    actor.open_data(position(config))
    actor.train()
    try:
        actor.train()
    except ConfigError as error:
        print(f"SAID {error}", flush=True)


def leave_rows_out(world: str, rows: str) -> None:
    """Rows that replicas leave out are counted together, on every rank, in the step that had others in their place."""
    config = sft_config(world, {"data": {"train_data_paths": [rows], "on_bad_sample": "skip", "on_too_long": "skip"}})
    actor = start(config)
    actor.open_data(position(config))
    print(f"SAID {json.dumps([[value for name, value in actor.train().items() if name in LEFT_OUT] for _ in range(3)])}", flush=True)


CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "sft"


def pretrain_twins(cases: Sequence[Mapping[str, Any]], folder: str) -> None:
    """Twins of recipes begin with the same random weights in every layout, and their first loss is transformers' of these weights.

    Each case: ``recipe``, ``layouts`` (overrides of each run), the first of which saves its first weights as ``<folder>/<recipe>``.
    """
    register_resolvers()
    for case in cases:
        saved, first = Path(folder) / case["recipe"], {}
        for index, layout in enumerate(case["layouts"]):
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                own = (f"recipe={case['recipe']}", "+twin=cpu", f"runner.output_dir={folder}", "cluster.component_placement.actor=0-1")
                composed = compose("pretrain_text", lenient_overrides([*own, *layout]))
            config = load_config(composed, "sft")
            prepare_model(config, Beginning())
            actor = start(config)
            weights = dict(actor._bridge.export_weights(actor._models))
            if index == 0:
                first = {name: tensor.clone() for name, tensor in weights.items()}
                check_distribution(first, actor)
                actor._bridge.save_weights(actor._models, saved)
            dtype = next(iter(weights.values())).dtype
            assert weights.keys() == first.keys(), layout
            different = [name for name, tensor in weights.items() if not torch.equal(tensor, first[name].to(tensor.dtype))]
            assert different == [], f"{case['recipe']} {layout}: other first weights in {different[:3]}"
            actor.open_data(position(config))
            loss = actor.train()["train/lm_loss"]
            if dist.get_rank() == 0:
                wanted = first_loss(config, saved)
                assert abs(loss - wanted) <= (1e-5 if dtype == torch.float32 else 5e-3) * wanted, (case["recipe"], layout, loss, wanted)
                print(f"EQUAL {case['recipe']} {layout} {dtype} {loss:.4f}", flush=True)
            destroy_parallel(keep_distributed=True)


def check_distribution(weights: Mapping[str, torch.Tensor], actor: SftRank) -> None:
    """Vectors are one or zero; matrices have the config's deviation, less where they write into the residual stream."""
    std, num_layers = actor._bridge.hf_config["initializer_range"], actor._bridge.model.num_layers
    for name, tensor in weights.items():
        if tensor.dim() == 1:
            assert bool((tensor == float(name.endswith("norm.weight"))).all()), name
            continue
        wanted = std / (2 * num_layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else std
        assert abs(tensor.std().item() / wanted - 1) < 0.15 and abs(tensor.mean().item()) < 0.1 * wanted, (name, tensor.std(), wanted)


def first_loss(config: SftConfig, saved: Path) -> float:
    """Mean loss of the tokens in the first global batch by transformers, from the weights in ``saved``."""
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, attn_implementation="eager").train()
    tokenizer = load_tokenizer(config, read_hf_config(Path(config.model_path), config.model_key))
    batch = next(iter(open_loader(config, tokenizer)))
    with torch.no_grad():
        losses = [token_losses(model, list(example.token_ids[:1]), list(example.token_ids[1:])) for example in batch]
    return torch.cat(losses).mean().item()


def learn(cases: Sequence[Mapping[str, Any]], world: str, num_steps: int) -> None:
    """Steps on all additions of a world in each case, and the accuracy of greedy answers before and after them."""
    for case in cases:
        rows = [f"{world}/supervised.jsonl"]
        data = {"train_data_paths": rows, "val_data_paths": rows, "val_data_size": 64}
        sizes = {"micro_batch_size": 32, "global_batch_size": 32, "eval_batch_size": 64}
        config = sft_config(world, {"data": data, "actor": sizes, "runner": {"max_epochs": 8}, **case})
        actor = start(config)
        actor.open_data(position(config))
        before = actor.validate()
        for _ in range(num_steps):
            actor.train()
        print(f"SAID {json.dumps([before['val/accuracy'], actor.validate()['val/accuracy']])}", flush=True)
        destroy_parallel(keep_distributed=True)
