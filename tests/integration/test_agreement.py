"""One outcome for all ranks."""

from __future__ import annotations

from tests.ranks import run_ranks


def test_an_exception_of_one_rank_is_raised_on_all_and_names_it():
    run_ranks(2, "tests.integration.agreement_ranks", "disagree")
