"""An engine behind HTTP: the EngineHandle on a server that somebody else started as ``vllm serve``, and how the server is asked.

Owns connections and what is known of the server's state. Needs no vLLM, and never touches the server's process. The routes that drive a
sync exist where the server runs with VLLM_SERVER_DEV_MODE=1. They are the same from vLLM 0.25 to 0.33; what differs is said here, by
version.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from packaging.version import InvalidVersion, Version

from rlsync.engine.handles import Completion, PauseMode, PicturePrompt, Prompt, SyncOrder
from rlsync.engine.handles.adapters import SYNCED_PATH, AdapterRequests, Served
from rlsync.engine.handles.calls import Calls, Gate, sync_gated
from rlsync.engine.handles.prompts import Sampling, fields_of_each, plain_ids, seeds_of_each
from rlsync.errors import ConfigError, RlsyncError

_log = logging.getLogger(__name__)

# Fields of vllm.SamplingParams that the completions route takes under the same names, and their defaults. All are sent, because
# the server takes what is left out from the model's generation_config.json.
_SAMPLING: dict[str, Any] = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "max_tokens": 16,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop": [],
    "stop_token_ids": [],
    "logprobs": 0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "seed": None,
}
# These concern the text, which nobody looks at here.
_TEXT_FIELDS = frozenset({"detokenize", "skip_special_tokens", "spaces_between_special_tokens"})
_CLEANUP_S = 10.0
_FIRST_VERSION = Version("0.25")
_LABELS_VERSION = Version("0.27")  # the first that keeps the version given to finish_weight_update
_START = 'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend":"rlsync"}\''
_ROUTES = {
    "version": ("GET", "/version"),
    "world_size": ("GET", "/get_world_size"),
    "config": ("GET", "/server_info?config_format=json"),
    "is_paused": ("GET", "/is_paused"),
    "label": ("GET", "/weight_info"),
    "generate": ("POST", "/v1/completions"),
    "init": ("POST", "/init_weight_transfer_engine"),
    "start": ("POST", "/start_weight_update"),
    "update": ("POST", "/update_weights"),
    "finish": ("POST", "/finish_weight_update"),
    "pause": ("POST", "/pause"),
    "resume": ("POST", "/resume"),
    # Kept requests are preempted: their keys and values are computed again with the new weights.
    "prefix_cache": ("POST", "/reset_prefix_cache?reset_running_requests=true&reset_external=true"),
    "mm_cache": ("POST", "/reset_mm_cache"),
    "encoder_cache": ("POST", "/reset_encoder_cache"),
    "models": ("GET", "/v1/models"),
    "load_adapter": ("POST", "/v1/load_lora_adapter"),
    "unload_adapter": ("POST", "/v1/unload_lora_adapter"),
}
_MAX_REQUESTS = 512
_ERROR_CHARS = 4000
_POLL_S = 0.25


class HttpEngine:
    """Handle on one running ``vllm serve``. Methods block, are bounded by ``timeout_s`` and may be called from any thread.

    The server cannot refuse by itself. What keeps it from answering with weights of no committed version is that it is paused before
    the first byte and stays so until the sync is complete. A server found paused when the handle is made is ``dirty``.

    A server with ``--enable-lora`` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 takes the adapters of ``weight_sync.lora=adapter``. Each version
    is a model of the server with a name of its own, on which the requests of this handle run that begin while it is served.

    Args:
        url: ``http://host:port`` of the server.
        engine_id: names the engine in errors and metrics.
        api_key: what the server was given as ``--api-key``; appears in no error and no log.
        timeout_s: how long to wait for the server to be up.
        may_start_later: whether an address where nothing listens is asked again until then, or is an error at once.

    Attributes:
        num_workers: of the server, data-parallel replicas included.
        vllm_version: of the server.
        has_adapter_slots: whether it was started with ``--enable-lora``.

    Raises ConfigError where the server cannot be driven, and RlsyncError or TimeoutError where it does not answer in time.
    """

    def __init__(
        self, url: str, *, engine_id: str, api_key: str | None = None, timeout_s: float = 60.0, may_start_later: bool = True
    ) -> None:
        self.engine_id, self.num_workers, self.vllm_version, self.has_adapter_slots = engine_id, 0, "", False
        self._server = Server(f"engine {engine_id}", url, api_key)
        self._gate = Gate(engine_id, "it is not connected")
        self._calls = Calls(self._gate)
        self._may_answer = True  # for all that this handle has told the server
        self._cleanup: Future[None] | None = None
        self._adapters: AdapterRequests | None = None
        self._calls.start()
        try:
            self._calls.run(self._connect(timeout_s, may_start_later), None)
        except BaseException:
            self.close()
            raise

    @property
    def state(self) -> str:
        """``clean``, ``syncing`` or ``dirty``, as this handle knows it."""
        return self._gate.state

    @property
    def version(self) -> int | None:
        """Version that is served, or None for the weights of the server when the handle was made."""
        return self._gate.version

    async def _connect(self, timeout_s: float, may_start_later: bool) -> None:
        server = self._server
        self.vllm_version = await server.open(timeout_s, may_start_later)
        self.num_workers = int((await server.ask("world_size", timeout_s))["world_size"])
        info = await server.ask("config", timeout_s)
        config, environment = info["vllm_config"], info.get("vllm_env", {})
        self.has_adapter_slots = config.get("lora_config") is not None
        if self.has_adapter_slots and environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            # Numbers of a handle of before, to this server, were less.
            self._adapters = AdapterRequests(config["lora_config"]["max_loras"], after=time.time_ns() // 1000)
        if (await server.ask("is_paused", timeout_s))["is_paused"]:
            self._may_answer = False
            self._gate.shut("its server is paused: a sync of it did not complete, or somebody paused it")
        elif config["load_config"]["load_format"] == "dummy":
            self.mark_dirty("its server was started with load_format=dummy and has had no sync")
        else:
            self._gate.open()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Continue every prompt (token ids), ``sampling["n"]`` times each; waits while a sync is going on.

        Args:
            sampling: fields of ``vllm.SamplingParams``, the same of all prompts or a mapping for each, with vLLM's defaults whatever
                the model's generation config says.
            seeds: of each prompt.
            timeout_s: bound of the whole call, or None.

        Raises EngineDirtyError where the engine's last sync did not commit, also when that happens meanwhile, and where the server
        holds other weights than were synced to it; ConfigError for prompts that are no token ids, and for what the server's completions
        route does not know: other fields, and pictures. How many tokens the model has is not known here: of a server that runs with
        ``--skip-tokenizer-init`` an id beyond them ends the workers.
        """
        texts = [prompt for prompt in prompts if not isinstance(prompt, PicturePrompt)]
        if len(texts) < len(prompts):
            raise ConfigError(
                f"engine {self.engine_id}: the completions route of vLLM takes no pictures beside token ids; use Engine or RayEngine"
            )
        chosen = fields_of_each(self.engine_id, sampling, len(prompts))
        unknown = sorted({name for one in chosen for name in one} - _SAMPLING.keys() - _TEXT_FIELDS)
        if unknown:
            known = ", ".join(_SAMPLING)
            raise ConfigError(f"engine {self.engine_id}: no sampling field {', '.join(unknown)} over HTTP; known are {known}")
        self._gate.wait(timeout_s)
        self._check_label(timeout_s)
        given = seeds_of_each(self.engine_id, seeds, len(prompts))
        fields = [
            _SAMPLING | {name: value for name, value in one.items() if name in _SAMPLING} | ({} if seed is None else {"seed": seed})
            for one, seed in zip(chosen, given, strict=True)
        ]
        ids = [plain_ids(self.engine_id, prompt, None) for prompt in texts]
        requests = [self._generate_one(*each) for each in zip(ids, fields, strict=True)]
        try:
            return self._calls.run_requests(requests, timeout_s, probe=lambda: self._server.ask("is_paused", _CLEANUP_S))
        except UnreachableError as error:
            # When it is there again, it may be with the weights of its start.
            self.mark_dirty(str(error))
            raise
        except NoModelError as error:
            self.mark_dirty(f"its server was started again, or somebody unloaded its adapters: {error}")
            raise self._gate.refusal() from None

    async def _generate_one(self, prompt: list[int], fields: Mapping[str, Any]) -> tuple[Completion, ...]:
        body = {"prompt": prompt, "return_token_ids": True, "return_tokens_as_token_ids": True, **fields}
        if self._adapters is None:
            version = self._gate.version
            choices = await self._choices(body)
            return tuple(_completion(choice, version, self._gate.version) for choice in choices)
        while True:
            async with self._adapters.running() as served:
                try:
                    choices = await self._choices(body | ({"model": _model_of(served)} if served.adapter_id else {}))
                    return tuple(_completion(choice, served.version, served.version) for choice in choices)
                except NoModelError:
                    # It came to the server when a sync had unloaded its version already: it begins on the next.
                    if self._adapters.serves(served):
                        raise

    async def _choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        answer = await self._server.ask("generate", None, body=body)
        return sorted(answer["choices"], key=lambda choice: choice["index"])

    def _check_label(self, timeout_s: float | None) -> None:
        """Detect a server that was restarted behind the same address, and so has the weights of its start."""
        version = self._gate.version
        if version is None:
            return
        label = self._calls.run(self._server.label(_CLEANUP_S if timeout_s is None else timeout_s), None)
        # Another sync may have begun meanwhile, and then nothing is wrong.
        if label not in (None, str(version)) and self._gate.state == "clean" and self._gate.version == version:
            self.mark_dirty(f"its server holds weights {label!r} instead of version {version}: it was started again")
            raise self._gate.refusal()

    # EngineHandle.

    def init_weight_transfer(self, init_info: dict[str, Any], timeout_s: float) -> None:
        takes_slots = self._adapters is not None and init_info.get("purpose") != "compare"
        if takes_slots and (own := self._own_adapters(timeout_s)):
            raise ConfigError(
                f"engine {self.engine_id}: its server has adapters of its own ({', '.join(own)}), which take slots from those of a sync; "
                "start it without --lora-modules, or unload them"
            )
        self._run("init", timeout_s, body={"init_info": {**init_info, "serves_adapters": self._adapters is not None}})

    def _own_adapters(self, timeout_s: float) -> list[str]:
        models = self._run("models", timeout_s)["data"]
        return [model["id"] for model in models if model.get("parent") and not str(model["root"]).startswith(SYNCED_PATH)]

    def sync(self, order: SyncOrder) -> float:
        return sync_gated(self._gate, self, order, lambda: self.pause(order.pause_mode, order.sync, order.phase_s))

    def pause(self, mode: PauseMode, sync: str, timeout_s: float) -> None:
        # Without a word from the actor a sync that hangs is a sync that failed; three phases may follow the pause.
        self._gate.begin_sync(sync, 5 * timeout_s)
        self._calls.run(self._pause(mode, timeout_s), timeout_s)

    async def _pause(self, mode: PauseMode, timeout_s: float) -> None:
        limit_s = timeout_s / 2  # so that adapters say what they wait for, and not the deadline of the phase
        if self._adapters is not None:
            self._adapters.hold()
            if mode != "abort":
                # Requests that are kept, or wait in a queue, end on their own version, and none ends in a pause.
                await self._adapters.make_room(limit_s)
        # Requests that came to a paused server wait for its next complete sync; abort would end them unanswered.
        is_paused = (await self._server.ask("is_paused", timeout_s))["is_paused"]
        await self._server.ask("pause", timeout_s, query=f"?mode={'keep' if is_paused else mode}&clear_cache=false")
        self._may_answer = False
        if self._adapters is not None:
            await self._adapters.make_room(limit_s)

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        # vLLM has one session of an engine's weights: what is left of a failed sync would end that of the next.
        self._calls.run_in_turn(lambda: self._update(update_info, timeout_s), timeout_s)

    async def _update(self, update_info: dict[str, Any], timeout_s: float) -> None:
        server, info = self._server, dict(update_info)
        # What a version of adapters has computed has keys of its own; only a base that is sent leaves nothing of it true.
        keeps_caches = info.pop("keeps_caches", False)
        if self._adapters is not None:
            info |= {"adapter_id": self._adapters.next_id(), "adapters_in_use": self._adapters.in_use()}
        await server.ask("start", timeout_s)
        try:
            await server.ask("update", timeout_s, body={"update_info": info})
        except RlsyncError:
            # A worker that committed while another failed has the update open still.
            await self._finish_quietly()
            raise
        await server.ask("finish", timeout_s, body={"weight_version": str(update_info["version"])})
        if not (await server.ask("is_paused", timeout_s))["is_paused"]:
            self._may_answer = True
            cause = "was resumed by somebody in the midst of a sync; what it answered since may come from weights of two versions"
            raise RlsyncError(f"{server.name} {cause}")
        if self._adapters is not None:
            await self._name_adapters(Served(info["adapter_id"], info["version"]), timeout_s)
        if not keeps_caches:
            await self._reset_caches(timeout_s)

    async def _name_adapters(self, served: Served, timeout_s: float) -> None:
        """Make the adapters of a version a model of the server, and those of other versions no longer.

        No client begins a request on the latter from here on. Those that run end on it: its slot is that of the version after the next.
        """
        server, name = self._server, _model_of(served)
        await server.ask("load_adapter", timeout_s, body={"lora_name": name, "lora_path": f"{SYNCED_PATH}{served.adapter_id}"})
        for model in (await server.ask("models", timeout_s))["data"]:
            if str(model["root"]).startswith(SYNCED_PATH) and model["id"] != name:
                await server.ask("unload_adapter", timeout_s, body={"lora_name": model["id"]})

    async def _finish_quietly(self) -> None:
        try:
            await self._server.ask("finish", _CLEANUP_S)
        except (RlsyncError, TimeoutError) as error:
            _log.debug("there was no sync to finish: %s", error)

    async def _reset_caches(self, timeout_s: float) -> None:
        routes = ("prefix_cache", "mm_cache", "encoder_cache")
        cleared, *_ = await asyncio.gather(*(self._server.ask(route, timeout_s) for route in routes))
        if cleared.get("success") is False:
            raise RlsyncError(f"{self._server.name} could not reset its prefix cache: requests hold blocks of it")

    def resume(self, version: int | None, timeout_s: float, sync: str = "") -> None:
        """``EngineHandle.resume``. ``sync``: refused while another one is going on."""
        ticket = self._gate.ticket(sync)
        self._may_answer = True
        self._calls.run(self._resume(ticket, version, timeout_s), timeout_s)

    async def _resume(self, ticket: int, version: int | None, timeout_s: float) -> None:
        await self._server.ask("resume", timeout_s)
        self._gate.commit(ticket, version)
        if self._adapters is not None:
            self._adapters.serve(version)

    def mark_dirty(self, reason: str, sync: str = "") -> None:
        """Refuse to generate, for this reason, until a complete sync. A server that may still answer others is paused for it."""
        self._gate.shut(reason, sync)
        self._calls.end_requests()
        if self._may_answer and not self._calls.closed:
            self._may_answer = False
            self._cleanup = self._calls.spawn(self._pause_quietly())

    async def _pause_quietly(self) -> None:
        try:
            await self._server.ask("pause", _CLEANUP_S, query="?mode=abort&clear_cache=false")
        except (RlsyncError, TimeoutError) as error:
            _log.warning("engine %s is dirty, but its server could not be paused and may answer others: %s", self.engine_id, error)

    def close(self) -> None:
        """Close the connections; the server keeps its state. Idempotent."""
        if self._calls.closed:
            return
        self._gate.shut("its handle is closed")
        if self._cleanup is not None:
            self._cleanup.result()
        self._calls.run(self._disconnect(), None)
        self._calls.stop()

    async def _disconnect(self) -> None:
        self._calls.cancel_requests()
        await self._server.close()

    def _run(self, route: str, timeout_s: float, **what: Any) -> dict[str, Any]:
        return self._calls.run(self._server.ask(route, timeout_s, **what), timeout_s)


def _model_of(served: Served) -> str:
    """How the server calls the adapters of a version. The number is part of it, because a version that failed comes again."""
    return f"rlsync-{served.version}-{served.adapter_id}"


def _completion(choice: Mapping[str, Any], version: int | None, last_version: int | None) -> Completion:
    logprobs = () if choice["logprobs"] is None else tuple(choice["logprobs"]["token_logprobs"])
    return Completion(tuple(choice["token_ids"]), logprobs, choice["finish_reason"], version, last_version)


class UnreachableError(RlsyncError):
    """No server answers at this address."""


class NoModelError(RlsyncError):
    """The server has no model of the name that a request asks for."""


class Server:
    """Asks one server. Coroutines, all for the same event loop.

    Args:
        name: how errors call it.
        url: ``http://host:port``.
        api_key: what it was given as ``--api-key``; appears in no error.

    Raises ConfigError for a url that is none.
    """

    def __init__(self, name: str, url: str, api_key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ConfigError(f"{name}: its url must be http://HOST:PORT, without a name or a password in it")
        self._url, self._api_key = url.rstrip("/"), api_key
        self.name = f"{name} at {self._url}" if self._url not in name else name
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._has_labels = False

    async def open(self, timeout_s: float, may_start_later: bool) -> str:
        """Wait until the server answers; its version of vLLM. Raises ConfigError for one too old, UnreachableError in the end, or
        at once unless ``may_start_later``."""
        headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        for is_request, limit in ((False, 0), (True, _MAX_REQUESTS)):
            # Without keep-alive: a server closes idle connections when it likes, and nothing here may be sent twice.
            connector = aiohttp.TCPConnector(limit=limit, force_close=True)
            self._sessions[is_request] = aiohttp.ClientSession(headers=headers, connector=connector)
        found = await self._await_version(time.monotonic() + timeout_s, may_start_later)
        try:
            version = Version(found)
        except InvalidVersion:  # a build of one's own; only its owner can judge it
            return found
        if version < _FIRST_VERSION:
            raise ConfigError(f"{self.name} runs vLLM {found}; rlsync needs {_FIRST_VERSION} or newer")
        self._has_labels = version >= _LABELS_VERSION
        return found

    async def _await_version(self, deadline_s: float, may_start_later: bool) -> str:
        is_told = False
        while True:
            try:
                return str((await self.ask("version", max(_POLL_S, deadline_s - time.monotonic())))["version"])
            except UnreachableError as error:
                if not may_start_later or time.monotonic() + _POLL_S > deadline_s:
                    raise UnreachableError(f"{error}; start it with: {_START}") from None
                if not is_told:  # or a wrong address looks like a hang
                    _log.warning("%s; waiting for it up to %.0f s", error, deadline_s - time.monotonic())
                    is_told = True
                await asyncio.sleep(_POLL_S)

    async def label(self, timeout_s: float) -> str | None:
        """Label of the weights, set by the last complete sync; vLLM's ``default`` before the first; None where vLLM keeps no labels."""
        return str((await self.ask("label", timeout_s))["weight_version"]) if self._has_labels else None

    async def ask(self, route: str, timeout_s: float | None, *, body: Any = None, query: str = "") -> dict[str, Any]:
        """The JSON object that a route answers, or an empty one.

        Raises RlsyncError with what the server says, NoModelError where it lacks what is asked for, ConfigError where it lacks the route,
        UnreachableError, TimeoutError.
        """
        method, path = _ROUTES[route]
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._sessions[route == "generate"].request(
                method, self._url + path + query, json=body, timeout=timeout, allow_redirects=False
            ) as response:
                text = await response.text()
        except TimeoutError:
            raise TimeoutError(f"{self.name} did not answer {method} {path} within {timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise UnreachableError(f"{self.name} cannot be reached for {method} {path}: {_reason(error)}") from None
        answer = self._parsed(text, method, path) if "json" in response.content_type and response.status in (200, 404) else {}
        if response.status == 404 and "error" in answer:
            raise NoModelError(f"{self.name} answered {method} {path} with 404: {self._said(text)}")
        if response.status == 404:
            raise ConfigError(f"{self.name} has no route {path}; start it with: {_START}")
        if response.status != 200:
            raise RlsyncError(f"{self.name} answered {method} {path} with {response.status}: {self._said(text)}")
        return answer

    def _parsed(self, text: str, method: str, path: str) -> dict[str, Any]:
        """The JSON object of an answer. Raises RlsyncError for what is none, as of something else that listens there."""
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RlsyncError(f"{self.name} answered {method} {path} with what is no JSON object: {self._said(text)}; is it vllm serve?")
        return found

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        for session in self._sessions.values():
            await session.close()

    def _said(self, text: str) -> str:
        """An error body in words, without the key that it may repeat."""
        try:
            found = json.loads(text)
        except ValueError:
            found = text
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        words = str(found)[:_ERROR_CHARS]
        return words.replace(self._api_key, "***") if self._api_key else words


def _reason(error: aiohttp.ClientError) -> str:
    """Why there was no answer, without aiohttp's notation of the address."""
    cause = getattr(error, "os_error", None)
    if isinstance(cause, socket.gaierror):
        return f"unknown host name ({cause.strerror})"
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno)
    return str(cause or error) or type(error).__name__
