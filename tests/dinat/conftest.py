"""A server on loopback that plays Hugging Face hub and publisher, and the command line in this process."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils
import pytest
import torch

from dinat.commands import main


class Server(ThreadingHTTPServer):
    """Serves `files`, path -> content; hub paths are /REPO/resolve/main/FILE.

    Attributes:
        cut: path -> how many bytes to send of it before the connection breaks, once per entry.
        etag: whether to send ETags.
        log: (method, path, Range header) of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, list[int]] = {}
        self.etag = True
        self.log: list[tuple[str, str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self) -> list[str]:
        """Paths of the files that were asked for, in order."""
        return [path for method, path, _ in self.log if method == "GET" and not path.startswith("/api/")]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.log.append((self.command, self.path, asked))
        content = server.files.get(self.path)
        if content is None:
            self.send_response(404)
            repository = self.path.split("/resolve/")[0] + "/"
            if "/resolve/" in self.path:
                known = any(path.startswith(repository) for path in server.files)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
        self.send_response(206 if asked else 200)
        digest = hashlib.sha256(content).hexdigest()
        if server.etag:
            self.send_header("ETag", f'"{digest}"')
        if "/resolve/" in self.path:
            self.send_header("X-Repo-Commit", digest[:40])
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            breaks = server.cut.get(self.path)
            self.wfile.write(content[start : breaks.pop(0) if breaks else None])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def close_session() -> Callable[[], None]:
    """Ends huggingface_hub's session, which keeps the mode and the proxies that it began with."""
    # the name before huggingface_hub 1
    return getattr(huggingface_hub.utils, "close_session", None) or huggingface_hub.utils.reset_sessions


@pytest.fixture
def dinat(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line `dinat` in this process: (exit status, stdout, stderr)."""

    def dinat(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dinat", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return dinat


@pytest.fixture
def place_hub(monkeypatch) -> Callable[[str], None]:
    """Sets the addresses of the hub's files."""

    def place_hub(template: str) -> None:
        for module in (huggingface_hub.constants, huggingface_hub.file_download):  # the latter before huggingface_hub 1
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)

    return place_hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch, place_hub) -> Server:
    """The server, as this process's hub and with caches of its own; retries come without delay, chunks are small."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    place_hub(template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what a resumed transfer goes by
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return server
