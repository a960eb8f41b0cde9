"""A server that answers what `huggingface_hub` asks of the Hub about data sets, from a folder."""

import http.server
import json
import re
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The data sets `OWNER/NAME` below a folder, as of one revision `main`.

    Attributes:
        requests: how often each kind was asked for.
        bytes_sent: of files.
        fail_next: answer so many requests for files with an error of the server.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.bytes_sent = self.largest = self.fail_next = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, asked=None):
                path = unquote(urlsplit(self.path).path)
                api = re.fullmatch(
                    r"/api/datasets/([^/]+/[^/]+)(?:/(tree|paths-info|revision)/([^/]+)(?:/(.*))?)?", path
                )
                file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
                repo = outer.folder / (api or file)[1] if api or file else None
                if (
                    repo is None
                    or not repo.is_dir()
                    or (api or file)[2 if file else 3] not in (None, "main", SHA)
                ):
                    return self.send(
                        404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
                    )
                if file:
                    outer.requests["file"] += 1
                    return self.send_file(repo / file[3])
                outer.requests[api[2] or "info"] += 1
                if api[2] in ("tree", "paths-info"):
                    entries = (
                        list(repo.rglob("*")) if api[2] == "tree" else [repo / one for one in asked["paths"]]
                    )
                    below = repo / (api[4] or "") if api[2] == "tree" else repo
                    if "recursive=true" not in self.path.lower() and api[2] == "tree":
                        entries = list(below.iterdir()) if below.is_dir() else []
                    if api[2] == "tree" and not below.exists():
                        return self.send(404, b'{"error": "no entry"}', {"X-Error-Code": "EntryNotFound"})
                    found = [
                        self.entry(one, repo)
                        for one in sorted(entries)
                        if one.exists() and below in (one, *one.parents)
                    ]
                    return self.send(200, json.dumps(found).encode())
                return self.send(
                    200, json.dumps({"id": api[1], "sha": SHA, "siblings": [], "tags": []}).encode()
                )

            def entry(self, path, repo):
                kind = "directory" if path.is_dir() else "file"
                size = {} if path.is_dir() else {"size": path.stat().st_size}
                return {"type": kind, "oid": SHA, "path": str(path.relative_to(repo)), **size}

            def send_file(self, path):
                if outer.fail_next > 0:
                    outer.fail_next -= 1
                    return self.send(503, b"")
                if not path.is_file():
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                data = path.read_bytes()
                headers = {"X-Repo-Commit": SHA, "ETag": f'"{len(data):x}"', "Accept-Ranges": "bytes"}
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if not asked:
                    return self.send(200, data, headers)
                start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                outer.bytes_sent += stop - start
                outer.largest = max(outer.largest, stop - start)
                return self.send(206, data[start:stop], headers)

            def send(self, status, data, headers=None):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
