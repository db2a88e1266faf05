"""A running ``vllm serve``: its routes, and how one of them is asked. Owns connections; never the server's process. Needs no vLLM.

The routes that drive a sync exist where the server runs with VLLM_SERVER_DEV_MODE=1. They are the same from vLLM 0.25 to 0.33;
what differs is said here, by version.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from packaging.version import InvalidVersion, Version

from rlsync.errors import ConfigError, RlsyncError

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
}
_MAX_REQUESTS = 512
_ERROR_CHARS = 4000
_POLL_S = 0.25


class UnreachableError(RlsyncError):
    """Nobody answers at the server's address."""


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
        self.name = f"{name} at {url.rstrip('/')}"
        self._url, self._api_key = url.rstrip("/"), api_key
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._has_labels = False

    async def open(self, timeout_s: float) -> str:
        """Wait until the server answers; its version of vLLM. Raises ConfigError for one too old, UnreachableError in the end."""
        headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        for is_request, limit in ((False, 0), (True, _MAX_REQUESTS)):
            # Without keep-alive: a server closes idle connections when it likes, and nothing here may be sent twice.
            connector = aiohttp.TCPConnector(limit=limit, force_close=True)
            self._sessions[is_request] = aiohttp.ClientSession(headers=headers, connector=connector)
        found = await self._await_version(time.monotonic() + timeout_s)
        try:
            version = Version(found)
        except InvalidVersion:  # a build of one's own; only its owner can judge it
            return found
        if version < _FIRST_VERSION:
            raise ConfigError(f"{self.name} runs vLLM {found}; rlsync needs {_FIRST_VERSION} or newer")
        self._has_labels = version >= _LABELS_VERSION
        return found

    async def _await_version(self, deadline_s: float) -> str:
        while True:
            try:
                return str((await self.ask("version", max(_POLL_S, deadline_s - time.monotonic())))["version"])
            except UnreachableError as error:
                if time.monotonic() + _POLL_S > deadline_s:
                    raise UnreachableError(f"{error}; start it with: {_START}") from None
                await asyncio.sleep(_POLL_S)

    async def label(self, timeout_s: float) -> str | None:
        """What the last complete sync called the weights; vLLM's ``default`` before the first; None where vLLM keeps no labels."""
        return str((await self.ask("label", timeout_s))["weight_version"]) if self._has_labels else None

    async def ask(self, route: str, timeout_s: float | None, *, body: Any = None, query: str = "") -> dict[str, Any]:
        """The JSON object that a route answers, or an empty one.

        Raises RlsyncError with what the server says, ConfigError where it lacks the route, UnreachableError, TimeoutError.
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
            raise UnreachableError(f"{self.name} cannot be reached for {method} {path}: {error}") from None
        if response.status == 404:
            raise ConfigError(f"{self.name} has no route {path}; start it with: {_START}")
        if response.status != 200:
            raise RlsyncError(f"{self.name} answered {method} {path} with {response.status}: {self._said(text)}")
        return json.loads(text) if text else {}

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
