"""A file server for tests of remote pools."""

import http.server
import re
import socket
import threading
import time
from collections import Counter
from pathlib import Path


class Server:
    """A file server with or without ranges that can be slow, fail, or cut connections, and counts."""

    def __init__(self, folder: Path, ranges: bool = True, latency: float = 0.0):
        self.folder, self.ranges, self.latency = folder, ranges, latency
        self.requests: Counter[str] = Counter()
        self.bytes_sent = self.at_once = self.most_at_once = 0
        self.fail_next = self.cut_next = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer(with_body=True)

            def answer(self, with_body):
                with outer.lock:
                    outer.requests[self.command] += 1
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                    fails, cuts = outer.fail_next > 0, outer.cut_next > 0 and with_body
                    outer.fail_next -= fails
                    outer.cut_next -= cuts
                try:
                    time.sleep(outer.latency)
                    self.send(with_body, fails, cuts)
                finally:
                    with outer.lock:
                        outer.at_once -= 1

            def send(self, with_body, fails, cuts):
                path = outer.folder / self.path.lstrip("/")
                if fails or not path.is_file():
                    self.send_response(503 if fails else 404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = path.read_bytes()
                tag = f'"{path.stat().st_mtime_ns:x}-{len(data):x}"'
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if asked and outer.ranges:
                    start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
                    data = data[start:stop]
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", tag)
                self.end_headers()
                if with_body:
                    body = data[: len(data) // 2] if cuts else data
                    with outer.lock:  # before it is sent: the client may look at once
                        outer.bytes_sent += len(body)
                    try:
                        self.wfile.write(body)
                    except OSError:
                        return  # who asked has seen enough
                    if cuts:
                        self.wfile.flush()
                        self.connection.shutdown(socket.SHUT_RDWR)
                        self.close_connection = True

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, address: None  # who hangs up is no news here
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
