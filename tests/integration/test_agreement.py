"""One outcome for all ranks."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks


def test_an_exception_of_one_rank_is_raised_on_all_and_names_it():
    run_ranks(2, "tests.integration.agreement_ranks", "disagree")


def test_a_forked_rank_that_fails_waits_for_no_engine_that_it_has_left_open():
    with pytest.raises(AssertionError, match="it was this") as caught:
        run_ranks(1, "tests.integration.agreement_ranks", "fail_beside_a_process", timeout_s=60)
    assert "did not end in time" not in str(caught.value)


def test_a_forked_rank_with_vllm_that_fails_does_not_end_as_if_all_were_well():
    """What runs at the end of the process that it is forked from ends a process with 0."""
    with pytest.raises(AssertionError, match="missing 3 required positional arguments"):
        run_ranks(1, "tests.integration.oracle_ranks", "compare_each", cases=[{}])
