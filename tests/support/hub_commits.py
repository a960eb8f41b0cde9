"""A server that takes commits to data sets as the Hugging Face Hub does, for tests of uploads."""

import base64
import hashlib
import http.server
import json
import re
import threading
from typing import Any


class Hub:
    """Data sets in memory: `files` by (repository, revision, path). Large files go by LFS, as there.

    Attributes:
        private: of each data set, by its name.
        refuses: answer that the token may not write.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.refuses = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def answer(self, status: int, content: Any = None) -> None:
                body = b"" if content is None else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                if status == 404:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                found = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", self.path)
                self.answer(200 if found and found.groups() in outer.files else 404)

            def do_PUT(self) -> None:
                outer.blobs[self.path.rpartition("/")[2]] = self.body()
                self.answer(200)

            def do_POST(self) -> None:
                body = self.body()
                if outer.refuses:
                    return self.answer(403, {"error": "this token may not write"})
                if self.path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked.get('organization')}/{asked['name']}"
                    if name in outer.private:
                        return self.answer(409, {"url": f"{outer.url}/datasets/{name}"})
                    outer.private[name] = asked["private"]
                    return self.answer(200, {"url": f"{outer.url}/datasets/{name}"})
                if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/preupload/([^/?]+).*", self.path):
                    modes = [
                        {
                            "path": file["path"],
                            "uploadMode": "regular" if file["path"].endswith((".md", ".json")) else "lfs",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                    return self.answer(200, {"files": modes})
                if self.path.endswith(".git/info/lfs/objects/batch"):
                    objects = json.loads(body)["objects"]
                    for each in objects:
                        upload = {"href": f"{outer.url}/lfs/{each['oid']}", "header": {}}
                        each["actions"] = {"upload": upload}
                    return self.answer(200, {"transfer": "basic", "objects": objects})
                found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/commit/([^/?]+).*", self.path)
                if found is None:
                    return self.answer(404, {"error": self.path})
                return self.commit(*found.groups(), body)

            def commit(self, repo: str, revision: str, body: bytes) -> None:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        outer.messages.append(value["summary"])
                    elif line["key"] == "file":
                        outer.files[repo, revision, value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        content = outer.blobs[value["oid"]]
                        assert hashlib.sha256(content).hexdigest() == value["oid"]
                        outer.files[repo, revision, value["path"]] = content
                oid = hashlib.sha1(body).hexdigest()
                self.answer(200, {"commitUrl": f"{outer.url}/datasets/{repo}/commit/{oid}", "commitOid": oid})

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
