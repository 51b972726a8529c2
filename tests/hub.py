"""A stand-in for the Hugging Face Hub on 127.0.0.1."""

import hashlib
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `files`, {repo: {file name: bytes}}, as the Hub does: metadata by HEAD, content by GET."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: Counter = Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                hub.requests[self.command, self.path] += 1
                repo, _, rest = self.path.lstrip("/").partition("/resolve/")
                name = rest.partition("/")[2]
                content = hub.files.get(repo, {}).get(name)
                if content is None:
                    body = b"not found"
                    self.send_response(404)
                    code = "EntryNotFound" if repo in hub.files else "RepoNotFound"
                    self.send_header("X-Error-Code", code)
                    self.send_header("X-Error-Message", code)
                else:
                    body = content
                    self.send_response(200)
                    self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", _COMMIT)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_GET = do_HEAD = _answer

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def downloads(self) -> set[str]:
        return {path.rsplit("/", 1)[-1] for (command, path) in self.requests if command == "GET"}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def client_environment(endpoint: str, cache: Path) -> dict[str, str]:
    """What points huggingface_hub at a hub; it reads these once, at import."""
    return {
        "HF_HOME": str(cache),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "no_proxy": "127.0.0.1",
    }
