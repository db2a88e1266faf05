"""Claims about packed documents: every token of an epoch in its order, whatever is cut where."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from rlsync.errors import ConfigError
from workers.packed_text import PackedDocuments
from workers.row_files import RowFiles
from workers.row_loader import RowLoader
from workers.sft_rows import RowForm
from workers.synthetic import make_tokenizer

TOKENIZER = make_tokenizer()
TEXT = RowForm("text", "text", "answer")


def documents(tmp_path: Path, count: int = 40) -> str:
    random = np.random.default_rng(0)
    rows = [{"text": "".join(random.choice(list("0123456789+="), int(random.integers(1, 60))))} for _ in range(count)]
    rows[3] = {"text": "12" * 200}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl")


def source(path: str, length: int = 16, **given: Any) -> PackedDocuments:
    return PackedDocuments(RowFiles([path]), TEXT, TOKENIZER, length, **{"on_bad_sample": "error", **given})


def test_examples_are_the_documents_one_behind_the_other_cut_at_one_length(tmp_path: Path) -> None:
    path = documents(tmp_path)
    found = source(path)
    batches = list(RowLoader(found, 1, num_epochs=2, seed=5))
    stream = [token for batch in batches for token in batch[0].token_ids]
    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    expected: list[int] = []
    for epoch in range(2):
        order = RowFiles([path]).order(epoch, shuffle=True, seed=5)
        tokens = list(chain.from_iterable([*TOKENIZER(texts[row])["input_ids"], TOKENIZER.eos_token_id] for row in order))
        expected += tokens[: len(tokens) // 16 * 16]
    assert stream == expected
    assert all(batch[0].loss_mask == (False,) + (True,) * 15 for batch in batches)


def test_a_packed_loader_continues_at_the_exact_batch(tmp_path: Path) -> None:
    path = documents(tmp_path)
    whole = list(RowLoader(source(path), 4, num_epochs=3))
    first = RowLoader(source(path), 4, num_epochs=3)
    head = list(islice(first, 9))
    second = RowLoader(source(path), 4, num_epochs=3, num_workers=1)
    second.load_state_dict(first.state_dict())
    assert head + list(second) == whole


def test_documents_are_counted_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = documents(tmp_path)
    whole = list(RowLoader(source(path, index=tmp_path / "index"), 4))
    monkeypatch.setattr(PackedDocuments, "_count", lambda self: pytest.fail("counted again"))
    assert list(RowLoader(source(path, index=tmp_path / "index"), 4)) == whole
    assert len(list((tmp_path / "index").iterdir())) == 1


@pytest.mark.parametrize("damage", [lambda content: content[:50], lambda _: b"", lambda content: content.replace(b"<i8", b"<f8")])
def test_damaged_counts_are_counted_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path, index = documents(tmp_path), tmp_path / "index"
    whole = source(path, index=index)
    (kept,) = index.iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert source(path, index=index).num_tokens == whole.num_tokens and np.load(kept).sum() == whole.num_tokens


def test_counts_are_those_of_the_field_and_of_the_tokenizer(tmp_path: Path) -> None:
    """A count of others would cut documents short."""
    path, index = tmp_path / "a.jsonl", tmp_path / "index"
    path.write_text("".join(json.dumps({"text": "1" * (20 + row), "short": "2", "long": "3" * 70}) + "\n" for row in range(8)))
    counted = {key: _of_field(str(path), key, index) for key in ("short", "text", "long")}
    assert {key: found.num_tokens for key, found in counted.items()} == {"short": 16, "text": 8 * 21 + 28, "long": 8 * 71}
    pairs = make_tokenizer()
    pairs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")  # an unknown token for two characters
    assert len(pairs) == len(TOKENIZER)
    cut = _of_field(str(path), "text", index, pairs)
    assert cut.num_tokens == sum((20 + row + 1) // 2 + 1 for row in range(8))
    assert len({found.fingerprint() for found in (*counted.values(), cut)}) == 4, "a position in one is none in another"
    pairs("1" * 9, truncation=True, max_length=3)
    assert _of_field(str(path), "text", index, pairs).fingerprint() == cut.fingerprint(), "what a call set for itself"


def _of_field(path: str, key: str, index: Path, tokenizer: Any = TOKENIZER) -> PackedDocuments:
    return PackedDocuments(RowFiles([path]), RowForm("text", key, "answer"), tokenizer, 16, on_bad_sample="error", index=index)


def test_counts_of_documents_that_end_the_run_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no field 'txt'"):
        _of_field(documents(tmp_path), "txt", tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_document_that_has_other_tokens_than_when_it_was_counted_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = source(documents(tmp_path))
    item = found.items(0, shuffle=False, seed=0)[0]
    tokenized = PackedDocuments._tokenized
    monkeypatch.setattr(PackedDocuments, "_tokenized", lambda self, texts: tokenized(self, [text + "1" for text in texts]))
    [left_out] = found.draw(item).left_out
    assert (
        re.fullmatch(r"the document has (\d+) tokens, and had (\d+) when it was counted", left_out.reason) and "a.jsonl:1" in left_out.where
    )


def test_a_document_with_a_token_that_the_model_does_not_have_is_a_bad_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "1" * 40}) + "\n" + json.dumps({"text": "1<new>2"}) + "\n")
    given = {"vocab_size": len(TOKENIZER), "index": tmp_path / "index"}

    def of(on_bad_sample: Any, **given: Any) -> PackedDocuments:
        return PackedDocuments(RowFiles([str(path)]), TEXT, tokenizer, 16, on_bad_sample=on_bad_sample, **given)

    with pytest.raises(ConfigError, match=rf"a\.jsonl:2: .*'<new>' of id {len(TOKENIZER)} .*vocab_size is {len(TOKENIZER)}; resize"):
        of("error", **given)
    assert of("skip", **given).num_tokens == 41
    assert of("error", **{**given, "vocab_size": len(tokenizer)}).num_tokens == 41 + 4, "a resized model"


def test_a_document_with_a_token_that_stands_for_a_picture_is_a_bad_one(tmp_path: Path) -> None:
    """A vision-language model would look for the picture, in the middle of a step."""
    path, [plus] = tmp_path / "a.jsonl", TOKENIZER("+")["input_ids"]
    path.write_text(json.dumps({"text": "1" * 40}) + "\n" + json.dumps({"text": "1+2"}) + "\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: the tokenizer makes the token '\+' of it, which stands for a picture or a video"):
        source(str(path), picture_tokens=frozenset((plus,)))
    assert source(str(path), picture_tokens=frozenset((plus,)), on_bad_sample="skip").num_tokens == 41 == source(str(path)).num_tokens - 4


def test_documents_that_cannot_be_used_are_named_before_anything_starts(tmp_path: Path) -> None:
    path = documents(tmp_path)
    with Path(path).open("a") as stream:
        stream.write('{"txt": "1"}\n{"text": ""}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:41: no field 'text'; it has 'txt'.*\n.*a\.jsonl:42: field 'text' is empty"):
        source(path)
    skipped = source(path, on_bad_sample="skip")
    assert skipped.num_items == source(documents(tmp_path)).num_items and "left out 2 bad samples" in skipped.notes[0]
    with Path(path).open("a") as stream:
        stream.write('{"text": ""}\n' * 300)
    assert "left out 300 bad samples" in source(path, on_bad_sample="skip").notes[0]
    with pytest.raises(ConfigError, match=r"^300 bad samples.*\n(.*a\.jsonl:4\d: .*\n){5}  and 295 more$"):
        source(path)
    with pytest.raises(ConfigError, match=r"tokens together, and an example has runner\.seq_length \(100000\)"):
        source(documents(tmp_path), length=100000)
