"""Documents of continued pretraining, packed into examples of one length without padding or prompt.

Documents follow each other in the order of the epoch, each with its end-of-sequence token behind it, and are cut every ``seq_length``
tokens: a document may go on in the next example, and attention reaches over the end of one, as the token there says. How many tokens
each document has is found out once and kept beside the run, so that where an example begins is arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlsync.errors import ConfigError
from workers.model_folder import named, picture_token, unknown_token
from workers.problems import NUM_EXAMPLES, BadSamples, OnBadSample
from workers.row_files import BadRow, Integers, RowFiles
from workers.row_loader import Drawn, LeftOut
from workers.sft_data import SftExample
from workers.sft_rows import RowForm, document

# Documents that are tokenised at once when they are counted.
_AT_ONCE = 512
# Documents of which a process keeps the tokens: one that is longer than an example is asked for by several.
_KEPT = 8


class Piece(NamedTuple):
    """Tokens ``begin`` to ``end`` of the document in a row."""

    row: int
    begin: int
    end: int


class PackedDocuments:
    """An example every ``length`` tokens of the documents; what remains at the end of an epoch is dropped.

    Args:
        index: folder that keeps the number of tokens of each document, for the other processes of the run and for a resume; None: each
            process counts them.
        vocab_size: of the model: a document with other tokens cannot be used; None: unknown.
        picture_tokens: of the model: a document with one of these cannot be used either.

    Attributes:
        notes: on documents that were left out.

    Raises:
        ConfigError: the tokenizer cannot end a document, there are fewer tokens than an example has, or documents that cannot be used
            are not to be skipped.
    """

    def __init__(
        self,
        files: RowFiles,
        form: RowForm,
        tokenizer: Any,
        length: int,
        *,
        on_bad_sample: OnBadSample,
        index: Path | None = None,
        vocab_size: int | None = None,
        picture_tokens: frozenset[int] = frozenset(),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"{named(tokenizer)} has no eos_token, which tells where a document ends; name one in its tokenizer_config.json"
            )
        self._files, self._form, self._tokenizer, self._length, self._vocab_size = files, form, tokenizer, length, vocab_size
        self._picture_tokens = picture_tokens
        self._kept: OrderedDict[int, list[int]] = OrderedDict()
        self._fingerprint = f"{files.fingerprint()}-{_digest_of_cut(form, tokenizer, vocab_size)}"
        path = None if index is None else index / f"tokens-{self._fingerprint}.npy"
        known = None if path is None else self._read_counts(path)
        self._counts = self._count() if known is None else known
        bad = BadSamples()
        for number, row in enumerate(np.flatnonzero(self._counts == 0).tolist()):
            bad.add(files.where(row), self._reason(row) if number < NUM_EXAMPLES else "")
        self.notes = bad.settle(on_bad_sample)
        if path is not None and known is None:
            self._write_counts(path)
        self.num_tokens = int(self._counts.sum())
        self.num_items = self.num_tokens // length
        if self.num_items == 0:
            raise ConfigError(f"the documents have {self.num_tokens} tokens together, and an example has runner.seq_length ({length})")

    def items(self, epoch: int, *, shuffle: bool, seed: int) -> Sequence[tuple[Piece, ...]]:
        order = self._files.order(epoch, shuffle=shuffle, seed=seed)
        return _Cuts(order, np.cumsum(self._counts[order]), self._length, self.num_items)

    def draw(self, item: tuple[Piece, ...]) -> Drawn:
        token_ids: list[int] = []
        for piece in item:
            try:
                found = self._tokens(piece.row)
            except BadRow as reason:
                return Drawn(None, (LeftOut(self._files.where(piece.row), str(reason), too_long=False),))
            if len(found) != self._counts[piece.row]:
                changed = f"the document has {len(found)} tokens, and had {self._counts[piece.row]} when it was counted"
                return Drawn(None, (LeftOut(self._files.where(piece.row), changed, too_long=False),))
            token_ids += found[piece.begin : piece.end]
        first, last = self._files.where(item[0].row), self._files.where(item[-1].row)
        where = first if first == last else f"{first} to {last}"
        return Drawn(SftExample(tuple(token_ids), (False,) + (True,) * (self._length - 1), None, None, where))

    def fingerprint(self) -> str:
        """Hash of the files' content, and of what of it is tokenised and how: a position counts tokens."""
        return self._fingerprint

    def _tokens(self, row: int) -> list[int]:
        if row in self._kept:
            self._kept.move_to_end(row)
        else:
            self._kept[row] = self._tokens_of(self._files.read(row)[1])
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[row]

    def _reason(self, row: int) -> str:
        """Why a document was counted as one that cannot be used."""
        try:
            self._tokens_of(self._files.read(row)[1])
        except BadRow as reason:
            return str(reason)
        return "the file has changed since its documents were counted"

    def _tokens_of(self, content: Any) -> list[int]:
        """Tokens of a row's content. Raises BadRow."""
        [token_ids] = self._tokenized([document(content, self._form)])
        reason = unknown_token(token_ids, self._tokenizer, self._vocab_size)
        reason = reason or picture_token(token_ids, self._tokenizer, self._picture_tokens)
        if reason is not None:
            raise BadRow(reason)
        return token_ids

    def _tokenized(self, texts: list[str]) -> list[list[int]]:
        end = self._tokenizer.eos_token_id
        return [ids if ids[-1:] == [end] else [*ids, end] for ids in self._tokenizer(texts)["input_ids"]] if texts else []

    def _read_counts(self, path: Path) -> Integers | None:
        """Tokens of each document as an earlier process counted them; None where that is not known."""
        try:
            found: Integers = np.load(path)
        except (OSError, ValueError, EOFError):  # not there, or damaged: they are counted again
            return None
        return found if found.shape == (len(self._files),) and found.dtype == np.int64 else None

    def _write_counts(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, self._counts)
        partial.rename(path)

    def _count(self) -> Integers:
        """Tokens of each document; 0 for those that cannot be used."""
        counts = np.zeros(len(self._files), np.int64)
        for first in range(0, len(self._files), _AT_ONCE):
            rows, texts = [], []
            for row in range(first, min(len(self._files), first + _AT_ONCE)):
                try:
                    texts.append(document(self._files.read(row)[1], self._form))
                    rows.append(row)
                except BadRow:
                    continue
            counts[rows] = [len(ids) if self._knows(ids) else 0 for ids in self._tokenized(texts)]
        return counts

    def _knows(self, token_ids: Sequence[int]) -> bool:
        """Whether the model can be given these tokens."""
        return (self._vocab_size is None or max(token_ids) < self._vocab_size) and self._picture_tokens.isdisjoint(token_ids)


def _digest_of_cut(form: RowForm, tokenizer: Any, vocab_size: int | None) -> str:
    """Digest of all that decides which tokens a row becomes: its field, the tokenizer, what ends a document, which tokens may be in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        how: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        # The library sets these two by each call, for which they are not asked here.
        how = {name: value for name, value in json.loads(backend.to_str()).items() if name not in ("truncation", "padding")}
    cut = json.dumps([form.prompt_key, tokenizer.eos_token_id, vocab_size, how])
    return hashlib.blake2b(cut.encode(), digest_size=8).hexdigest()


class _Cuts(Sequence[tuple[Piece, ...]]):
    """The pieces of each example of an epoch. ``ends``: tokens up to the end of each document in the order of the epoch."""

    def __init__(self, order: Integers, ends: Integers, length: int, num_items: int) -> None:
        self._order, self._ends, self._length, self._num_items = order, ends, length, num_items

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, place: Any) -> Any:
        begin, stop, pieces = place * self._length, (place + 1) * self._length, []
        at = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < stop:
            start = int(self._ends[at - 1]) if at else 0
            end = min(stop, int(self._ends[at]))
            if end > begin:
                pieces.append(Piece(int(self._order[at]), begin - start, end - start))
            begin, at = end, at + 1
        return tuple(pieces)
