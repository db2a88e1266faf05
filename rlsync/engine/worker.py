"""The weight-transfer engine inside each worker: dials home, says what it holds, pulls buckets into a sink, verifies them.

Owns the order of a sync in a worker. Knows no socket and no transport. A blocked worker blocks its whole engine, so it waits for
nothing but through its ``Line``, which keeps the deadlines.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from rlsync.coordinator import messages as m
from rlsync.engine import compat, compat_faults, compat_features
from rlsync.engine.infos import InitInfo, UpdateInfo
from rlsync.engine.intake import Intake, take_stock
from rlsync.engine.line import Line
from rlsync.engine.pull import Pull
from rlsync.engine.sinks import Sink
from rlsync.engine.state import state_hashes
from rlsync.engine.verifier import MismatchError, Verifier
from rlsync.errors import WeightSyncError
from rlsync.plan.packing import PackedPart
from rlsync.transport.ends import Arrival, Receiver, make_receiver

_log = logging.getLogger(__name__)


class RlsyncTransferEngine(WeightTransferEngine):
    """vLLM's weight-transfer engine of backend ``rlsync``. One for each worker process; vLLM makes it when a model is loaded."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._line: Line | None = None
        self._receiver: Receiver | None = None
        self._sink: Sink | None = None
        self._assignment: m.WorkerAssignment | None = None
        self._verifier: Verifier | None = None
        self._version = -1
        self._comparison: RlsyncTransferEngine | None = None
        self._is_comparison = False
        # Whether all buckets land where they belong for good.
        self._is_direct = False
        compat_faults.heal()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Dial home, say what this worker holds, and take the assignment that is made of it. Returns when all peers have done so."""
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
        self._version = -1
        line = self._line = self._dial(init_info)
        try:
            compat_features.check(self.vllm_config)
            manifest = line.next(m.Manifest, 0, "the list of tensors")
            holder = f"engine {init_info.engine_id} worker {compat.worker_place(self.parallel_config)[1]}"
            with compat.config_scope(self.vllm_config):
                compare = init_info.purpose == "compare"
                intake = take_stock(self.model, self.model_config, holder, manifest.tensors, manifest.sink, compare)
            line.send(intake.record)
            self._attach(intake, line.next(m.Assignment, 0, "this worker's assignment").worker)
            line.send(m.Attached())
            self._prepare(line.next(m.Connected, 0, "all peers to connect").exports)
        except Exception as error:
            if not isinstance(error, WeightSyncError):
                line.tell_failure(error, 0, "connect")
            self.shutdown()
            raise

    def _tell_state(self, info: InitInfo) -> None:
        line = self._dial(info)
        with compat.config_scope(self.vllm_config):
            line.send(m.State(state_hashes(self.model)))
        line.close()

    def _dial(self, info: InitInfo) -> Line:
        return Line(info, self.parallel_config, self.device)

    def _compare(self, info: InitInfo) -> None:
        """In a transfer engine of its own, so that a connection that there is goes on."""
        if info.attempt == 0:
            twin = self._comparison = RlsyncTransferEngine(self.config, self.vllm_config, self.device, self.model)
            twin._is_comparison = True
            twin._connect(info)
        elif self._comparison is not None:
            twin, self._comparison = self._comparison, None
            try:
                twin._receive(UpdateInfo(version=0, attempt=info.attempt))
            finally:
                # The other side goes on to let the engine go, and has no use for a goodbye.
                twin.shutdown(with_goodbye=False)

    def _attach(self, intake: Intake, assignment: m.WorkerAssignment) -> None:
        assert self._line is not None
        receiver = self._receiver = make_receiver(assignment, self._line.timeout_s, self.device)
        self._line.until(lambda: receiver.join(0), 0, "all members of the group", lambda message: None, receiver)
        self._sink = intake.make_sink(tuple(part.segments for part in assignment.parts))
        self._assignment, self._verifier = assignment, Verifier(assignment)

    def _prepare(self, exports: Sequence[m.RankExport]) -> None:
        """What every sync would do alike is done once."""
        assert self._assignment is not None and self._sink is not None and self._receiver is not None and self._verifier is not None
        standing = self._standing()
        self._is_direct = len(standing) == sum(part.nbytes > 0 for part in self._assignment.parts)
        self._receiver.prepare(standing, exports)
        for bucket, buffers in standing.items():
            self._verifier.prepare(bucket, buffers)

    def _standing(self) -> dict[int, Mapping[str, torch.Tensor]]:
        """By bucket, the buffers that are the same in every sync."""
        assert self._assignment is not None and self._sink is not None
        found = {bucket: self._sink.standing(bucket) for bucket, part in enumerate(self._assignment.parts) if part.nbytes}
        return {bucket: buffers for bucket, buffers in found.items() if buffers is not None}

    def start_weight_update(self) -> None:
        """Nothing: the reload begins when the actor's side is known to be there."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take part in one sync, up to and including its commit. The model has the version, or gives no answers until it has one."""
        with self._raising_once():
            self._receive(update_info)

    def _receive(self, update_info: UpdateInfo) -> None:
        if self._line is None or self._sink is None or self._assignment is None or self._receiver is None or self._verifier is None:
            raise WeightSyncError(phase="begin", version=update_info.version, cause="this worker has no connection; call connect() first")
        line, sink, receiver, pull = self._line, self._sink, self._receiver, Pull(self._verifier, update_info.attempt)
        try:
            with compat.config_scope(self.vllm_config):
                line.send(m.Joined(update_info.attempt, update_info.version))
                if update_info.version < self._version:
                    raise RuntimeError(f"version {update_info.version} is older than {self._version}, which this worker has committed")
                # No time of the bytes: everybody has to be there.
                _await_ready(line, pull, -1, "the actor's side")
                line.until(lambda: receiver.join(pull.group), pull.attempt, "all members of the group", pull.hear, receiver)
                _log.debug("version %d: everybody is there", update_info.version)
                if not self._is_comparison:
                    compat.forbid_answers(self.model, f"its sync to version {update_info.version} did not complete")
                sink.open()
                pull.phase = "transfer"
                with contextlib.ExitStack() as receiving:
                    receiving.enter_context(receiver.receiving(self._standing()))
                    self._take_all(line, sink, receiver, pull, update_info.version)
                    with pull.timed("finalize"):
                        sink.close()
                        self._synchronize()
                        receiving.close()
            line.send(m.Loaded(update_info.attempt, pull.times(sink.peak_extra_bytes + receiver.extra_bytes), tuple(sink.differences)))
            pull.phase, pull.bucket = "commit", None
            line.next(m.Commit, update_info.attempt, "the commit")
            self._version = update_info.version
            compat.allow_answers(self.model)
            line.send(m.Committed(update_info.attempt))
            _log.debug("version %d: committed", update_info.version)
        except BaseException as error:
            told = line.told_meanwhile(pull.attempt) if isinstance(error, ConnectionError) else None
            if told is None and not isinstance(error, WeightSyncError):
                phase = "verify" if isinstance(error, MismatchError) else pull.phase
                line.tell_failure(error, update_info.attempt, phase, pull.bucket)
            receiver.abandon()
            sink.abandon()
            if told is not None:
                try:
                    raise told from error
                finally:
                    # Its traceback refers to this frame, and its cause to a group that has broken: a worker at rest collects no cycles.
                    del told
            raise

    def _take_all(self, line: Line, sink: Sink, receiver: Receiver, pull: Pull, version: int) -> None:
        """Bucket after bucket, until all of them are where they belong and verified."""
        assert self._assignment is not None
        parts = self._assignment.parts
        for bucket, part in enumerate(parts):
            pull.bucket = bucket
            if not receiver.lands_ahead:
                _await_bucket(line, pull, bucket)
            self._take(line, sink, receiver, pull, part)
            _log.debug("version %d: bucket %d of %d is in place, %d B", version, bucket, len(parts), part.nbytes)
        if not self._is_direct:
            # What the sink has enqueued behind the sums of the last bucket is no time of verifying.
            with pull.timed("pull"):
                self._synchronize()
        pull.conclude()
        _log.debug("version %d: all of it is verified", version)

    def _take(self, line: Line, sink: Sink, receiver: Receiver, pull: Pull, part: PackedPart) -> None:
        bucket = pull.bucket
        assert bucket is not None
        if part.nbytes == 0:
            _await_bucket(line, pull, bucket)
            line.send(m.Done(pull.attempt, bucket))
            return
        with pull.timed("pull"):

            def fetch() -> Arrival | None:
                exports, pull.exports = pull.exports, ()
                return receiver.fetch(bucket, pull.buckets_ready, exports)

            arrival = line.until(fetch, pull.attempt, f"the bytes of bucket {bucket}", pull.hear, receiver)
            # Checksums arrive with Ready.
            _await_bucket(line, pull, bucket)

            def landed(buffers: Mapping[str, torch.Tensor]) -> None:
                # Where it came from may be filled anew as soon as nothing is read there, while it is verified and made use of here.
                if self.device.type == "cuda":
                    copied = torch.cuda.current_stream(self.device).record_event()
                    pull.verify(bucket, buffers)
                    copied.synchronize()
                    line.send(m.Done(pull.attempt, bucket))
                else:
                    line.send(m.Done(pull.attempt, bucket))
                    pull.verify(bucket, buffers)

            sink.write(bucket, arrival, landed)

    def finish_weight_update(self) -> None:
        """Nothing: the version was committed inside the update."""

    def shutdown(self, *, with_goodbye: bool = True) -> None:
        """Leave the run and what brought its bytes. Idempotent."""
        if self._line is not None:
            if with_goodbye:
                self._line.send(m.Goodbye())
            self._line.close()
        if self._receiver is not None:
            self._receiver.close()
        self._line = self._receiver = self._sink = self._assignment = self._verifier = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract in vLLM 0.25; the actor's side is ``rlsync.sync.WeightSyncer``."""
        raise NotImplementedError("use rlsync.sync.WeightSyncer on the actor's side")

    def _synchronize(self) -> None:
        """Copies to a GPU must have happened before what they read is given back."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _await_bucket(line: Line, pull: Pull, bucket: int) -> None:
    with pull.timed("wait"):
        _await_ready(line, pull, bucket, f"bucket {bucket}")


def _await_ready(line: Line, pull: Pull, bucket: int, what: str) -> None:
    while pull.buckets_ready <= bucket:
        pull.hear(line.next(m.Ready, pull.attempt, what))
