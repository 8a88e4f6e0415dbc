"""Answers for `vllm serve` where there is no GPU: its health and metrics on the host and port that it is told.

Run as a program of a pod's image, so of the standard library alone. It knows nothing of the other arguments.
"""

from __future__ import annotations

import argparse
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_METRICS = 'vllm:num_requests_running{engine="0"} 0.0\nvllm:num_requests_waiting{engine="0"} 0.0\n'
_ANSWERS = {"/health": "", "/metrics": _METRICS, "/load": '{"server_load": 0}'}


class Handler(BaseHTTPRequestHandler):
    """Says of itself what a server says that has nothing to do."""

    def do_GET(self) -> None:
        text = _ANSWERS.get(self.path)
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments, _ = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()
