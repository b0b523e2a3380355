"""What a search found, measured: the winner and its baselines on other prompts and noise than the search's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config.search import SearchConfig
from ..metrics.protocol import Score
from ..reports.entries import kind_of, size_of
from ..reports.evaluate import evaluate
from ..reports.markup import markdown_text
from ..reports.table import by_column, markdown, protocol_notes
from ..training.model_card import markdown as plain_table
from ..training.model_card import with_scores
from ..writers import write_file
from .candidates import Candidate, Search
from .fitness import balance


@dataclass(frozen=True)
class Cell:
    """One exported pipeline of a search.

    held     bytes of its network's tensors in memory
    changed  parts that are not the student's
    """

    subject: str
    name: str
    folder: str
    candidate: Candidate
    held: int
    changed: list[str]

    @property
    def key(self) -> str:
        return f"{self.subject}-{self.name}"


def report(
    config: SearchConfig, search: Search, run: Path, cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Scores every cell, writes report.json and report.md, and puts the table into each cell's card; the text."""
    spread = {
        subject: balance(
            config.fitness, [r for r in rows if (r["subject"], r["phase"]) == (subject, "search")]
        )
        for subject in search.subjects
    }
    record: dict[str, Any] = {"cells": [asdict(c) for c in cells], "spread": spread, "verdicts": []}
    text = f"exported {run / 'pipeline'}"
    r = config.report
    if r is not None:
        scored, kids = [], {}
        for cell in cells:
            made = evaluate(
                str(run / cell.folder), data=r.name or config.data.name, split=r.split, holdout=r.holdout,
                num_images=r.num_images, steps=[config.steps], seeds=r.seeds, clip=r.clip,
                batch_size=config.batch_size, guidance_scale=config.guidance_scale,
                output=run / "reports" / f"{cell.key}.json", trust_remote_code=config.trust_remote_code,
                data_options={
                    k: getattr(config.data, k) for k in ("image_column", "caption_column", "center_crop")
                },
            )  # fmt: skip
            scored.append(table_row(cell, config, made, run / cell.folder))
            kids[cell.key] = kid_of(made["rows"][0])
        record["rows"], record["verdicts"] = scored, search.verdicts(kids)
        memory = plain_table(
            ("model", "bytes on disk", "of the network in memory"),
            [(c.key, f"{size_of(run / c.folder):,}", f"{c.held:,}") for c in cells],
        )
        text = "\n".join(
            [
                markdown(scored),
                markdown_text(protocol_notes(scored)) + "\n",
                memory,
                *(f"- {v}" for v in record["verdicts"]),
                apart(config),
            ]
        )
        for cell in cells:
            own = [row for row in scored if row["model"] == cell.key]
            with_scores(run / cell.folder, text + "\n", own)
        write_file(run / "report.md", text + "\n")
    write_file(run / "report.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    return text


def apart(config: SearchConfig) -> str:
    """What the search saw and what the report saw."""
    assert config.report is not None
    d, r = config.data, config.report
    return "\n" + markdown_text(
        f"Searched on prompts and pictures of {d.name}/{d.split} and noise of its own (seed {config.seed}, "
        f"{config.num_images} pictures, finalists {config.final_images}); reported on {r.name or d.name}/{r.split}, "
        f"{r.num_images} pictures, {r.seeds} other seeds. The deviation of a difference is that of its values seed by "
        "seed: all rows have the same prompts and noise."
    )


def table_row(cell: Cell, config: SearchConfig, made: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row as `metrics.table` takes it."""
    shared = {
        "model": cell.key,
        "method": config.method["name"],
        "export": kind_of(folder),
        "training": {},
        "bytes": size_of(folder),
        "device": made["device"],
        "batch_size": made["batch_size"],
    }
    return {**made["rows"][0], **shared}


def kid_of(row: Mapping[str, Any]) -> Score:
    return by_column(row)["KID"]
