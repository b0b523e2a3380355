"""Reproducing published constants here, and the stamp by which later reports say so."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import ConfigDict
from typing_extensions import TypedDict

from ..errors import UserError
from ..metrics import features, frechet, inception
from ..metrics.extractor import Extractor
from ..metrics.features import make_extractor
from ..metrics.frechet import Moments, frechet_distance
from ..metrics.inception import RESIZES, SHA256, find_weights, sha256_of
from ..readers import read_json
from . import archives as pictures
from . import published_numbers as checks_module
from .fetched_files import LocalFile, Store, protocols_folder
from .moments_file import extractor_id, import_statistics, moments_of, published_inception_id
from .published_numbers import Check, Side
from .table import STANDARDS

NOT_VERIFIED = "protocol not verified here"
PACKAGES = ("torch", "torch-fidelity", "numpy", "pillow")
CODE = (features, frechet, inception, pictures)


class Stamp(TypedDict):
    """What verified.json says of an Outcome."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    check: str
    extractor_id: str
    expected: float
    value: float
    published: bool
    passed: bool
    versions: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """One constant: what was expected and what came out here, with what."""

    check: str
    extractor: str
    extractor_id: str
    expected: float
    value: float
    tolerance: float
    published: bool
    source: str
    weights_sha256: str
    files: dict[str, str]
    versions: dict[str, str]
    device: str

    @property
    def passed(self) -> bool:
        return abs(self.value - self.expected) <= self.tolerance

    def __str__(self) -> str:
        kind = "published" if self.published else "expected, not published"
        return (
            f"{self.check} {self.extractor}: computed {self.value:.7g}, {kind} {self.expected:.7g} "
            f"(tolerance {self.tolerance:g})"
        )


def verify_metrics(
    names: Sequence[str] = (),
    *,
    extractor: Extractor | None = None,
    checks: Mapping[str, Check] | None = None,
    directory: Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: bool = True,
) -> list[Outcome]:
    """Computes each constant whose files are prepared, stamps the results and returns them.

    names      which checks; all that are prepared if empty
    extractor  the only network to try, where a check has a value for its name; by default those of the checks
    checks     by default `checks.CHECKS`
    directory  by default $FEWSTEP_CACHE/protocols

    Raises UserError when a check is unknown, a named one or all are not prepared, and when a value is off: the
    message has both numbers, and the stamp holds the failure, so that reports say "not verified".
    """
    known = checks_module.CHECKS if checks is None else checks
    root = directory or protocols_folder()
    for name in names:
        if name not in known:
            raise UserError(f"verify-metrics: no check {name!r}; available: {', '.join(known)}")
    outcomes = []
    for name in names or known:
        files = _prepared(root, known[name], required=bool(names))
        if files is None:
            continue
        for wanted, expected in known[name].values.items():
            if extractor is not None and extractor.name != wanted:
                continue
            network = extractor or make_extractor(wanted).to(device)
            a, b = (
                _moments(side, files[side.file.name].path, network, batch_size, progress)
                for side in (known[name].a, known[name].b)
            )
            outcomes.append(_outcome(known[name], network, expected, frechet_distance(a, b), files))
    if not outcomes:
        raise UserError(
            f"verify-metrics: nothing is prepared to verify; run `fewstep prepare-data {next(iter(known))}`"
        )
    _stamp(root, outcomes)
    wrong = [str(outcome) for outcome in outcomes if not outcome.passed]
    if wrong:
        raise UserError(
            f"verify-metrics: {'; '.join(wrong)}; numbers made here are not comparable to papers'"
        )
    return outcomes


def is_verified(what: str | Extractor, *, directory: Path | None = None) -> str:
    """The sentence for reports: "verified here: ..." or "protocol not verified here" and, if it was, why no more.

    what  a protocol's or extractor's name, or a network. Verified means: at least one published constant was
    reproduced with these weights, layer and resize, none failed, and neither they, the packages' versions nor our
    code have changed since.
    """
    wanted = _wanted_id(what)
    entries = [e for e in _read(directory or protocols_folder()) if e["extractor_id"] == wanted]
    if not any(e["published"] for e in entries):
        return NOT_VERIFIED
    now = _versions()
    for entry in entries:
        if not entry["passed"]:
            return f"{NOT_VERIFIED} ({entry['check']} gave {entry['value']:.7g}, not {entry['expected']:.7g})"
        for package, here in now.items():
            if (then := entry["versions"].get(package)) != here:
                changed = f"stamped with {package} {then}, this is {here}; run `fewstep verify-metrics`"
                return f"{NOT_VERIFIED} ({changed})"
    shown = ", ".join(
        f"{e['check']} {e['value']:.7g} ({e['expected']:.7g})" for e in entries if e["published"]
    )
    return f"verified here: {shown}; torch {now['torch']}, torch-fidelity {now['torch-fidelity']}"


def _wanted_id(what: str | Extractor) -> str | None:
    """extractor_id of the network, or of the one of that name if its weights are here and the published ones."""
    if isinstance(what, Extractor):
        return extractor_id(what)
    name = STANDARDS[what].extractor.value if what in STANDARDS else what
    rules = {"inception": "tf1", **{f"inception-{rule}": rule for rule in RESIZES if rule != "tf1"}}
    try:
        return published_inception_id(rules[name]) if sha256_of(find_weights()) == SHA256 else None
    except (KeyError, UserError):
        return None


def _prepared(root: Path, check: Check, required: bool) -> dict[str, LocalFile] | None:
    store = Store(root / check.name)
    found = {file.name: store.find(file) for file in check.files}
    here = {name: file for name, file in found.items() if file is not None}
    if len(here) == len(found):
        return here
    if required:
        lacking = ", ".join(found.keys() - here.keys())
        raise UserError(
            f"verify-metrics: {check.name} lacks {lacking}; run `fewstep prepare-data {check.name}`"
        )
    return None


def _moments(side: Side, path: Path, network: Extractor, batch_size: int, progress: bool) -> Moments:
    if side.kind == "statistics":
        return import_statistics(path, stated_id=f"{side.file.source} {side.file.name}", n=side.count).moments
    return moments_of(network, side.pictures(path), batch_size=batch_size, progress=progress)


def _outcome(
    check: Check, network: Extractor, expected: float, value: float, files: dict[str, LocalFile]
) -> Outcome:
    return Outcome(
        check=check.name,
        extractor=network.name,
        extractor_id=extractor_id(network),
        expected=expected,
        value=value,
        tolerance=check.tolerance,
        published=check.published,
        source=check.source,
        weights_sha256=network.weights_sha256,
        files={name: file.sha256 for name, file in files.items()},
        versions=_versions(),
        device=str(next(network.parameters()).device),
    )


def _versions() -> dict[str, str]:
    """Of the packages that compute the number, and of our code as a hash."""
    code = hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in CODE))
    return {**{package: version(package) for package in PACKAGES}, "code": code.hexdigest()[:12]}


def _path(root: Path) -> Path:
    return root / "verified.json"


def _stamp(root: Path, outcomes: list[Outcome]) -> None:
    """Replaces the entries of the same check and extractor."""
    new = {(o.check, o.extractor_id): {**asdict(o), "passed": o.passed} for o in outcomes}
    kept = [e for e in _read(root) if (e["check"], e["extractor_id"]) not in new]
    part = _path(root).with_suffix(".part")
    part.write_text(json.dumps([*kept, *new.values()], indent=2) + "\n")
    part.replace(_path(root))


def _read(root: Path) -> list[Stamp]:
    try:
        return read_json(_path(root), list[Stamp], remedy="delete it and run `fewstep verify-metrics`")
    except FileNotFoundError:
        return []
