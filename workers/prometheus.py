"""The present numbers of a run for Prometheus to fetch. Owns a registry, an HTTP listener and its thread; knows no run.

prometheus_client comes with Ray and vLLM; it is imported only when a port is configured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlsync.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import Gauge

_PREFIX = "rlsync_"


class PrometheusExporter:
    """A gauge for each number, as ``rlsync_sync_gb_per_s`` for ``sync/gb_per_s``, at ``http://host:port/metrics``.

    A number that a step does not report keeps its last value.
    """

    def __init__(self, host: str, port: int) -> None:
        """Begin to listen. Raises ConfigError where the address cannot be had."""
        try:
            import prometheus_client as client
        except ImportError as error:
            raise ConfigError(
                f"runner.logger.prometheus_port needs prometheus_client, which cannot be imported ({error}): pip install prometheus-client"
            ) from error
        self._registry, self._make = client.CollectorRegistry(), client.Gauge
        self._gauges: dict[str, Gauge] = {}
        try:
            self._server, self._thread = client.start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise ConfigError(
                f"runner.logger.prometheus_port: cannot listen on {host}:{port} ({error}); choose another port, or 0 for none"
            ) from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Show these numbers from now on; ``step`` as ``rlsync_logged_step``."""
        self.show({**metrics, "logged_step": step})

    def show(self, metrics: Mapping[str, float]) -> None:
        """Show these numbers from now on, which belong to no step."""
        for name, value in metrics.items():
            self._gauge(name).set(value)

    def _gauge(self, name: str) -> Gauge:
        exported = _PREFIX + re.sub(r"\W", "_", name)
        if exported not in self._gauges:
            self._gauges[exported] = self._make(exported, f"{name} of this run", registry=self._registry)
        return self._gauges[exported]

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
