"""The comparison as one HTML file that needs nothing beside it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..metrics.protocol import Score
from ..readers import read_text
from .markup import filled, script_json
from .table import BEST, SCORES, Column, by_column, columns_of, protocol_notes, shown

TEMPLATE = Path(__file__).with_name("page.html")


def page(record: Mapping[str, Any], folder: Path) -> str:
    """The page of a comparison's record (see `compare`); its pictures are read from `folder` and embedded."""
    rows = record["rows"]
    fields = {
        "title": escape(record["title"]),
        "summary": escape(protocol_notes(rows)),
        "table": table(columns_of(rows), rows),
        "pictures": pictures(record, folder),
        "published": published(record["published"]),
        "protocols": protocols(rows),
        "origin": origin(record),
        "data": script_json(plot_data(rows)),
    }
    return filled(read_text(TEMPLATE), fields)


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """The sortable table; a cell that is sorted by number carries it in data-value."""
    head = "".join(f'<th scope="col"><button type="button">{escape(c.title)}</button></th>' for c in columns)
    body = []
    for row in rows:
        cells = []
        for column in columns:
            value = column.value(row)
            key = value.value if isinstance(value, Score) else value
            number = f' class="number" data-value="{key}"' if isinstance(key, int | float) else ""
            cells.append(f"<td{number}>{escape(shown(column, row))}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def pictures(record: Mapping[str, Any], folder: Path) -> str:
    """Strips of the same captions or classes and noise, one for each model and number of steps."""
    return "".join(_group(strips, folder) for strips in record["strips"])


def _group(strips: Mapping[str, Any], folder: Path) -> str:
    captions = strips["captions"]
    names = "".join(
        f"<span{'' if c['seen'] else ' class=unseen'}>{escape(c['text'])}</span>" for c in captions
    )
    lines = [f'<div class="strip"><span class="label"></span><div class="captions">{names}</div></div>']
    for picture in strips["pictures"]:
        data = base64.b64encode((folder / picture["file"]).read_bytes()).decode()
        n = picture["steps"]
        label = f"{picture['model']}, " + ("condition" if n is None else f"{n} step{'s' * (n > 1)}")
        lines.append(
            f'<div class="strip"><span class="label">{escape(label)}</span>'
            f'<img alt="{escape(label)}" src="data:image/png;base64,{data}"></div>'
        )
    return f'<div class="strips" style="--pictures:{len(captions)}">{"".join(lines)}</div>'


def published(lines: Sequence[Mapping[str, Any]]) -> str:
    """What papers say beside what was measured here."""
    if not lines:
        return "<p>No published number is known for these methods at these steps.</p>"
    body = []
    for line in lines:
        paper = f"{line['metric']} {line['value']:g} on {line['benchmark']}"
        cells = (
            f"<td>{escape(line['method'])}</td>",
            f"<td class=number>{line['steps']}</td>",
            f"<td>{escape(paper)}<br><small>{escape(line['source'])}</small></td>",
            f"<td>{'<br>'.join(escape(h) for h in line['here'])}</td>",
            f"<td>{'yes' if line['same_protocol'] else 'no'}</td>",
        )
        body.append(f"<tr>{''.join(cells)}</tr>")
    titles = ("method", "steps", "expected in the paper", "here", "same protocol?")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def protocols(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every field of each column's protocol."""
    found: dict[str, Score] = {}
    for row in rows:
        found = by_column(row) | found
    return "".join(_details(key, score.to_json()) for key, score in found.items())


def _details(key: str, record: Mapping[str, Any]) -> str:
    fields = record["protocol"].items()
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in fields)
    title = f"{escape(key)} <code>{escape(record['protocol_id'])}</code>"
    return f"<details><summary>{title}</summary><table>{body}</table></details>"


def origin(record: Mapping[str, Any]) -> str:
    """Where the numbers come from."""
    rows = record["rows"]
    versions = "; or ".join(
        dict.fromkeys(", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows)
    )
    machines = "; ".join(dict.fromkeys(row["device"] for row in rows))
    commits = ", ".join(dict.fromkeys(row["commit"][:12] for row in rows))
    verified = "; ".join(sorted({row["verified"] for row in rows if row.get("verified")}))
    where = f"at commit {commits}, on {machines}"
    return escape(f"Made by fewstep compare {where}; {versions}. {verified.capitalize()}.")


def plot_data(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the plots draw: {metrics: [...], models: [{name, points: [{steps, nfe, seconds, trained, scores}]}]}."""
    keys = [k for k in SCORES if any(k in by_column(row) for row in rows)]
    models: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        scores = {k: {"value": s.value, "sd": s.sd} for k, s in by_column(row).items()}
        point = {
            "steps": row["steps"],
            "nfe": row["nfe"],
            "trained": row["training"].get("seconds"),
            "scores": scores,
        }
        models.setdefault(row["model"], []).append(point)
    titles = {c.key: c.title for c in columns_of(rows)}
    return {
        "metrics": [
            {"key": k, "title": titles.get(k, k), "best": BEST[k], "digits": SCORES[k]} for k in keys
        ],
        "models": [{"name": name, "points": points} for name, points in models.items()],
    }
