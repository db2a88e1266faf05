"""What a handle makes of a server that is none of vLLM's, or is behind something that answers in its place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlsync.engine.handles.http import HttpEngine
from rlsync.errors import RlsyncError

KEY = "sk-secret"


class Other(BaseHTTPRequestHandler):
    said = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(self.said)

    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("said", [b"<html>wait sk-secret</html>", b'["0.25.0"]', b""])
def test_answers_that_are_no_json_object_are_an_error_that_says_who_gave_them(
    url: str, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Other, "said", said)
    with pytest.raises(RlsyncError, match=f"engine e at {url} answered GET /version with what is no JSON object") as found:
        HttpEngine(url, engine_id="e", api_key=KEY, timeout_s=10)
    assert KEY not in str(found.value)
