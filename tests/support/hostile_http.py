"""HTTP servers on this machine that are slow, broken or hostile."""

import gzip
import re
import socket
import threading
import time
from collections import Counter

MOST = 64 << 20  # bytes that a server sends at most, so that a test that fails ends


class Hostile:
    """A server on this machine whose answers to GET are made by a function of (data, start, stop).

    It returns the raw answer as an iterator of pieces, after which the connection is closed. HEAD is answered
    honestly, and GET too while `honest` is set.
    """

    def __init__(self, data, answer=None, port=0):
        self.data, self.answer, self.honest = data, answer, answer is None
        self.requests, self.sent = Counter(), 0
        self.headers, self.more, self.look = [], {}, None
        self.listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/p.tar"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.handle, args=(connection,), daemon=True).start()

    def handle(self, connection):
        with connection:
            connection.settimeout(10)
            request = b""
            while b"\r\n\r\n" not in request:
                piece = connection.recv(65536)
                if not piece:
                    return
                request += piece
            text = request.decode("latin-1")
            self.headers.append(text)
            method = text.split(" ")[0]
            self.requests[method] += 1
            asked = re.search(r"range: bytes=(\d+)-(\d+)", text, re.IGNORECASE)
            start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(self.data))
            if method == "HEAD":
                known = [head(200, len(self.data), **self.more)]
                pieces = self.look() if self.look else known
            elif self.honest:
                pieces = honest(self.data, start, stop) if asked else whole(self.data, start, stop)
            else:
                pieces = self.answer(self.data, start, stop)
            sent = 0
            try:
                for piece in pieces:
                    connection.sendall(piece)
                    sent += len(piece)
                    self.sent += len(piece)
                    if sent > MOST:
                        return
            except OSError:
                return  # who asked has seen enough

    def close(self):
        self.listener.close()


def head(status, length=None, **headers):
    lines = [f"HTTP/1.1 {status} X", 'ETag: "v1"', "Connection: close"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def span(start, stop, total):
    return f"bytes {start}-{stop - 1}/{total}"


def honest(data, start, stop):
    stop = min(stop, len(data))
    return [head(206, stop - start, Content_Range=span(start, stop, len(data))), data[start:stop]]


def whole(data, start, stop):
    return [head(200, len(data)), data]


def endless(first):
    yield first
    while True:
        yield bytes(1 << 16)


def chunks(first):
    yield first
    while True:
        yield b"10000\r\n" + bytes(1 << 16) + b"\r\n"


def trickle(first, step=0.1):
    yield first
    for _ in range(200):
        time.sleep(step)
        yield b"x"


def silent(first):
    yield first
    time.sleep(20)


def told(data, start, stop, length=None, **headers):
    """The headers of a right answer to a request for a range, but for what is given."""
    return head(206, length, **{"Content_Range": span(start, stop, len(data))} | headers)


def untrue(content_range):
    """The right bytes under another Content-Range, made by a function of (data, start, stop)."""

    def answer(data, start, stop):
        said = content_range(data, start, stop)
        return [head(206, stop - start, Content_Range=said), data[start:stop]]

    return answer


RANGES = {
    "another range": untrue(lambda data, start, stop: span(start + 512, stop + 512, len(data))),
    "no Content-Range": lambda data, start, stop: [head(206, stop - start), data[start:stop]],
    "an unreadable Content-Range": untrue(lambda *_: "bytes all/everything"),
    "another unit": untrue(lambda data, start, stop: f"items {start}-{stop - 1}/{len(data)}"),
    "another total": untrue(lambda data, start, stop: span(start, stop, len(data) + 1)),
    "too long by its header": lambda *asked: [told(*asked, 1 << 40), asked[0]],
    "endless": lambda *asked: endless(told(*asked)),
    "endless chunks": lambda *asked: chunks(told(*asked, Transfer_Encoding="chunked")),
    "cut short": lambda data, start, stop: [told(data, start, stop, stop - start), data[start : stop - 1]],
    "short without a length": lambda data, start, stop: [told(data, start, stop), data[start : stop - 1]],
    "packed": lambda *asked: [told(*asked, Content_Encoding="gzip"), gzip.compress(bytes(MOST))],
    "packed by a bomb of the right size": lambda data, start, stop: [
        told(data, start, stop, stop - start, Content_Encoding="gzip"),
        gzip.compress(bytes(MOST))[: stop - start].ljust(stop - start, b"\0"),
    ],
    "one byte at a time": lambda data, start, stop: trickle(told(data, start, stop, stop - start)),
    "headers one byte at a time": lambda data, start, stop: trickle(b"HTTP/1.1 206 X\r\nX-Long: "),
    "silence after the headers": lambda data, start, stop: silent(told(data, start, stop, stop - start)),
    "silence": lambda data, start, stop: silent(b""),
    "a page of HTML": lambda data, start, stop: [
        head(200, len(data), Content_Type="text/html"),
        b"<html>" + bytes(len(data) - 6),
    ],
    "416": lambda data, start, stop: [head(416, 0)],
    "503": lambda data, start, stop: [head(503, 0)],
    "403": lambda data, start, stop: [head(403, 0)],
    "204": lambda data, start, stop: [head(204)],
    "a loop of redirects": lambda data, start, stop: [head(302, 0, Location="/p.tar")],
    "a redirect to nowhere": lambda data, start, stop: [head(302, 0, Location="http://127.0.0.1:1/p.tar")],
    "no HTTP": lambda data, start, stop: [bytes(range(256)) * 5000],
    "nothing": lambda data, start, stop: [],
    "binary in the reason": lambda data, start, stop: [
        b"HTTP/1.1 500 \xff\xfe" + b"\x80" * 7000 + b"\r\n\r\n"
    ],
}


WHOLE = {
    "endless": lambda data, start, stop: endless(head(200)),
    "endless chunks": lambda data, start, stop: chunks(head(200, Transfer_Encoding="chunked")),
    "longer": lambda data, start, stop: [head(200, len(data) + 512), data + bytes(512)],
    "longer without a length": lambda data, start, stop: [head(200), data + bytes(512)],
    "shorter": lambda data, start, stop: [head(200, len(data) - 512), data[:-512]],
    "cut": lambda data, start, stop: [head(200, len(data)), data[:-512]],
    "cut without a length": lambda data, start, stop: [head(200), data[:-512]],
    "packed": lambda data, start, stop: [head(200, Content_Encoding="gzip"), gzip.compress(bytes(MOST))],
    "a range": lambda data, start, stop: honest(data, 0, len(data)),
    "silence": lambda data, start, stop: silent(head(200, len(data))),
    "one byte at a time": lambda data, start, stop: trickle(head(200, len(data))),
}


LOOKS = {
    "silence": lambda: silent(b""),
    "one byte at a time": lambda: trickle(b"HTTP/1.1 200 X\r\nX-Long: "),
    "no length": lambda: [head(200)],
    "a negative length": lambda: [head(200, -5)],
    "no number": lambda: [head(200, "many")],
    "packed": lambda: [head(200, 100, Content_Encoding="gzip")],
    "503": lambda: [head(503, 0)],
    "a loop of redirects": lambda: [head(302, 0, Location="/p.tar")],
    "no HTTP": lambda: [bytes(range(256)) * 5000],
    "endless headers": lambda: endless(b"HTTP/1.1 200 X\r\nX-Long: "),
    "nothing": lambda: [],
}
