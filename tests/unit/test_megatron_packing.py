"""Claims about packed and shared microbatches: where tokens go and come back to, and what is refused. Integers; no model."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank
from megatron.core.utils import get_batch_on_this_cp_rank

from rlsync.errors import ConfigError
from rlsync.megatron.context import Share
from rlsync.megatron.packing import PackedRotations, Packing, check_lengths, packing_refusal

TOKENS = torch.tensor([[1, 2, 3, 0], [0, 0, 0, 0], [4, 5, 6, 7]])


def packed(total: int) -> tuple[Packing, dict[str, torch.Tensor]]:
    microbatch = {"tokens": TOKENS, "lengths": torch.tensor([3, 0, 4])}
    check_lengths(microbatch)
    return Packing.of(microbatch, total=total), microbatch


def test_rows_lie_one_after_the_other_and_come_back() -> None:
    packing, _ = packed(7)
    assert packing.bounds == (0, 3, 7), "a row without tokens is no sequence"
    assert packing.pack(TOKENS).tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert torch.equal(packing.unpack(packing.pack(TOKENS)), TOKENS)
    features = torch.randn(3, 4, 2, 5)
    assert torch.equal(packing.unpack(packing.pack(features))[0, :3], features[0, :3])


def test_padding_behind_the_last_sequence_is_a_sequence_of_its_own() -> None:
    packing, _ = packed(10)
    assert packing.bounds == (0, 3, 7, 10)
    assert packing.pack(TOKENS, fill=-1).tolist() == [[1, 2, 3, 4, 5, 6, 7, -1, -1, -1]]
    told = packing.sequences()
    assert (told.qkv_format, told.cu_seqlens_q.tolist(), told.cu_seqlens_q.dtype) == ("thd", [0, 3, 7, 10], torch.int32)
    assert (told.max_seqlen_q, told.max_seqlen_kv) == (4, 4)
    assert packing.unpack(torch.arange(10)[None], fill=9).tolist() == [[0, 1, 2, 9], [9] * 4, [3, 4, 5, 6]]


@pytest.mark.parametrize("size", [2, 3])
def test_context_ranks_share_sequences_as_megatron_cuts_them(size: int) -> None:
    """Of one sequence its tokens, of several packed ones their positions; every token is on one rank."""
    packing = Packing.of({"tokens": TOKENS, "lengths": torch.tensor([3, 0, 4])}, total=6 * size, multiple=2 * size)
    assert packing.bounds == (0, 2 * size, 4 * size, 6 * size)
    assert torch.equal(packing.unpack(packing.pack(TOKENS)), TOKENS)
    whole, angles = torch.arange(2 * 4 * size).view(2, 4 * size), torch.arange(packing.total)
    held = []
    for rank in range(size):
        with (
            mock.patch.object(parallel_state, "get_context_parallel_world_size", return_value=size),
            mock.patch.object(parallel_state, "get_context_parallel_rank", return_value=rank),
        ):
            wanted = get_batch_on_this_cp_rank({"tokens": whole})["tokens"]
        assert torch.equal(Share((0, 4 * size), rank, size).own(whole, 1), wanted)
        own = Share(packing.bounds, rank, size).own(angles, 0)
        lengths = [(end - start) // size for start, end in pairwise(packing.bounds)]
        parts = zip(own.split(lengths), packing.bounds, strict=False)
        wanted = torch.cat([_get_thd_freqs_on_this_cp_rank(rank, size, part, angles, start) for part, start in parts])
        assert torch.equal(own, wanted)
        held += own.tolist()
    assert sorted(held) == angles.tolist()


@pytest.mark.parametrize("of_each_token", [False, True], ids=["positions", "tokens"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_packed_rotations_are_megatrons(size: int, of_each_token: bool) -> None:
    """Bit for bit, of sequences of several lengths, with and without angles of the row's tokens, and again with another row's bounds."""
    spec = importlib.util.find_spec(rope_utils.__name__)
    assert spec is not None and spec.loader is not None
    megatron = importlib.util.module_from_spec(spec)  # one that nothing has been put in place of
    spec.loader.exec_module(megatron)
    theirs, freqs = megatron._apply_rotary_pos_emb_thd, torch.randn(24 * size if of_each_token else 12 * size, 1, 1, 8)
    for rank in range(size):
        ours, group = PackedRotations(), SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank)
        for bounds in ((0, 2, 12, 24), (0, 10, 12, 24), (0, 12, 24)):
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32) * size
            for options in ({}, {"rotary_interleaved": True, "mscale": 1.25}, {"multi_latent_attention": True}):
                t = torch.randn(24, 3, 10)
                turned = [rotate(t, cu_seqlens, freqs, **options, cp_group=group) for rotate in (ours, theirs)]
                assert torch.equal(*turned), (bounds, rank, options)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (None, "packing needs 'lengths' in every microbatch"),
        (torch.tensor([3, 4]), r"lengths is \(2,\) torch.int64; for tokens \(3, 4\) it must be \(3,\) of integers"),
        (torch.tensor([3.0, 1.0, 4.0]), "it must be"),
        (torch.tensor([3, 1, 5]), r"lengths is \[3, 1, 5\]; rows of this microbatch have 0 to 4 tokens"),
        (torch.tensor([0, 0, 0]), "at least one has some"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths: torch.Tensor | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_lengths({"tokens": TOKENS} | ({} if lengths is None else {"lengths": lengths}))


@pytest.mark.parametrize(
    ("kinds", "weights", "refused"),
    [("aux_loss", 0.1, False), ("seq_aux_loss", 0.0, False), ("seq_aux_loss", 0.1, True), (["aux_loss", "seq_aux_loss"], [0.1, 0.2], True)],
)
def test_sequences_that_are_balanced_one_by_one_are_not_packed(kinds: object, weights: object, refused: bool) -> None:
    config = SimpleNamespace(num_moe_experts=8, moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=weights, context_parallel_size=1)
    assert ("balances each sequence" in (packing_refusal(config) or "")) is refused  # type: ignore[arg-type]
