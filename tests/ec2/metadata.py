"""The second version of EC2's metadata service, for one instance.

`metadata FD FACTS` answers on the listening socket FD. FACTS: JSON, {path under /latest/: text}, read anew for each
question. Source: EC2 User Guide, "Use the Instance Metadata Service to access instance metadata".
"""

import json
import secrets
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

LONGEST_S: Final = 21_600
"""Six hours, the most that a token may live."""

_tokens: dict[str, float] = {}
"""{token: when it expires on the monotonic clock}"""


class Answers(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        life_s = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if "X-Forwarded-For" in self.headers:
            self._send(403)
        elif self.path != "/latest/api/token":
            self._send(404)
        elif not (life_s.isdecimal() and 1 <= int(life_s) <= LONGEST_S):
            self._send(400)
        else:
            token = secrets.token_urlsafe(40)
            _tokens[token] = time.monotonic() + int(life_s)
            self._send(200, token)

    def do_GET(self) -> None:
        if _tokens.get(self.headers.get("X-aws-ec2-metadata-token", ""), 0.0) <= time.monotonic():
            self._send(401)
            return
        fact = json.loads(Path(sys.argv[2]).read_text()).get(self.path.removeprefix("/latest/"))
        self._send(404 if fact is None else 200, fact or "")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """The console is the machine's."""

    def _send(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        server = ThreadingHTTPServer(listener.getsockname(), Answers, bind_and_activate=False)
        server.socket.close()
        server.socket = listener
        server.serve_forever()
