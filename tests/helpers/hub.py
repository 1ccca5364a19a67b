"""A stand-in for the Hugging Face hub: the part of its HTTP API that a download needs."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"
REVISIONS = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kind: str
    name: str
    folders: dict[str, Path]
    requests: list[str]

    def do_HEAD(self) -> None:
        self.requests.append(self.path)
        path = urlsplit(self.path).path
        api = f"/api/{self.kind}/{self.name}"
        page = f"/{self.name}" if self.kind == "models" else f"/{self.kind}/{self.name}"
        for revision, commit in REVISIONS.items():
            folder = self.folders[commit]
            files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
            if path == f"{api}/revision/{revision}":
                siblings = [{"rfilename": name} for name in files]
                return self._json({"id": self.name, "sha": commit, "siblings": siblings})
            if path == f"{api}/tree/{revision}":
                return self._json([_entry(name, file) for name, file in files.items()])
            place = f"{page}/resolve/{revision}/"
            if path.startswith(place) and (file := files.get(path.removeprefix(place))):
                return self._send(200, file.read_bytes(), etag=_digest(file), commit=commit)
            if path.startswith((place, f"{api}/tree/{revision}/")):
                return self._send(404, b"", commit=commit, error="EntryNotFound")
        known = path.startswith((f"{api}/", f"{page}/"))
        return self._send(404, b"", error="RevisionNotFound" if known else "RepoNotFound")

    do_GET = do_HEAD

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(
        self, status: int, body: bytes, *, etag: str = "", commit: str = "", error: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        headers = {"ETag": etag and f'"{etag}"', "X-Repo-Commit": commit, "X-Error-Code": error}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _entry(name: str, file: Path) -> dict[str, object]:
    return {"type": "file", "path": name, "size": file.stat().st_size, "oid": _digest(file)}


@contextmanager
def serve(
    name: str, folder: Path, older: Path | None = None, kind: str = "models"
) -> Iterator[tuple[str, list[str]]]:
    """A hub with one model or data set: its address, and the paths that were asked for so far.

    Args:
        folder: what ``main`` holds.
        older: what the tag ``v1`` holds; None: the same.
        kind: "models" or "datasets".
    """
    requests: list[str] = []
    folders = {COMMIT: folder, OLDER: older or folder}
    members = {"kind": kind, "name": name, "folders": folders, "requests": requests}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), members))
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
