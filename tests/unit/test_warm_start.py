"""Claims about the examples of a warm start by text: a model learns to answer the prompts that it is asked in rollouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rlsync.errors import ConfigError
from tests.json_lines import written
from tests.unit.test_preparation import config, prepare, with_model, world  # noqa: F401
from workers.config import WarmStartConfig
from workers.grpo_runner import warm_start_texts

TEMPLATE = "{% for m in messages %}({{ m.content }}){% endfor %}{% if add_generation_prompt %}={% endif %}"
FORMS = {
    "as it is": {},
    "with a suffix": {"prompt_suffix": "="},
    "in a template": {"apply_chat_template": True, "system_prompt": "*", "prompt_suffix": "+"},
}


@pytest.fixture
def model(world: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A model whose tokenizer puts a token in front of every text, as Llama's does."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (world / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("1")["input_ids"][0] == tokenizer.bos_token_id
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_those_of_rollouts_and_responses_follow_them_without_special_tokens(
    world: Path,  # noqa: F811
    tmp_path: Path,
    model: Path,
    form: str,
) -> None:
    data = written(tmp_path / "rows.jsonl", *({"prompt": "1+1", "response": "2", "solutions": "2"},) * 4)
    found = with_model(world, tmp_path, model, data={"train_data_paths": [data], "max_prompt_length": 12, **FORMS[form]})
    prepared = prepare(found)
    rollout = next(iter(prepared.data.loader))[0]
    warm = WarmStartConfig(data_paths=(data,), num_steps=2, batch_size=3)
    steps = warm_start_texts(found, warm, prepared.tokenizer, prepared.stop_ids[:1])
    assert [len(examples) for examples in steps] == [3, 3]
    response = (prepared.tokenizer.convert_tokens_to_ids("2"), prepared.tokenizer.eos_token_id)
    for example in (example for examples in steps for example in examples):
        assert example.token_ids == rollout.token_ids + response
        assert example.loss_mask == (False,) * len(rollout.token_ids) + (True, True)


def test_rows_that_no_rollout_could_ask_end_a_warm_start_by_file_and_line(world: Path, tmp_path: Path, model: Path) -> None:  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    held = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**held, "vocab_size": len(tokenizer) - 1}))
    found = with_model(world, tmp_path, model)

    def start(**row: str) -> None:
        data = written(tmp_path / "rows.jsonl", {"prompt": "1+1=", "response": "2"}, row)
        warm_start_texts(found, WarmStartConfig(data_paths=(data,), num_steps=1, batch_size=2), tokenizer, (2,))

    for row in ({"prompt": "1<new>", "response": "2"}, {"prompt": "1", "response": "<new>"}):
        with pytest.raises(ConfigError, match=r"rows\.jsonl:2: .*'<new>' of id"):
            start(**row)
    length = found.runner.seq_length
    with pytest.raises(
        ConfigError, match=rf"rows\.jsonl:2: prompt and response have {length + 3} tokens, and runner\.seq_length is {length}"
    ):
        start(prompt="1", response="2" * length)
