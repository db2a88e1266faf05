"""The receiver inside each engine worker: dials home, says what it holds, pulls buckets into a sink, verifies them.

Owns the worker's end of the channel and its deadlines. A blocked worker blocks its whole engine, so no wait is unbounded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from rlsync.control import messages as m
from rlsync.control.peer import Peer, pid_domain
from rlsync.control.shares import WorkerPart, WorkerShare
from rlsync.engine import compat, compat_layers
from rlsync.engine.infos import InitInfo, UpdateInfo
from rlsync.engine.inlet import Inlet
from rlsync.engine.intake import Intake, take_stock
from rlsync.engine.pull import Pull
from rlsync.engine.sinks import Sink
from rlsync.engine.state import state_hashes
from rlsync.engine.verifier import MismatchError, Verifier
from rlsync.errors import RlsyncError, WeightSyncError

_log = logging.getLogger(__name__)

# The coordinator's deadline names the culprit; the worker's own is for the case that the coordinator is gone.
GRACE_S = 2.0
# A link that breaks is often the echo of a fault that the coordinator names better; it is heard for so long first.
_ECHO_S = 1.0

T = TypeVar("T")


class Receiver(WeightTransferEngine):
    """vLLM's weight-transfer engine of backend ``rlsync``. One for each worker process.

    Args:
        open_inlet: makes the way in that a share names, given the deadline of the phases in seconds and the worker's device.
        domain: names the shared memory this process sees.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: Any,
        vllm_config: Any,
        device: torch.device,
        model: torch.nn.Module,
        *,
        open_inlet: Callable[[WorkerShare, float, torch.device], Inlet],
        domain: Callable[[], str],
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._open_inlet, self._domain = open_inlet, domain
        self._peer: Peer | None = None
        self._inlet: Inlet | None = None
        self._sink: Sink | None = None
        self._share: WorkerShare | None = None
        self._verifier: Verifier | None = None
        self._info: InitInfo | None = None
        self._version = -1
        self._comparison: Receiver | None = None
        self._is_comparison = False
        compat_layers.heal()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Dial home, say what this worker holds, and take the share that is made of it. Returns when all peers have done so."""
        with self._raising_once():
            if init_info.purpose == "inspect":
                self._tell_state(init_info)
            elif init_info.purpose == "compare":
                self._compare(init_info)
            else:
                self._connect(init_info)

    @contextlib.contextmanager
    def _raising_once(self) -> Iterator[None]:
        """A failure is everybody's, by way of the coordinator, and raised by one worker: see ``compat.is_read_last``."""
        try:
            yield
        except Exception:
            if compat.is_read_last(self.parallel_config):
                raise
            _log.exception("this worker leaves the sync; the last worker of the engine raises")

    def _connect(self, init_info: InitInfo) -> None:
        self.shutdown()
        self._info, self._version = init_info, -1
        peer = self._peer = Peer(init_info.endpoint, self._hello(init_info))
        try:
            catalogue = self._wait(m.Catalogue, 0, "the list of tensors")
            holder = f"engine {init_info.engine_id} worker {compat.worker_place(self.parallel_config)[1]}"
            with compat.config_scope(self.vllm_config):
                compare = init_info.purpose == "compare"
                intake = take_stock(self.model, self.model_config, holder, catalogue.tensors, catalogue.sink, compare)
            peer.send(intake.record)
            self._attach_share(intake, self._wait(m.Share, 0, "this worker's share of the plan").worker)
            peer.send(m.Attached())
            self._prepare(self._wait(m.Connected, 0, "all peers to connect").loans)
        except Exception as error:
            if not isinstance(error, WeightSyncError):
                peer.send(m.Failed(attempt=0, phase="connect", cause=_cause(error)))
            self.shutdown()
            raise

    def _tell_state(self, info: InitInfo) -> None:
        peer = Peer(info.endpoint, self._hello(info))
        with compat.config_scope(self.vllm_config):
            peer.send(m.State(state_hashes(self.model)))
        peer.close()

    def _compare(self, info: InitInfo) -> None:
        """In a receiver of its own, so that a connection that there is goes on."""
        if info.attempt == 0:
            twin = self._comparison = Receiver(
                self.config, self.vllm_config, self.device, self.model, open_inlet=self._open_inlet, domain=self._domain
            )
            twin._is_comparison = True
            twin._connect(info)
        elif self._comparison is not None:
            twin, self._comparison = self._comparison, None
            try:
                twin._receive(UpdateInfo(version=0, attempt=info.attempt))
            finally:
                # The other side goes on to let the engine go, and has no use for a goodbye.
                twin.shutdown(with_goodbye=False)

    def _attach_share(self, intake: Intake, share: WorkerShare) -> None:
        assert self._info is not None
        inlet = self._inlet = self._open_inlet(share, self._info.timeout_s, self.device)
        self._until(lambda: inlet.join(0), 0, "all members of the group", lambda message: None, inlet)
        self._sink = intake.make_sink(tuple(part.segments for part in share.parts))
        self._share, self._verifier = share, Verifier(share)

    def _prepare(self, loans: Sequence[m.Lender]) -> None:
        """What every sync would do alike is done once."""
        assert self._share is not None and self._sink is not None and self._inlet is not None and self._verifier is not None
        self._inlet.borrow(loans)
        for bucket, buffers in self._standing().items():
            self._inlet.prepare(bucket, buffers)
            self._verifier.prepare(bucket, buffers)
        self._inlet.rest()

    def _standing(self) -> dict[int, Mapping[str, torch.Tensor]]:
        """By bucket, the buffers that are the same in every sync."""
        assert self._share is not None and self._sink is not None
        found = {bucket: self._sink.standing(bucket) for bucket, part in enumerate(self._share.parts) if part.nbytes}
        return {bucket: buffers for bucket, buffers in found.items() if buffers is not None}

    def start_weight_update(self) -> None:
        """Nothing: the reload begins when the actor's side is known to be there."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take part in one sync, up to and including its commit. The model has the version, or gives no answers until it has one."""
        with self._raising_once():
            self._receive(update_info)

    def _receive(self, update_info: UpdateInfo) -> None:
        if self._peer is None or self._sink is None or self._share is None or self._inlet is None or self._verifier is None:
            raise WeightSyncError(phase="begin", version=update_info.version, cause="this worker has no connection; call connect() first")
        sink, inlet, pull = self._sink, self._inlet, Pull(self._verifier, update_info.attempt)
        try:
            with compat.config_scope(self.vllm_config):
                self._peer.send(m.Joined(update_info.attempt, update_info.version))
                if update_info.version < self._version:
                    raise RuntimeError(f"version {update_info.version} is older than {self._version}, which this worker has committed")
                # No time of the bytes: everybody has to be there.
                self._await_ready(pull, -1, "the actor's side")
                self._until(lambda: inlet.join(pull.group), pull.attempt, "all members of the group", pull.hear, inlet)
                if not self._is_comparison:
                    compat.forbid_answers(self.model, f"its sync to version {update_info.version} did not complete")
                sink.open()
                pull.phase = "transfer"
                if inlet.lands_ahead:
                    inlet.expect(self._standing())
                for bucket, part in enumerate(self._share.parts):
                    pull.bucket = bucket
                    if not inlet.lands_ahead:
                        self._await_bucket(pull, bucket)
                    self._take(sink, inlet, pull, part)
                    self._peer.send(m.Done(update_info.attempt, bucket))
                with pull.timed("finalize"):
                    sink.close()
                    self._synchronize()
                    inlet.rest()
            self._peer.send(m.Loaded(update_info.attempt, pull.times(sink.peak_extra_bytes + inlet.extra_bytes), tuple(sink.differences)))
            pull.phase, pull.bucket = "commit", None
            self._wait(m.Commit, update_info.attempt, "the commit")
            self._version = update_info.version
            compat.allow_answers(self.model)
            self._peer.send(m.Committed(update_info.attempt))
        except BaseException as error:
            told = self._told_meanwhile(pull.attempt) if isinstance(error, ConnectionError) else None
            if told is None and not isinstance(error, WeightSyncError):
                phase = "verify" if isinstance(error, MismatchError) else pull.phase
                self._peer.send(m.Failed(update_info.attempt, phase, _cause(error), bucket=pull.bucket))
            inlet.abandon()
            sink.abandon()
            if told is not None:
                try:
                    raise told from error
                finally:
                    # Its traceback refers to this frame, and its cause to a group that has broken: a worker at rest collects no cycles.
                    del told
            raise

    def _told_meanwhile(self, attempt: int) -> WeightSyncError | None:
        """The error that the coordinator made everybody's, if it comes soon."""
        assert self._peer is not None
        deadline_s = time.monotonic() + _ECHO_S
        try:
            while True:
                self._peer.receive(attempt, deadline_s)
        except TimeoutError:
            return None
        except WeightSyncError as told:
            return told

    def _await_bucket(self, pull: Pull, bucket: int) -> None:
        with pull.timed("wait"):
            self._await_ready(pull, bucket, f"bucket {bucket}")

    def _await_ready(self, pull: Pull, bucket: int, what: str) -> None:
        while pull.buckets_ready <= bucket:
            pull.hear(self._wait(m.Ready, pull.attempt, what))

    def _take(self, sink: Sink, inlet: Inlet, pull: Pull, part: WorkerPart) -> None:
        bucket = pull.bucket
        assert bucket is not None
        if part.nbytes == 0:
            self._await_bucket(pull, bucket)
            return
        with pull.timed("pull"):
            inlet.borrow(pull.loans)
            pull.loans = ()
            what = f"the bytes of bucket {bucket}"
            arrival = self._until(lambda: inlet.fetch(bucket, pull.buckets_ready), pull.attempt, what, pull.hear, inlet)
            # What it sums up to is told when it is ready.
            self._await_bucket(pull, bucket)

            def landed(buffers: Mapping[str, torch.Tensor]) -> None:
                # Or the time of the copies would be counted as that of the checksums.
                self._synchronize()
                pull.verify(bucket, buffers)

            sink.write(bucket, arrival, landed)
            self._synchronize()

    def finish_weight_update(self) -> None:
        """Nothing: the version was committed inside the update."""

    def shutdown(self, *, with_goodbye: bool = True) -> None:
        """Leave the run and what brought its bytes. Idempotent."""
        if self._peer is not None:
            if with_goodbye:
                self._peer.send(m.Goodbye())
            self._peer.close()
        if self._inlet is not None:
            self._inlet.close()
        self._peer = self._inlet = self._sink = self._share = self._verifier = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract in vLLM 0.25; the actor's side is ``rlsync.sync.WeightSyncer``."""
        raise NotImplementedError("use rlsync.sync.WeightSyncer on the actor's side")

    def _synchronize(self) -> None:
        """Copies to a GPU must have happened before what they read is given back."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _wait(self, kind: type[Any], attempt: int, what: str) -> Any:
        """The next message of ``kind``; ``Ready`` says a level and may come again after the last bucket was taken."""
        found: list[Any] = []

        def hear(message: m.FromCoordinator) -> None:
            if isinstance(message, kind):
                found.append(message)
            elif not isinstance(message, m.Ready):
                raise RuntimeError(f"{type(message).__name__} came while waiting for {what}")

        return self._until(lambda: found.pop() if found else None, attempt, what, hear)

    def _until(self, poll: Callable[[], T | None], attempt: int, what: str, hear: Callable[[Any], None], inlet: Inlet | None = None) -> T:
        """What ``poll`` gives; it is asked again after each message, which ``hear`` gets, and whenever ``inlet`` has news."""
        assert self._peer is not None and self._info is not None
        limit_s = self._info.timeout_s + GRACE_S
        deadline_s = time.monotonic() + limit_s
        while (result := poll()) is None:
            try:
                message = self._peer.receive(attempt, deadline_s, None if inlet is None else inlet.fd)
            except TimeoutError:
                raise RuntimeError(f"nothing from {self._info.endpoint} within {limit_s:g} s while waiting for {what}") from None
            if message is not None:
                hear(message)
        return result

    def _hello(self, info: InitInfo) -> m.WorkerHello:
        dp_index, worker_rank, world_size = compat.worker_place(self.parallel_config)
        return m.WorkerHello(
            token=info.token,
            run_id=info.run_id,
            engine_id=info.engine_id,
            dp_index=dp_index,
            worker_rank=worker_rank,
            world_size=world_size,
            host=socket.gethostname(),
            shm_domain=self._domain(),
            pid_domain=pid_domain(),
            pid=os.getpid(),
            gpu_uuid=compat.gpu_uuid(self.device),
            vllm_version=compat.vllm_version(),
        )


def _cause(error: BaseException) -> str:
    """What the other side shows: the sentence of an error of ours, the whole traceback of any other."""
    return m.shortened(str(error) if isinstance(error, RlsyncError) else "".join(traceback.format_exception(error)).strip())
