"""Just enough of a metadata server for a machine that wants a token for Cloud Storage.

https://cloud.google.com/compute/docs/access/authenticate-workloads#applications
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .storage import Token

PATH = "/computeMetadata/v1/instance/service-accounts/default/token"


class Metadata(ThreadingHTTPServer):
    """Gives a new token each time it is asked, good for so many seconds, and registers it in `tokens`.

    `status` is what it answers with; 404: the machine has no service account.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, tokens: dict[str, Token], seconds: int = 3600) -> None:
        self.tokens, self.seconds, self.given, self.status = tokens, seconds, 0, 200
        super().__init__(("127.0.0.1", 0), _Handler)
        self.host = f"127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Metadata:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def give(self) -> dict[str, object]:
        self.given += 1
        token = f"token-{self.given}"
        self.tokens[token] = Token(time.time() + self.seconds)
        return {"access_token": token, "expires_in": self.seconds, "token_type": "Bearer"}


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_GET(self) -> None:
        asked = self.headers.get("Metadata-Flavor") == "Google" and self.path == PATH
        body = json.dumps(self.server.give() if asked and self.server.status == 200 else {}).encode()
        self.send_response(self.server.status if asked else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """What was given is counted instead."""
