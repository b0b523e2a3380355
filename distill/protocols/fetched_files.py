"""Files that a measurement needs: fetched by address, checked by hash, pinned where no hash is published."""

import http.client
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from filelock import FileLock
from tqdm.auto import tqdm
from typing_extensions import TypedDict

from ..data.cache import cache_directory
from ..data.records import UNWRITABLE
from ..errors import UserError
from ..metrics.inception import sha256_of
from ..readers import read_json, read_text

PUBLISHED, PINNED, GIVEN = "hash as published", "pinned here, not published", "given here, pinned"
TIMEOUT = 30.0  # seconds without an answer
CHUNK = 1 << 20


class Pin(TypedDict):
    """What files.lock.json says of a file."""

    sha256: str
    origin: str
    address: NotRequired[str]


@dataclass(frozen=True)
class RemoteFile:
    """name: in the store; address: None if none is known; source: who states it; option: gives a local copy.

    sha256 is the hash that `source` or its publisher states, None if none is published.
    """

    name: str
    address: str | None
    source: str
    sha256: str | None = None
    option: str = "--statistics"

    @property
    def remedy(self) -> str:
        return f"give {self.option} PATH"


@dataclass(frozen=True)
class LocalFile:
    """A file in the store with its hash, and whether that was published, pinned or given."""

    name: str
    path: Path
    sha256: str
    origin: str

    def __str__(self) -> str:
        return f"{self.path}: sha256 {self.sha256[:12]} ({self.origin})"


def protocols_folder() -> Path:
    """$FEWSTEP_CACHE/protocols, where prepared files and stamps lie."""
    return cache_directory() / "protocols"


class Store:
    """One folder of prepared files; `files.lock.json` in it pins their hashes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock_path = folder / "files.lock.json"

    def find(self, file: RemoteFile) -> LocalFile | None:
        """The file if it is here, None if not. Raises UserError if it is not what was pinned."""
        path, pin = self.folder / file.name, self._pins().get(file.name)
        if not path.is_file():
            return None
        sha256, expected = sha256_of(path), file.sha256 or (pin["sha256"] if pin else None)
        if expected is None:
            raise UserError(f"{path}: in the folder without having been prepared; move it and {file.remedy}")
        if sha256 != expected:
            raise UserError(
                f"{path}: sha256 {sha256[:12]}, but {expected[:12]} was expected; delete it and prepare again"
            )
        return LocalFile(file.name, path, sha256, pin["origin"] if pin and not file.sha256 else PUBLISHED)

    def fetch(self, file: RemoteFile, *, progress: bool = True) -> LocalFile:
        """The file, from here or from its address; what came of it before an interruption is kept and resumed.

        Raises UserError without an address, a network or space, on an HTTP error, on a file cut short and on a
        hash other than the published or pinned one.
        """
        with self._writable():
            found = self.find(file)
            if found is not None:
                return found
            if file.address is None:
                raise UserError(f"{file.name}: no address known; {file.remedy}")
            part = self.folder / f".{file.name}.part"
            _download(file, part, progress)
            return self._accept(file, part, PUBLISHED if file.sha256 else PINNED)

    def place(self, file: RemoteFile, path: Path) -> LocalFile:
        """A local copy in the file's stead. Raises UserError if it is missing or not the published file."""
        if not path.is_file():
            raise UserError(f"{file.option} {path}: no such file; give one that is there")
        with self._writable():
            part = self.folder / f".{file.name}.given"
            shutil.copyfile(path, part)
            self._unpin(file)
            return self._accept(file, part, PUBLISHED if file.sha256 else GIVEN)

    def drop(self, file: RemoteFile) -> None:
        """Removes the file and its pin, if it is here."""
        with self._writable():
            self._unpin(file)
            (self.folder / file.name).unlink(missing_ok=True)

    def _accept(self, file: RemoteFile, part: Path, origin: str) -> LocalFile:
        """Checks the hash, pins it and moves the file into place."""
        pins = self._pins()
        sha256 = sha256_of(part)
        pin = pins.get(file.name)
        expected = file.sha256 or (pin["sha256"] if pin else None)
        if expected is not None and sha256 != expected:
            part.unlink()
            stated = "published" if file.sha256 else "pinned here earlier"
            raise UserError(
                f"{file.name}: sha256 {sha256[:12]}, but {expected[:12]} is {stated}; try again or {file.remedy}"
            )
        pins[file.name] = {"sha256": sha256, "origin": origin, "address": file.address or ""}
        self._write_pins(pins)
        part.replace(self.folder / file.name)
        return LocalFile(file.name, self.folder / file.name, sha256, origin)

    def _pins(self) -> dict[str, Pin]:
        try:
            return read_json(self.lock_path, dict[str, Pin], remedy="delete it and prepare again")
        except FileNotFoundError:
            return {}

    def _unpin(self, file: RemoteFile) -> None:
        self._write_pins({name: pin for name, pin in self._pins().items() if name != file.name})

    def _write_pins(self, pins: dict[str, Pin]) -> None:
        part = self.lock_path.with_suffix(".part")
        part.write_text(json.dumps(pins, indent=2, sort_keys=True) + "\n")
        part.replace(self.lock_path)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                yield
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); free some space or set FEWSTEP_CACHE"
            ) from None


def _download(file: RemoteFile, part: Path, progress: bool) -> None:
    """Appends to `part` what it lacks of the file; starts anew when the server has another version or no ranges."""
    assert file.address is not None
    tag_path = part.with_suffix(".tag")
    tag = read_text(tag_path, remedy="delete it and try again") if tag_path.exists() else ""
    start = part.stat().st_size if part.is_file() and (tag or file.sha256) else 0
    headers = {"User-Agent": "fewstep"}
    if start:
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": tag} if tag else {})
    request = urllib.request.Request(file.address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.headers.get("Content-Range", "").split("-")[0] != f"bytes {start}":
                start = 0
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length else None
            tag = answer.headers.get("ETag", "")
            tag_path.write_text("" if tag.startswith("W/") else tag)
            _append(answer, part, start, total, file.name, progress)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            part.unlink()
            return _download(file, part, progress)
        raise UserError(f"{file.name}: {file.address} answered {error.code}; {file.remedy}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())[:100]
        raise UserError(
            f"{file.name}: {file.address} cannot be reached ({reason}); try again with a network or {file.remedy}"
        ) from None
    done = part.stat().st_size
    if total is not None and done != total:
        raise UserError(f"{file.name}: cut short at {done} of {total} bytes; try again to resume")
    tag_path.unlink()


def _append(
    answer: http.client.HTTPResponse, part: Path, start: int, total: int | None, name: str, progress: bool
) -> None:
    with (
        part.open("ab" if start else "wb") as out,
        tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=not progress) as bar,
    ):
        while chunk := answer.read(CHUNK):
            out.write(chunk)
            bar.update(len(chunk))
