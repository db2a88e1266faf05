"""Claims about what a configuration asks of vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import SchedulerConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext

from tests.unit.test_config import minimal
from tests.unit.test_sft_config import minimal as minimal_sft
from workers.config import load_config
from workers.config.validate import LEAST_BATCHED_TOKENS
from workers.rollout import engine_arguments, sampling_arguments, some_with_logprobs


def arguments(*, on_gpu: bool, can_sleep: bool = False, seeded: bool = True, **rollout: Any) -> dict[str, Any]:
    config = load_config(minimal(rollout=rollout, algorithm={"sampling_params": {"seeded": seeded}}))
    return engine_arguments(config, on_gpu=on_gpu, can_sleep=can_sleep)


def test_an_engine_can_sleep_only_where_it_is_to() -> None:
    assert "enable_sleep_mode" not in arguments(on_gpu=True) and arguments(on_gpu=True, can_sleep=True)["enable_sleep_mode"] is True
    assert arguments(on_gpu=True)["load_format"] == "dummy"


def test_seeded_prompts_are_not_cut_on_a_cpu() -> None:
    assert arguments(on_gpu=False)["enable_chunked_prefill"] is False
    assert "enable_chunked_prefill" not in arguments(on_gpu=True) and "enable_chunked_prefill" not in arguments(on_gpu=False, seeded=False)
    assert arguments(on_gpu=True, vllm={"enable_chunked_prefill": True})["enable_chunked_prefill"] is True


def test_engines_share_experts_where_they_are_to() -> None:
    assert "enable_expert_parallel" not in arguments(on_gpu=True, tensor_parallel_size=2)
    shared = arguments(on_gpu=True, tensor_parallel_size=2, vllm={"enable_expert_parallel": True})
    assert (shared["enable_expert_parallel"], shared["tensor_parallel_size"]) == (True, 2)


@pytest.mark.parametrize(
    ("tokens", "requests", "cuts", "said"),
    [(31, 32, True, "max_num_seqs"), (31, 8, False, "max_model_len"), (31, 8, True, ""), (32, 32, False, "")],
)
def test_what_a_configuration_may_not_ask_of_a_step_vllm_refuses(tokens: int, requests: int, cuts: bool, said: str) -> None:
    """And nothing else of the same keys; rules of ``validate`` say it before an engine starts."""
    asked = {"max_num_batched_tokens": tokens, "max_num_seqs": requests, "enable_chunked_prefill": cuts, "max_model_len": 32}
    if said:
        with pytest.raises(ValueError, match=said):
            SchedulerConfig(**asked, is_encoder_decoder=False)
    else:
        SchedulerConfig(**asked, is_encoder_decoder=False)
    assert AsyncEngineArgs.get_batch_defaults(1)[0][UsageContext.LLM_CLASS] == LEAST_BATCHED_TOKENS


def test_the_size_of_the_kv_cache_goes_to_the_gpu_engines_that_ask_for_it() -> None:
    named = {"kv_cache_memory_bytes": 2**33}
    assert arguments(on_gpu=True, vllm=named)["kv_cache_memory_bytes"] == 2**33
    assert "kv_cache_memory_bytes" not in {**arguments(on_gpu=True), **arguments(on_gpu=False, vllm=named)}
    blocks = {"num_gpu_blocks_override": 64}
    assert all(arguments(on_gpu=on_gpu, vllm=blocks).items() >= blocks.items() for on_gpu in (True, False))
    assert "num_gpu_blocks_override" not in arguments(on_gpu=False)


def test_an_engine_that_takes_pictures_has_its_tokenizer_and_the_limits_of_pixels_of_the_actor() -> None:
    """vLLM makes no processor without one."""
    assert arguments(on_gpu=False)["skip_tokenizer_init"] is True
    config = load_config(minimal_sft(data={"type": "vlm", "max_pixels": 3136}), "sft")
    taken = engine_arguments(config, on_gpu=False, takes_pictures=True)
    assert (taken["skip_tokenizer_init"], taken["mm_processor_kwargs"]) == (False, {"max_pixels": 3136})
    assert "mm_processor_kwargs" not in engine_arguments(load_config(minimal_sft(), "sft"), on_gpu=False, takes_pictures=True)


def test_routes_are_asked_of_engines() -> None:
    wanted = {"enable_return_routed_experts": True}
    assert arguments(on_gpu=True, **wanted)["enable_return_routed_experts"] is True
    assert "enable_return_routed_experts" not in arguments(on_gpu=True)


def test_log_probabilities_are_asked_for_where_they_are_needed_and_of_every_eighth_prompt_elsewhere() -> None:
    model = SimpleNamespace(vision=None, dims={"vocab": 10})
    for returned, asked in ((True, 0), (False, None), (None, None)):
        config = load_config(minimal(rollout={"return_logprobs": returned}))
        sampling = sampling_arguments(config, model=model, stop_token_ids=())  # type: ignore[arg-type]
        assert (config.rollout.return_logprobs, sampling["logprobs"]) == (returned, asked)
    each = some_with_logprobs(sampling, 17)
    assert [number for number, fields in enumerate(each) if fields["logprobs"] == 0] == [0, 8, 16]
    assert all({**fields, "logprobs": None} == sampling for fields in each) and len(some_with_logprobs(sampling, 1)) == 1
