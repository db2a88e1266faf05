"""Who reads whose device memory, and who was told where it lies. Knows no phase; sends nothing."""

from __future__ import annotations

from rlsync.control.loans import Loan
from rlsync.control.messages import Lender


class Ledger:
    """The loans of a connection by actor rank, and of each worker whom it borrows from."""

    def __init__(self) -> None:
        self._loans: dict[int, Loan] = {}
        self._is_renewed: set[int] = set()
        self._lenders: dict[bytes, tuple[int, ...]] = {}
        self._told: dict[bytes, int] = {}

    def borrows(self, identity: bytes, lenders: tuple[int, ...]) -> None:
        """A worker reads what these actor ranks lend."""
        self._lenders[identity] = lenders

    def lend(self, actor_rank: int, loan: Loan) -> None:
        """What an actor rank lends from the beginning."""
        self._loans[actor_rank] = loan

    def renew(self, actor_rank: int, loan: Loan) -> None:
        """What it lends from now on."""
        self._loans[actor_rank] = loan
        self._is_renewed.add(actor_rank)

    def first(self, identity: bytes) -> tuple[Lender, ...]:
        """What a worker borrows."""
        return self._of(self._lenders[identity])

    def renewed(self, identity: bytes, attempt: int) -> tuple[Lender, ...]:
        """What is no longer as ``first`` said; once in an attempt, because a worker may not have read what came in one that failed."""
        if self._told.get(identity) == attempt:
            return ()
        self._told[identity] = attempt
        return self._of(tuple(rank for rank in self._lenders[identity] if rank in self._is_renewed))

    def _of(self, ranks: tuple[int, ...]) -> tuple[Lender, ...]:
        return tuple(Lender(rank, self._loans[rank]) for rank in ranks if rank in self._loans)
