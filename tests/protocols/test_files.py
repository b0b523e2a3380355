"""Fetching from a real server on this machine: right, wrong, cut, resumed, changed, missing, unreachable."""

import hashlib
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from fewstep.distill.errors import UserError
from fewstep.distill.protocols.fetched_files import GIVEN, PINNED, PUBLISHED, RemoteFile, Store

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `data` at /file, with ranges and an ETag unless told otherwise; breaks off after `cut` bytes."""

    data, tag, cut = DATA, '"one"', len(DATA)
    sent: list[tuple[str | None, int]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path != "/file":
            return self.send_error(404)
        server, asked = self.server, self.headers.get("Range")
        if asked and self.headers.get("If-Range", server.tag) != server.tag:
            asked = None
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if start >= len(server.data):
            return self.send_error(416)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(len(server.data) - start))
        self.end_headers()
        body = server.data[start : server.cut]
        server.sent.append((asked, len(body)))
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        return None


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.sent = []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def file(server: Server) -> RemoteFile:
    return RemoteFile("data.bin", f"http://127.0.0.1:{server.server_port}/file", "this test")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_file_with_the_published_hash_is_kept_and_not_fetched_again(
    store: Store, file: RemoteFile, server: Server
) -> None:
    wanted = replace(file, sha256=SHA256)
    got = store.fetch(wanted, progress=False)
    assert got.path.read_bytes() == DATA and (got.sha256, got.origin) == (SHA256, PUBLISHED)
    assert store.fetch(wanted, progress=False) == got
    assert len(server.sent) == 1
    assert sorted(p.name for p in store.folder.iterdir()) == [".lock", "data.bin", "files.lock.json"]


def test_a_file_with_another_hash_is_refused_and_not_kept(store: Store, file: RemoteFile) -> None:
    with pytest.raises(UserError, match=rf"sha256 {SHA256[:12]}, but 000000000000 is published"):
        store.fetch(replace(file, sha256="0" * 64), progress=False)
    assert store.find(replace(file, sha256="0" * 64)) is None
    assert [p.name for p in store.folder.iterdir()] == [".lock"]


def test_without_a_published_hash_the_first_fetch_is_pinned(
    store: Store, file: RemoteFile, server: Server
) -> None:
    got = store.fetch(file, progress=False)
    assert got.origin == PINNED and "pinned here, not published" in str(got)
    assert json.loads(store.lock_path.read_text())["data.bin"]["sha256"] == SHA256
    got.path.unlink()
    server.data = DATA[::-1]
    with pytest.raises(UserError, match=rf"but {SHA256[:12]} is pinned here earlier"):
        store.fetch(file, progress=False)


def test_a_file_that_changed_on_disk_is_noticed(store: Store, file: RemoteFile) -> None:
    got = store.fetch(file, progress=False)
    got.path.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(UserError, match=rf"but {SHA256[:12]} was expected; delete it and prepare again"):
        store.find(file)
    store.lock_path.unlink()
    with pytest.raises(UserError, match="without having been prepared"):
        store.fetch(file, progress=False)


@pytest.mark.parametrize("published", [True, False])
def test_a_file_cut_short_is_resumed(store: Store, file: RemoteFile, server: Server, published: bool) -> None:
    wanted = replace(file, sha256=SHA256) if published else file
    server.cut = 300_000
    with pytest.raises(UserError, match=rf"cut short at 300000 of {len(DATA)} bytes; try again to resume"):
        store.fetch(wanted, progress=False)
    assert store.find(wanted) is None
    server.cut = len(DATA)
    assert store.fetch(wanted, progress=False).sha256 == SHA256
    assert server.sent == [(None, 300_000), ("bytes=300000-", len(DATA) - 300_000)]


def test_what_changed_on_the_server_meanwhile_is_fetched_anew(
    store: Store, file: RemoteFile, server: Server
) -> None:
    server.cut = 300_000
    with pytest.raises(UserError, match="cut short"):
        store.fetch(file, progress=False)
    server.data, server.tag, server.cut = DATA[::-1], '"two"', len(DATA)
    assert store.fetch(file, progress=False).path.read_bytes() == DATA[::-1]
    assert server.sent[-1] == (None, len(DATA))


def test_without_hash_and_tag_nothing_is_stitched_together(
    store: Store, file: RemoteFile, server: Server
) -> None:
    server.cut, server.tag = 300_000, ""
    with pytest.raises(UserError, match="cut short"):
        store.fetch(file, progress=False)
    server.data, server.cut = DATA[::-1], len(DATA)
    assert store.fetch(file, progress=False).path.read_bytes() == DATA[::-1]


def test_a_finished_part_is_not_asked_beyond_its_end(store: Store, file: RemoteFile, server: Server) -> None:
    wanted = replace(file, sha256=SHA256)
    store.folder.mkdir()
    (store.folder / ".data.bin.part").write_bytes(DATA)
    assert store.fetch(wanted, progress=False).sha256 == SHA256
    assert server.sent == [(None, len(DATA))]


def test_404_and_no_network_and_no_address_are_one_line(store: Store, file: RemoteFile) -> None:
    assert file.address is not None
    with pytest.raises(UserError, match=r"/other answered 404; give --statistics PATH$"):
        store.fetch(replace(file, address=file.address.replace("/file", "/other")), progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/file"
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused\); try again with a network or give"):
        store.fetch(replace(file, address=closed), progress=False)
    with pytest.raises(UserError, match=r"^data.bin: no address known; give --prompts PATH$"):
        store.fetch(replace(file, address=None, option="--prompts"), progress=False)


def test_no_network_loses_nothing(store: Store, file: RemoteFile, server: Server) -> None:
    server.cut = 300_000
    with pytest.raises(UserError, match="cut short"):
        store.fetch(file, progress=False)
    with pytest.raises(UserError, match="cannot be reached"):
        store.fetch(replace(file, address="http://127.0.0.1:1/file"), progress=False)
    server.cut = len(DATA)
    store.fetch(file, progress=False)
    assert server.sent[-1] == ("bytes=300000-", len(DATA) - 300_000)


def test_local_copies_are_taken_and_checked(store: Store, file: RemoteFile, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(DATA[:5])
    got = store.place(file, tmp_path / "mine")
    assert got.origin == GIVEN and got.path.read_bytes() == DATA[:5]
    assert store.find(file) == got
    (tmp_path / "mine").write_bytes(DATA)
    assert store.place(file, tmp_path / "mine").sha256 == SHA256
    assert store.place(replace(file, sha256=SHA256), tmp_path / "mine").origin == PUBLISHED
    with pytest.raises(UserError, match="is published; try again or give --statistics"):
        store.place(replace(file, sha256="0" * 64), tmp_path / "mine")
    with pytest.raises(UserError, match=r"--statistics .*nothing: no such file"):
        store.place(file, tmp_path / "nothing")


def test_a_folder_that_cannot_be_made_says_so(file: RemoteFile, tmp_path: Path) -> None:
    (tmp_path / "in_the_way").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be written .*set FEWSTEP_CACHE"):
        Store(tmp_path / "in_the_way" / "store").fetch(file, progress=False)
