"""A small S3 on loopback, path style: GET and HEAD with ranges and If-Match, PUT with If-None-Match, ListObjectsV2.
It fails when asked.

    with serving(folder) as server: ...                      # buckets are the folder's subfolders
    python tests/s3_server.py FOLDER PORT [SHARE]            # SHARE of the requests fail, for benchmarks
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KEY = "AKIAMOAITESTS"
_NUMBERS = 7919
"""Which requests fail follows from their number alone."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0, failing: float = 0.0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder, self.failing, self.number, self.lock = folder, failing, 0, threading.Lock()
        self.seen: list[str] = []
        """`METHOD path range` of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environ(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": "a-secret-nobody-prints",
            "AWS_REGION": "us-east-1",
        }

    def fault(self) -> str:
        """What is wrong with the next request; nothing with most of them."""
        with self.lock:
            self.number += 1
            draw = self.number * _NUMBERS % 1000
        return ("503", "reset", "late")[self.number % 3] if draw < self.failing * 1000 else ""

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if not self._begin():
            return
        split = urlsplit(self.path)
        query = parse_qs(split.query)
        if "list-type" in query:
            self._list(unquote(split.path).strip("/"), query.get("prefix", [""])[0])
            return
        path = self._file()
        if not path.is_file():
            self._answer(404)
            return
        tag, size = _tag(path), path.stat().st_size
        if self.headers.get("If-Match", tag) != tag:
            self._answer(412)
            return
        code, start, end = 200, 0, size
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            code, start, end = 206, int(match[1]), min(int(match[2] or size) + 1, size)
        more = {"ETag": tag, "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT"}
        if code == 206:
            more["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start) if self.command == "GET" else b""
        self._answer(code, data, {**more, "Content-Length": str(end - start)})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._begin():
            return
        path = self._file()
        with self.server.lock:
            if self.headers.get("If-None-Match") == "*" and path.exists():
                self._answer(412)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._answer(200, more={"ETag": _tag(path)})

    def _file(self) -> Path:
        path = self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        assert path.resolve().is_relative_to(self.server.folder.resolve())
        return path

    def _begin(self) -> bool:
        """False where the request was answered with a fault, or is not allowed."""
        self.server.seen.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        match self.server.fault():
            case "503":
                self._answer(503)
                return False
            case "reset":
                self.close_connection = True
                self.connection.close()
                return False
            case "late":
                time.sleep(0.2)
        asked = self.headers.get("Authorization", "")
        if asked and f"Credential={KEY}/" not in asked:
            self._answer(403, b"<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>echoed</AWSAccessKeyId></Error>")
            return False
        return True

    def _list(self, bucket: str, prefix: str) -> None:
        root = self.server.folder / bucket
        if not root.is_dir():
            self._answer(404)
            return
        entries = []
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            name = path.relative_to(root).as_posix()
            if name.startswith(prefix):
                entries.append(
                    f"<Contents><Key>{escape(name)}</Key><LastModified>2026-11-30T00:00:00.000Z</LastModified>"
                    f"<ETag>{escape(_tag(path))}</ETag><Size>{path.stat().st_size}</Size></Contents>"
                )
        said = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>"
        self._answer(200, said.encode(), {"Content-Type": "application/xml"})

    def _answer(self, code: int, data: bytes = b"", more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


_TAGS: dict[tuple[str, int, int], str] = {}


def _tag(path: Path) -> str:
    status = path.stat()
    known = (str(path), status.st_size, status.st_mtime_ns)
    if known not in _TAGS:
        _TAGS[known] = f'"{hashlib.md5(path.read_bytes()).hexdigest()}"'
    return _TAGS[known]


@contextlib.contextmanager
def serving(folder: Path, failing: float = 0.0) -> Iterator[Server]:
    server = Server(folder, failing=failing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    Server(Path(sys.argv[1]), int(sys.argv[2]), float(os.fspath(sys.argv[3])) if sys.argv[3:] else 0.0).serve_forever()
