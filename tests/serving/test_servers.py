"""A server of a test is reached, also where the environment names a proxy for everything."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import pytest

from . import servers

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())

HTTPServer(("127.0.0.1", int(sys.argv[-1])), Answer).serve_forever()
"""


def test_a_server_answers_past_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setattr(servers, "START_SECONDS", 60.0)
    with (
        servers.running(["-c", SERVER], tmp_path / "log") as address,
        urllib.request.urlopen(address, timeout=10) as answer,
    ):
        assert answer.read() == b"/v1"
    assert os.environ["no_proxy"] == "example.org"
