"""A stand-in hub on 127.0.0.1 for huggingface_hub: listings, trees, files, ranges, and faults.

Large files are redirected to a "CDN": the same server under its other name, localhost, which the client takes for another
host. Every request and every byte of a body is counted.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = 1 << 10  # min bytes of an "LFS" file: it has a SHA-256, and the CDN serves it


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted((n, hashlib.sha1(c).hexdigest()) for n, c in files.items())).encode()).hexdigest()


@dataclass
class StandIn:
    """State of the stand-in: its files, its faults, and the requests so far."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    license: str | None = None
    refuse: tuple[int, dict[str, str]] | None = None  # status and headers of every response
    break_after: int | None = None  # bytes of a large file after which the connection is cut
    breaks: int = 0  # number of cut connections; -1 is always
    reset: bool = False  # True: connections are cut by a reset and not by an end
    corrupt: bool = False  # True: large files arrive with a bit changed
    ignore_ranges: bool = False
    listed_too_long: int = 0  # bytes that the listing adds to the size of a large file
    lies: dict[str, str] = field(default_factory=dict)  # false headers of responses about files
    commits: list[str] = field(default_factory=list)  # commits of the next listings; the last one stays
    altered: dict[str, bytes] = field(default_factory=dict)  # files that arrive with another content than listed
    absent: list[str] = field(default_factory=list)  # files that are listed and missing
    extra: list[str] = field(default_factory=list)  # files that only the tree names, not the listing
    token: str | None = None  # required token; without it, 401
    hold: threading.Event | None = None  # large files stop after break_after bytes until it is set
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    bytes_sent: Counter[str] = field(default_factory=Counter)
    tokens_seen_by_cdn: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo: str, files: dict[str, bytes]) -> None:
        self.repos[repo] = files

    def forget(self) -> None:
        self.requests.clear()
        self.bytes_sent = Counter()  # responses still being sent to an interrupted client count in the old one

    def asked(self, part: str, method: str | None = None) -> list[tuple[str, str, str]]:
        return [r for r in self.requests if part in r[1] and method in (None, r[0])]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.handle_any()

    def do_GET(self) -> None:
        self.handle_any()

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self.cdn(match[1], match[2])
        elif self.hub.refuse is not None:
            self.answer(self.hub.refuse[0], b"{}", self.hub.refuse[1])
        elif self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.info(match[1], match[2], "blobs" in parse_qs(parts.query))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self.tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups())
        else:
            self.answer(404, b"{}", {})

    def files(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
        files = self.hub.repos.get(repo)
        if files is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", commit_of(files), *self.hub.commits):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return files
        return None

    def info(self, repo: str, revision: str | None, blobs: bool) -> None:
        files = self.files(repo, revision)
        if files is None:
            return
        siblings = [
            {"rfilename": name, **(blob(content, self.hub.listed_too_long) if blobs else {})}
            for name, content in files.items()
        ]
        tags = [f"license:{self.hub.license}"] if self.hub.license else []
        body = {
            "id": repo,
            "modelId": repo,
            "sha": self.commit(files),
            "private": False,
            "tags": tags,
            "siblings": siblings,
        }
        self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def commit(self, files: dict[str, bytes]) -> str:
        claimed = self.hub.commits
        return commit_of(files) if not claimed else claimed.pop(0) if len(claimed) > 1 else claimed[0]

    def tree(self, repo: str, revision: str) -> None:
        files = self.files(repo, revision)
        if files is None:
            return
        entries = []
        for name, content in files.items():
            entry = {"type": "file", "path": name, "oid": git_id(content), "size": len(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        entries += [{"type": "file", "path": name, "oid": "0" * 40, "size": 1} for name in self.hub.extra]
        self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        files = self.files(repo, revision)
        if files is None:
            return
        common = {"X-Repo-Commit": commit_of(files)}
        content = None if name in self.hub.absent else files.get(name)
        if content is not None and len(content) < LARGE:
            sent = self.hub.altered.get(name, content)
            self.answer(200, sent, {**common, "ETag": f'"{git_id(content)}"', **self.hub.lies}, count=name)
        elif content is None:
            self.answer(404, b"", {**common, "X-Error-Code": "EntryNotFound", **self.hub.lies})
        else:
            location = f"http://localhost:{self.hub.port}/cdn/{repo}/{quote(name)}"
            linked = {
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            }
            self.answer(302, b"", {**common, **linked, "Location": location, **self.hub.lies})

    def cdn(self, repo: str, name: str) -> None:
        self.hub.tokens_seen_by_cdn.append(self.headers.get("Authorization", ""))
        content = self.hub.altered.get(name, self.hub.repos[repo][name])
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or self.hub.ignore_ranges:
            self.answer(200, content, headers, count=name, large=True)
        elif (first := int(match[1])) >= len(content):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            last = min(int(match[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first : last + 1], headers, count=name, large=True)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str], count: str | None = None, large: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.hub
        if large and hub.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if large and hub.breaks and hub.break_after is not None and len(body) > hub.break_after:
            hub.breaks -= 1
            self.send(body[: hub.break_after], count)
            if hub.hold is not None:
                hub.hold.wait(20)
            self.cut_off()
        else:
            self.send(body, count)

    def send(self, body: bytes, count: str | None) -> None:
        sent = self.hub.bytes_sent
        try:
            for start in range(0, len(body), 1 << 16):
                chunk = body[start : start + (1 << 16)]
                if count is not None:  # counted before the client has it, or its test may look too early
                    sent[count] += len(chunk)
                self.wfile.write(chunk)
            self.wfile.flush()
        except OSError:  # the client closed the connection
            self.close_connection = True

    def cut_off(self) -> None:
        if self.hub.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True


def blob(content: bytes, more: int) -> dict[str, Any]:
    described: dict[str, Any] = {"size": len(content), "blobId": git_id(content)}
    if len(content) >= LARGE:
        described["size"] += more
        described["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return described


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Print nothing: connections are cut on purpose."""


def serve(hub: StandIn) -> Server:
    """Start the server; the caller shuts it down."""
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server
