"""All students of one teacher, scored alike: one self-contained page, and the same numbers as JSON, Markdown, CSV and
LaTeX."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config.third_party import quiet
from ..errors import UserError
from ..methods.published import PUBLISHED
from ..settings import Origin, Paper
from ..training.interrupts import run_child
from ..writers import check_writable, write_file, write_report
from .csv_latex import csv_text, latex
from .entries import Entry, offered, read_entry
from .markup import markdown_text
from .opening import choose_device, open_source
from .page import page
from .report import read_report
from .strips import check_data, draw_conditions, draw_strips, strip_inputs
from .table import by_column, by_steps, columns_of, markdown, protocol_notes
from .trained_on import data_for
from .words import timing


def compare(
    entries: Sequence[str],
    output: Path,
    *,
    steps: Sequence[int] = (1, 2, 4),
    teacher: str | None = None,
    teacher_steps: Sequence[int] = (1, 2, 4, 8, 50),
    data: str | None = None,
    num_images: int = 500,
    seeds: int = 3,
    device: str | None = None,
    options: Sequence[str] = (),
    title: str | None = None,
    origins: Mapping[str, Origin] | None = None,
) -> dict[str, Any]:
    """Score every entry by the same protocol and write compare.{html,json,md,csv,tex} into `output`.

    entries        as in `read_entry`; reports are taken as they are and must be of the same protocol
    steps          of students; those that an export does not offer are left out
    teacher        scored at teacher_steps; None: the one that the runs name, "none": no row
    data           as of `evaluate --data`; None: what the runs were trained on
    device         None: cuda if there is one, else cpu
    origins        where each method is from, for the page's families and papers
    options        further flags of `evaluate` (--batch_size 32, --clip lite0-minilm, --trust_remote_code, ...)

    Each model is scored in a process of its own, so that its peak memory is its own; what was scored before comes
    from the cache. The record of compare.json is returned. Raises UserError for whatever the caller can mend, among
    it numbers of different protocols.
    """
    for text in (*entries, data or "", *options, title or "", teacher or ""):
        if not _writable(text):
            raise UserError(f"{text!r}: is not UTF-8 text; give names and folders that are")
    models = [read_entry(e) for e in entries]
    origin = _teacher_of(models, teacher)
    slugs = [_slug(m.name) for m in (*models, *([origin] if origin else []))]
    if len(set(slugs)) < len(slugs):
        twice = next(s for s in slugs if slugs.count(s) > 1)
        raise UserError(f"{twice}: two entries have this name; give one as NAME=PATH")
    jobs = [(m, offered(m, steps)) for m in models]
    if origin is not None:
        jobs.insert(0, (origin, offered(origin, teacher_steps)))
    scored = [m.pipeline for m in models if m.pipeline is not None]
    if data is None and "--protocol" not in options and (scored or (origin and origin.pipeline)):
        found = data_for(scored, origin.pipeline if origin else None)
        data = str(found)
        if found.split != "train" and "--split" not in options:
            options = [*options, "--split", found.split]
    if data is not None or "--protocol" in options:
        check_data(data or "", options)  # before the long work
    check_writable(output / "compare.json")
    quiet()
    rows: list[dict[str, Any]] = []
    shared = ["--num_images", str(num_images), "--seeds", str(seeds), *options]
    shared += [] if "--protocol" in options or data is None else ["--data", data]
    shared += ["--device", device] if device is not None else []
    for model, count in jobs:
        report = _score(model, count, shared, output / "reports")
        rows += _rows(model, report)
    columns_of(rows)  # refuses mixed protocols before the pictures are made
    record: dict[str, Any] = {
        "title": title or _title(origin),
        "call": {"data": data, "num_images": num_images, "seeds": seeds, "options": list(options)},
        "rows": rows,
        "made_by": made_by(rows, origins or {}),
        "strips": _strips(
            [m for m, _ in jobs if m.pipeline is not None], rows, data or "", device, options, output
        ),
        "published": published(rows),
    }
    notes = "\n\n".join(markdown_text(text) for text in (protocol_notes(rows), timing(rows)))
    texts = {
        "compare.json": json.dumps(record, indent=1, allow_nan=False) + "\n",
        "compare.md": f"# {markdown_text(record['title'])}\n\n{by_steps(rows)}\n{markdown(rows)}\n{notes}\n",
        "compare.csv": csv_text(rows),
        "compare.tex": latex(record["title"], rows),
        "compare.html": page(record, output),
    }
    for name, text in texts.items():
        write_file(output / name, text)
    return record


def _teacher_of(models: Sequence[Entry], teacher: str | None) -> Entry | None:
    named = sorted({m.teacher for m in models if m.teacher})
    if teacher == "none" or (teacher is None and not named):
        return None
    if teacher is None and len(named) > 1:
        raise UserError(f"the runs have different teachers ({', '.join(named)}); choose one with --teacher")
    place = teacher or named[0]
    entry = read_entry(place)
    if entry.pipeline is not None and any(m.pipeline == entry.pipeline for m in models):
        return None
    return entry if entry.name.startswith("teacher (") else replace(entry, name=f"teacher ({entry.name})")


def _title(origin: Entry | None) -> str:
    if origin is None:
        return "Few-step students"
    name = Path(origin.pipeline).name if origin.pipeline else origin.name[len("teacher (") : -1]
    return f"Few-step students of {name}"


def _score(model: Entry, steps: Sequence[int], shared: Sequence[str], reports: Path) -> dict[str, Any]:
    if model.report is not None:
        return read_report(model.report)
    assert model.pipeline is not None
    path = reports / f"{_slug(model.name)}.json"
    check_writable(path)
    count = [str(n) for n in steps]
    command = ["-m", "fewstep.distill.cli", "evaluate", model.pipeline, "--steps", *count, *shared]
    print(f"scoring {model.name}", flush=True)
    code = run_child([sys.executable, *command, "--output", str(path)])
    if code:
        raise UserError(f"{model.name}: {model.pipeline} could not be scored; its own error stands above")
    report = {**read_report(path), "model": {"name": model.name, **_made(model)}}
    write_report(report, path)
    return report


def _made(model: Entry) -> dict[str, Any]:
    """What a report alone does not say of a model."""
    return {
        "method": model.method,
        "export": model.export,
        "training": dict(model.training),
        "bytes": model.bytes,
        "config": dict(model.config),
    }


def _rows(model: Entry, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    shared = {
        "model": model.name,
        **_made(model),
        "pipeline_sha256": report.get("pipeline_sha256"),
        "commit": report.get("commit", "unknown"),
        "verified": report.get("verified"),
        "measured": "here" if model.report is None else "before",
        **{k: report[k] for k in ("device", "versions", "batch_size")},
    }
    return [{**row, **shared} for row in report["rows"]]


def _strips(
    models: Sequence[Entry],
    rows: Sequence[Mapping[str, Any]],
    data: str,
    device: str | None,
    options: Sequence[str],
    output: Path,
) -> list[dict[str, Any]]:
    """Pictures of every model, in one group for each thing that models make them from: captions, classes, nothing."""
    groups: dict[str, dict[str, Any]] = {}
    for model in models:
        source = open_source(str(model.pipeline), choose_device(device), "--trust_remote_code" in options)
        calls = {row["steps"]: row["arguments"] for row in rows if row["model"] == model.name}
        inputs, seen = strip_inputs(source, data, options)
        names = [{"text": c, "seen": i < seen} for i, c in enumerate(inputs.captions)]
        group = groups.setdefault(inputs.conditioning, {"captions": names, "pictures": []})
        place, files = (output / "pictures", _slug(model.name)), dict[int | None, str]()
        if inputs.controlled:
            side = rows[0]["scores"][0]["protocol"]["image_size"]
            files[None] = draw_conditions(inputs, side, *place)
        files |= draw_strips(source, calls, inputs, *place)
        group["pictures"] += [{"model": model.name, "steps": n, "file": file} for n, file in files.items()]
    return [{"made_from": k, **group} for k, group in groups.items()]


def made_by(rows: Sequence[Mapping[str, Any]], origins: Mapping[str, Origin]) -> dict[str, dict[str, Any]]:
    """{"family", "papers": [{"name", "arxiv"}]} of each model whose method is known, by its run."""
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        origin = origins.get((row["method"] or "").partition(",")[0])
        if origin is not None and row["model"] not in out:
            papers = papers_of(origin, row.get("config") or {})
            out[row["model"]] = {
                "family": origin.family,
                "papers": [{"name": p.name, "arxiv": p.arxiv} for p in papers],
            }
    return out


def papers_of(origin: Origin, config: Mapping[str, Any]) -> list[Paper]:
    """Without a configuration only what no key would change: `ict` is the loss of four papers."""
    return origin.papers(config) if config or not origin.variants else []


def published(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the papers of the compared methods say by the protocol that rows were measured by, at as many steps, beside
    our numbers."""
    out = []
    for name in dict.fromkeys(row["method"].partition(",")[0] for row in rows if row["method"]):
        ours = [row for row in rows if (row["method"] or "").partition(",")[0] == name]
        for paper in PUBLISHED.get(name, ()):
            here = [
                f"{row['model']}: {score.name} {score.value:.4g}"
                for row in ours
                for score in by_column(row).values()
                if (row["steps"], score.name) == (paper.steps, paper.metric)
                and (score.protocol.reference, score.protocol.conditioning) == paper.standard
            ]
            if here:
                out.append({"method": name, **asdict(paper), "here": here})
    return out


def _writable(text: str) -> bool:
    """False for arguments whose bytes are no UTF-8, which Python holds as lone surrogates."""
    try:
        return bool(text.encode()) or True
    except UnicodeEncodeError:
        return False


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
