"""Shared by the tests of named data sets: a machine without any, and a server in the publishers' stead."""

import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fewstep.distill.data import named


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """No package (its folder would be tmp_path/fashion-mnist), an empty cache, no network, no FEWSTEP_DATA."""
    source = named.NAMED["fashion-mnist"]
    monkeypatch.setitem(named.NAMED, "fashion-mnist", replace(source, installed=tmp_path / "fashion-mnist"))
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Files(SimpleHTTPRequestHandler):
    """Those of a folder; for a path in `broken` the connection ends after half of what was announced."""

    def __init__(self, *args, broken, **options):
        self.broken = broken
        super().__init__(*args, **options)

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2] if self.path in self.broken else content)


@pytest.fixture
def network(bare_machine, monkeypatch, tmp_path):
    """A server of tmp_path/site, and no ban on using it: its address, and the set of paths that it cuts short."""
    broken: set[str] = set()
    (tmp_path / "site").mkdir()
    handler = partial(Files, directory=str(tmp_path / "site"), broken=broken)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("no_proxy", "*")
    yield f"http://127.0.0.1:{server.server_address[1]}/", broken
    server.shutdown()
    server.server_close()
