"""The weight-transfer engine inside each worker: dials home, has what it holds recorded, pulls buckets into a sink, verifies them, and
commits.

Owns the order of a sync in a worker. Knows no socket and no transport. A blocked worker blocks its whole engine, so it waits for nothing
but through its ``CoordinatorClient``, which keeps the deadlines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from rlsync.coordinator import messages as m
from rlsync.coordinator.client import GRACE_S, Peer, pid_domain
from rlsync.copy.cuda import compile_ahead
from rlsync.engine.adapters import AdapterSlots
from rlsync.engine.compat import engine as compat
from rlsync.engine.compat import features, lora, patches
from rlsync.engine.pull import MismatchError, Pull, Standing, Verifier
from rlsync.engine.recorded_layout import RecordedLayout, record_layout
from rlsync.engine.recorder import LastRecording
from rlsync.engine.sinks import Sink
from rlsync.engine.state import state_hashes
from rlsync.errors import RlsyncError, WeightSyncError, error_text
from rlsync.gc_pause import gc_paused
from rlsync.plan.packing import PackedPart
from rlsync.plan.transports import TRANSPORTS
from rlsync.transport.ends import Arrival, Receiver, make_receiver
from rlsync.transport.shm import shm_domain

_log = logging.getLogger(__name__)

# A broken connection is often the consequence of a fault that the coordinator names; its error is awaited for so long.
_ECHO_S = 1.0

T = TypeVar("T")


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Arguments of vLLM's ``init_weight_transfer_engine``.

    Attributes:
        endpoint: of the coordinator, as ``tcp://127.0.0.1:41321``.
        token, run_id: secret and name of the run, which the coordinator compares.
        engine_id: as the handle on rank 0 calls this engine.
        timeout_s: deadline of each phase.
        purpose: ``sync`` to be synced; ``inspect`` to send hashes of all that the engine computes from; ``compare`` to find out what a sync
            would change. The last two change nothing in the engine, nor in a connection that it has.
        attempt: of a comparison 0 to connect, and 1 to compare.
        serves_adapters: whether the handle routes requests to the adapters that a sync brings.
    """

    endpoint: str
    token: str
    run_id: str
    engine_id: str
    timeout_s: float
    purpose: str = "sync"
    attempt: int = 0
    serves_adapters: bool = False


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Arguments of vLLM's ``update_weights``: which sync to join. Names, shapes and destinations were agreed on at connect.

    Attributes:
        version: to commit.
        attempt: number of this sync since connect, from 1.
        adapter_id: where adapters are synced, vLLM's ``lora_int_id`` of this version, greater than all before; a server gives it another
            number when it loads them (``find_adapter``).
        adapters_in_use: ids of adapters that running requests compute with; their slots are not overwritten.
    """

    version: int
    attempt: int
    adapter_id: int = 0
    adapters_in_use: Sequence[int] = ()


class RlsyncTransferEngine(WeightTransferEngine):
    """vLLM's weight-transfer engine of backend ``rlsync``. One for each worker process; vLLM makes it when a model is loaded."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._client: CoordinatorClient | None = None
        self._receiver: Receiver | None = None
        self._sink: Sink | None = None
        self._assignment: m.WorkerAssignment | None = None
        self._verifier: Verifier | None = None
        self._version = -1
        self._comparison: RlsyncTransferEngine | None = None
        self._is_comparison = False
        # Whether all buckets land in the memory that the engine computes with.
        self._is_direct = False
        self._adapters: AdapterSlots | None = None
        self._syncs_adapters = False
        self._last = LastRecording()
        patches.apply()
        with compat.config_scope(vllm_config):
            patches.restore_constants(model, vllm_config)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to the coordinator, report the recorded layout, take the assignment. Returns when all peers have done so."""
        with self._raising_once():
            if init_info.purpose == "inspect":
                self._report_state(init_info)
            elif init_info.purpose == "compare":
                self._compare(init_info)
            else:
                self._connect(init_info)

    @contextlib.contextmanager
    def _raising_once(self) -> Iterator[None]:
        """The coordinator reports a failure to all peers; one worker of the engine raises it: see ``compat.is_read_last``."""
        try:
            yield
        except Exception:
            if compat.is_read_last(self.parallel_config):
                raise
            _log.exception("this worker leaves the sync; the last worker of the engine raises")

    @gc_paused()
    def _connect(self, init_info: InitInfo) -> None:
        former: Receiver | None = None
        if self._assignment is not None and TRANSPORTS[self._assignment.transport].is_grouped:
            # Its group takes its time to end; nothing is written here before that has been waited for. Mapped memory, which may be a
            # whole actor's, goes at once.
            former, self._receiver = self._receiver, None
        if former is not None:
            former.abandon()
        try:
            self.shutdown()
            self._version = -1
            self._meet(init_info, former)
        finally:
            if former is not None:
                former.close()

    def _meet(self, init_info: InitInfo, former: Receiver | None) -> None:
        """Connect, and close ``former`` before anything can be written."""
        client = self._client = self._dial(init_info)
        if self.device.type == "cuda":
            # While loaders are recorded and the actor plans.
            compile_ahead(self.device)
        try:
            manifest = client.next(m.Manifest, 0, "the list of tensors")
            adapter, compare = manifest.adapter, init_info.purpose == "compare"
            r = None if adapter is None else adapter.r
            # What lies beside a base that is compared is left as it is.
            unfit = () if compare else features.against_adapters(self.vllm_config, r, serves_adapters=init_info.serves_adapters)
            features.check(self.vllm_config, unfit)
            holder = str(client.hello)
            self._syncs_adapters = adapter is not None
            if adapter is not None and self._adapters is None:
                self._adapters = AdapterSlots(self.model)
            with lora.base_layers(self.model):
                with compat.config_scope(self.vllm_config):
                    layout = record_layout(self.model, self.model_config, holder, manifest, compare, self._adapters, self._last.record)
                client.send(layout.record)
                assignment = client.next(m.Assignment, 0, "this worker's assignment").worker
                if former is not None:
                    former.close()
                self._attach(layout, assignment)
            client.send(m.Attached())
            self._prepare(client.next(m.Connected, 0, "all peers to connect").exports)
        except Exception as error:
            if not isinstance(error, WeightSyncError):
                client.report_failure(error, 0, "connect")
            self.shutdown()
            raise

    def _report_state(self, info: InitInfo) -> None:
        client = self._dial(info)
        try:
            with compat.config_scope(self.vllm_config):
                client.send(m.State(state_hashes(self.model)))
        finally:
            client.close()

    def _dial(self, info: InitInfo) -> CoordinatorClient:
        return CoordinatorClient(info, self.parallel_config, self.device)

    def _compare(self, info: InitInfo) -> None:
        """Compare in a second transfer engine, so that an existing connection stays usable."""
        if info.attempt == 0:
            self._leave_comparison()
            twin = RlsyncTransferEngine(self.config, self.vllm_config, self.device, self.model)
            twin._is_comparison, twin._last = True, self._last
            twin._connect(info)
            self._comparison = twin
        elif self._comparison is not None:
            twin, self._comparison = self._comparison, None
            try:
                twin._receive(UpdateInfo(version=0, attempt=info.attempt))
            finally:
                # The other side goes on to let the engine go, and has no use for a goodbye.
                twin.shutdown(with_goodbye=False)

    def _leave_comparison(self) -> None:
        """End one whose other side connected and went on no further: it would keep its memory and its connection."""
        twin, self._comparison = self._comparison, None
        if twin is not None:
            twin.shutdown()

    def _attach(self, layout: RecordedLayout, assignment: m.WorkerAssignment) -> None:
        assert self._client is not None
        receiver = self._receiver = make_receiver(assignment, self._client.timeout_s, self.device)
        self._client.until(lambda: receiver.join(0), 0, "all members of the group", lambda message: None, receiver)
        self._sink = layout.make_sink(tuple(part.segments for part in assignment.parts))
        self._assignment, self._verifier = assignment, Verifier(assignment)

    def _prepare(self, exports: Sequence[m.RankExport]) -> None:
        """Prepare receiver and checksums for buffers that are the same in every sync."""
        assert self._assignment is not None and self._sink is not None and self._receiver is not None and self._verifier is not None
        standing = self._standing()
        self._is_direct = len(standing) == sum(part.nbytes > 0 for part in self._assignment.parts)
        self._receiver.prepare(standing, exports)
        for bucket, buffers in standing.items():
            self._verifier.prepare(bucket, buffers)
        self._verifier.prepare_frozen(standing)

    def _standing(self) -> dict[int, Mapping[str, torch.Tensor]]:
        """Bucket -> its buffers, for buckets whose buffers are the same in every sync."""
        assert self._assignment is not None and self._sink is not None
        found = {bucket: self._sink.standing(bucket) for bucket, part in enumerate(self._assignment.parts) if part.nbytes}
        return {bucket: buffers for bucket, buffers in found.items() if buffers is not None}

    def start_weight_update(self) -> None:
        """Nothing: the reload begins when the actor's side is known to be there."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take part in one sync; returns when every worker of every engine has committed. After an error the model refuses to compute until
        a later sync commits."""
        with self._raising_once():
            self._receive(update_info)

    def _receive(self, update_info: UpdateInfo) -> None:
        if self._client is None or self._sink is None or self._assignment is None or self._receiver is None or self._verifier is None:
            raise WeightSyncError(phase="begin", version=update_info.version, cause="this worker has no connection; call connect() first")
        client, sink, receiver, pull = self._client, self._sink, self._receiver, Pull(self._verifier, update_info.attempt)
        try:
            with compat.config_scope(self.vllm_config), lora.base_layers(self.model):
                client.send(m.Joined(update_info.attempt, update_info.version))
                if update_info.version < self._version:
                    raise RlsyncError(f"version {update_info.version} is older than {self._version}, which this worker has committed")
                # Looked at once, while others join: nothing else runs in this process until the bytes have landed.
                standing = self._standing()
                # Not counted as waiting for bytes: all peers have to join first.
                _await_ready(client, pull, -1, "the actor's side")
                client.until(lambda: receiver.join(pull.group), pull.attempt, "all members of the group", pull.hear, receiver)
                _log.debug("version %d: all peers have joined", update_info.version)
                if not self._is_comparison:
                    compat.forbid_answers(self.model, f"its sync to version {update_info.version} did not complete")
                sink.open(standing)
                pull.phase = "transfer"
                with contextlib.ExitStack() as receiving:
                    num_held = self._assignment.num_frozen if pull.without_frozen else 0
                    receiving.enter_context(receiver.receiving(standing, num_held))
                    if num_held:
                        _hold(client, pull, standing, num_held)
                    self._take_all(client, sink, receiver, pull, num_held, update_info.version)
                    with pull.timed("finalize"):
                        if self._adapters is not None and self._syncs_adapters:
                            self._adapters.fill(update_info.adapter_id, update_info.adapters_in_use)
                        self._synchronize()
                        receiving.close()
            client.send(m.Loaded(update_info.attempt, pull.times(sink.peak_extra_bytes + receiver.extra_bytes), tuple(sink.differences)))
            pull.phase, pull.bucket = "commit", None
            client.next(m.Commit, update_info.attempt, "the commit")
            self._version = update_info.version
            if self._adapters is not None and self._syncs_adapters:
                self._adapters.commit()
            client.send(m.Committed(update_info.attempt))
            # Whoever drives the engine resumes it as soon as this returns, and no engine serves before all have committed.
            client.next(m.Serve, update_info.attempt, "all workers to commit")
            compat.allow_answers(self.model)
            _log.debug("version %d: committed", update_info.version)
        except BaseException as error:
            reported = client.error_meanwhile(pull.attempt) if isinstance(error, ConnectionError) else None
            if reported is None and not isinstance(error, WeightSyncError):
                phase = "verify" if isinstance(error, MismatchError) else pull.phase
                client.report_failure(error, update_info.attempt, phase, pull.bucket)
            receiver.abandon()
            sink.abandon()
            if reported is not None:
                try:
                    raise reported from error
                finally:
                    # Its traceback refers to this frame, and its cause to a group that has broken: a worker at rest collects no cycles.
                    del reported
            raise

    def _take_all(self, client: CoordinatorClient, sink: Sink, receiver: Receiver, pull: Pull, first: int, version: int) -> None:
        """Write all buckets from the first on that is sent, in order, complete the model, and verify what was written."""
        assert self._assignment is not None
        parts, is_complete = self._assignment.parts, False

        def complete() -> None:
            nonlocal is_complete
            with pull.timed("finalize"):
                sink.close()
            is_complete = True

        for bucket, part in enumerate(parts[first:], first):
            pull.bucket = bucket
            if not receiver.lands_ahead:
                _await_bucket(client, pull, bucket)
            # Nobody waits for the last slot: where copies write live memory, the model is completed behind them before they are waited for.
            is_last = bucket == len(parts) - 1
            self._take(client, sink, receiver, pull, part, complete if is_last and self._is_direct else None)
            _log.debug("version %d: bucket %d of %d is in place, %d B", version, bucket, len(parts), part.nbytes)
        if not self._is_direct:
            # Kernels that the sink has enqueued behind the last checksums are not counted as verification.
            with pull.timed("pull"):
                self._synchronize()
        with pull.timed("wait"):
            while pull.buckets_summed < len(parts):
                pull.hear(client.next(m.Ready, pull.attempt, "the checksums that were sent"))
        pull.conclude()
        _log.debug("version %d: all of it is verified", version)
        if not is_complete:
            complete()

    def _take(
        self, client: CoordinatorClient, sink: Sink, receiver: Receiver, pull: Pull, part: PackedPart, behind: Callable[[], None] | None
    ) -> None:
        """Write one bucket, with ``behind`` called when everything is enqueued, where it is given, and say that its slot is free."""
        bucket = pull.bucket
        assert bucket is not None
        if part.nbytes == 0:
            _await_bucket(client, pull, bucket)
            client.send(m.Done(pull.attempt, bucket))
            return
        with pull.timed("pull"):

            def fetch() -> Arrival | None:
                exports, pull.exports = pull.exports, ()
                return receiver.fetch(bucket, pull.buckets_ready, exports)

            arrival = client.until(fetch, pull.attempt, f"the bytes of bucket {bucket}", pull.hear, receiver)
            _await_bucket(client, pull, bucket)

            def landed(buffers: Mapping[str, torch.Tensor]) -> None:
                # The sender may refill its slot once the copy has read it, while the copied bytes are verified and post-processed here.
                if self.device.type == "cuda":
                    copied = torch.cuda.current_stream(self.device).record_event()
                    pull.verify(bucket, buffers)
                    if behind is not None:
                        behind()
                    copied.synchronize()
                    client.send(m.Done(pull.attempt, bucket))
                else:
                    client.send(m.Done(pull.attempt, bucket))
                    pull.verify(bucket, buffers)

            sink.write(bucket, arrival, landed)

    def finish_weight_update(self) -> None:
        """Nothing: the version was committed inside the update."""

    def keep_adapters(self) -> None:
        """Called when vLLM has ended an update, and with it forgotten every adapter: those of this worker's slots are still there."""
        if self._adapters is not None:
            self._adapters.register()

    def find_adapter(self, lora_request: Any) -> bool:
        """Called when vLLM is to load adapters: whether a sync has brought them. vLLM calls them by the request's number from now on.

        Raises RlsyncError where no slot has them, and for those of a folder, which would take a slot from a version.
        """
        number = lora.synced_number(lora_request)
        if number is None and not self._syncs_adapters:
            return False
        with self._raising_once():
            if number is None or self._adapters is None:
                raise RlsyncError(
                    f"{lora_request.lora_path!r} does not come by a sync, as adapters of this engine do; load it into another engine"
                )
            self._adapters.rename(number, lora_request.lora_int_id)
        return True

    def shutdown(self, *, with_goodbye: bool = True) -> None:
        """Leave the run: close the channel and the receiver, those of a comparison too. Idempotent."""
        self._leave_comparison()
        if self._client is not None:
            if with_goodbye:
                self._client.send(m.Goodbye())
            self._client.close()
        if self._receiver is not None:
            self._receiver.close()
        self._client = self._receiver = self._sink = self._assignment = self._verifier = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract in vLLM 0.25; the actor's side is ``rlsync.sync.WeightSyncer``."""
        raise NotImplementedError("use rlsync.sync.WeightSyncer on the actor's side")

    def _synchronize(self) -> None:
        """Wait for copies on the GPU before the memory that they read is released."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _hold(client: CoordinatorClient, pull: Pull, standing: Standing, count: int) -> None:
    """Verify the first ``count`` buckets, which are not sent, where they are."""
    pull.bucket = count - 1
    pull.verify_held(standing)
    _await_bucket(client, pull, count - 1)
    client.send(m.Done(pull.attempt, count - 1))


def _await_bucket(client: CoordinatorClient, pull: Pull, bucket: int) -> None:
    with pull.timed("wait"):
        _await_ready(client, pull, bucket, f"bucket {bucket}")


def _await_ready(client: CoordinatorClient, pull: Pull, bucket: int, what: str) -> None:
    while pull.buckets_ready <= bucket:
        pull.hear(client.next(m.Ready, pull.attempt, what))


# The channel.


class CoordinatorClient:
    """One connection of a worker. Dials when it is made; not thread-safe.

    Args:
        info: where to dial, for which run and engine, and the deadline of a phase.
        parallel_config: vLLM's, which knows this worker's place in its engine.
    """

    def __init__(self, info: InitInfo, parallel_config: Any, device: torch.device) -> None:
        self.timeout_s = info.timeout_s
        self._endpoint = info.endpoint
        self.hello = _hello(info, parallel_config, device)
        self._peer = Peer(info.endpoint, self.hello)

    def send(self, message: m.FromPeer) -> None:
        """Queue a message; never blocks."""
        self._peer.send(message)

    def report_failure(self, error: BaseException, attempt: int, phase: str, bucket: int | None = None) -> None:
        """Report a failure of this worker to the coordinator, which tells all peers."""
        self._peer.send(m.Failed(attempt, phase, error_text(error), bucket=bucket))

    def next(self, kind: type[Any], attempt: int, what: str) -> Any:
        """The next message of ``kind``; ``Ready`` says a level and may come again after the last bucket was taken.

        Raises WeightSyncError when the coordinator says so, RlsyncError where nothing comes in time, RuntimeError for a message that
        nobody asked for.
        """
        found: list[Any] = []

        def hear(message: m.FromCoordinator) -> None:
            if isinstance(message, kind):
                found.append(message)
            elif not isinstance(message, m.Ready):
                raise RuntimeError(f"{type(message).__name__} came while waiting for {what}")

        return self.until(lambda: found.pop() if found else None, attempt, what, hear)

    def until(
        self, poll: Callable[[], T | None], attempt: int, what: str, hear: Callable[[Any], None], receiver: Receiver | None = None
    ) -> T:
        """What ``poll`` gives; it is asked again after each message, which ``hear`` gets, and whenever ``receiver`` has news.

        Raises as ``next`` does.
        """
        limit_s = self.timeout_s + GRACE_S
        deadline_s = time.monotonic() + limit_s
        while (result := poll()) is None:
            try:
                message = self._peer.receive(attempt, deadline_s, None if receiver is None else receiver.fd)
            except TimeoutError:
                raise RlsyncError(f"nothing from {self._endpoint} within {limit_s:g} s while waiting for {what}") from None
            if message is not None:
                hear(message)
        return result

    def error_meanwhile(self, attempt: int) -> WeightSyncError | None:
        """The error that the coordinator has sent to all peers, if it arrives soon."""
        deadline_s = time.monotonic() + _ECHO_S
        try:
            while True:
                self._peer.receive(attempt, deadline_s)
        except TimeoutError:
            return None
        except WeightSyncError as told:
            return told

    def close(self) -> None:
        """Close the connection; queued messages are still sent. Idempotent."""
        self._peer.close()


def _hello(info: InitInfo, parallel_config: Any, device: torch.device) -> m.WorkerHello:
    dp_index, worker_rank, world_size = compat.worker_place(parallel_config)
    return m.WorkerHello(
        token=info.token,
        run_id=info.run_id,
        engine_id=info.engine_id,
        dp_index=dp_index,
        worker_rank=worker_rank,
        world_size=world_size,
        host=socket.gethostname(),
        shm_domain=shm_domain(),
        pid_domain=pid_domain(),
        pid=os.getpid(),
        gpu_uuid=compat.gpu_uuid(device),
        vllm_version=compat.vllm_version(),
    )
