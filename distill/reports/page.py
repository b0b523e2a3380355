"""The comparison as one HTML file that needs nothing beside it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ..metrics.protocol import Score
from ..readers import read_text
from .markup import filled, script_json
from .table import BEST, SCORES, Column, by_column, columns_of, law, shown
from .words import MEANING, summary, timing

NOBODY: Mapping[str, Any] = {"family": None, "papers": ()}
HERE = Path(__file__).parent


def page(record: Mapping[str, Any], folder: Path) -> str:
    """The page of a comparison's record (see `compare`); its pictures are read from `folder` and embedded."""
    rows, made_by = record["rows"], record.get("made_by", {})
    fields = {
        "style": read_text(HERE / "page.css"),
        "script": read_text(HERE / "page.js"),
        "title": escape(record["title"]),
        "summary": escape(summary(rows)),
        "table": table(columns_of(rows), rows),
        "timing": escape(timing(rows)),
        "pictures": pictures(record, folder),
        "models": models(rows, made_by),
        "published": published(record["published"]),
        "protocols": protocols(rows),
        "origin": origin(record),
        "data": script_json(plot_data(rows, made_by)),
    }
    return filled(read_text(HERE / "page.html"), fields)


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """The sortable table; a cell that is sorted by number carries it in data-value."""
    head = "".join(f'<th scope="col"><button type="button">{escape(c.title)}</button></th>' for c in columns)
    places, body = _places(rows), []
    for row in rows:
        cells = []
        for i, column in enumerate(columns):
            value = column.value(row)
            key = value.value if isinstance(value, Score) else value
            number = f' class="number" data-value="{key}"' if isinstance(key, int | float) else ""
            tag, scope = ("td", "") if i else ("th", ' scope="row"')
            cells.append(f"<{tag}{scope}{number}>{escape(shown(column, row))}</{tag}>")
        body.append(f"<tr{_of(places[row['model']], row['steps'])}>{''.join(cells)}</tr>")
    return (
        "<table><caption>Every score of every model and number of steps</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def pictures(record: Mapping[str, Any], folder: Path) -> str:
    """Strips of the same captions or classes and noise: a part for what they are made from, in it one for each number
    of steps, in it a strip for each model."""
    places = _places(record["rows"])
    return "".join(_part(strips, folder, places) for strips in record["strips"])


def _part(strips: Mapping[str, Any], folder: Path, places: Mapping[str, int]) -> str:
    captions = strips["captions"]
    names = "".join(
        f"<span{'' if c['seen'] else ' class=unseen'}>{escape(c['text'])}</span>" for c in captions
    )
    groups: dict[int | None, list[str]] = {}
    for picture in sorted(strips["pictures"], key=lambda p: p["steps"] or 0):  # in the order of models
        data = base64.b64encode((folder / picture["file"]).read_bytes()).decode()
        model, steps = escape(picture["model"]), picture["steps"]
        groups.setdefault(steps, []).append(
            f'<div class="strip"{_of(places[picture["model"]], steps)}><span class="label">{model}</span>'
            f'<img alt="{model}, {_steps(steps)}" src="data:image/png;base64,{data}"></div>'
        )
    body = "".join(
        f'<div class="group"><h4>{_steps(steps)}</h4>{"".join(lines)}</div>'
        for steps, lines in groups.items()
    )
    made_from = escape(strips["made_from"])
    return (
        f'<h3>made from: {made_from}</h3><div class="scroll tall" role="region" tabindex="0" aria-label='
        f'"Pictures made from {made_from}"><div class="strips" style="--pictures:{len(captions)}"><div class="strip '
        f'head"><span class="label"></span><div class="captions">{names}</div></div>{body}</div></div>'
    )


def models(rows: Sequence[Mapping[str, Any]], made_by: Mapping[str, Any]) -> str:
    """A line for each model: what it was made by, its papers, its recipe."""
    body = []
    for name, i in _places(rows).items():
        row = next(r for r in rows if r["model"] == name)
        config = row.get("config") or {}
        made = made_by.get(name, NOBODY)
        papers = ", ".join(
            f'<a href="https://arxiv.org/abs/{p["arxiv"]}">{escape(p["name"])} {p["arxiv"]}</a>'
            for p in made["papers"]
        )
        recipe = "-"
        if config:
            text = escape(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
            recipe = f'<details id="recipe-{i}"><summary>recipe</summary><pre>{text}</pre></details>'
        cells = [escape(made["family"] or "-"), escape(row["method"] or "-"), papers or "-", recipe]
        line = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f'<tr{_of(i)}><th scope="row">{escape(name)}</th>{line}</tr>')
    titles = ("model", "family", "method", "paper", "recipe")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        "<table><caption>What each model was made by; a recipe is the whole configuration of its run</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def published(lines: Sequence[Mapping[str, Any]]) -> str:
    """What papers say by the protocols of these rows, beside them; nothing where there is none."""
    if not lines:
        return ""
    body = []
    for line in lines:
        paper = f"{line['metric']} {line['value']:g} on {line['benchmark']}"
        cells = (
            f'<th scope="row">{escape(line["method"])}</th>',
            f'<td class="number">{line["steps"]}</td>',
            f"<td>{escape(paper)}<br><small>{escape(line['source'])}</small></td>",
            f"<td>{'<br>'.join(escape(h) for h in line['here'])}</td>",
        )
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{t}</th>' for t in ("method", "steps", "in the paper", "here"))
    return (
        '<h2>Beside the papers</h2><div class="scroll wrap" role="region" tabindex="0" aria-label="Beside the papers">'
        "<table><caption>Numbers of papers by the same protocol; teacher and training may differ</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def protocols(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every field of each column's protocol."""
    titles = {c.key: c.title for c in columns_of(rows)}
    found: dict[str, Score] = {}
    for row in rows:
        found = by_column(row) | found
    return "".join(_details(titles[key], found[key].to_json()) for key in SCORES if key in found)


def _details(title: str, record: Mapping[str, Any]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td>{escape(str(v))}</td></tr>'
        for k, v in record["protocol"].items()
    )
    shown_title = f"{escape(title)} <code>{escape(record['protocol_id'])}</code>"
    return f'<details><summary>{shown_title}</summary><div class="scroll wrap"><table>{body}</table></div></details>'


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


def plot_data(rows: Sequence[Mapping[str, Any]], made_by: Mapping[str, Any]) -> dict[str, Any]:
    """What filter, table by steps and plots need.

    metrics  {key, title, best, digits, meaning}
    models   {name, family, from, made, words, points}: made is "training", "search" or neither, words what the search
             box finds; points are {steps, nfe, trained, scores}, trained in seconds
    """
    keys = [k for k in SCORES if any(k in by_column(row) for row in rows)]
    titles = {c.key: c.title for c in columns_of(rows)}
    found = []
    for name in _places(rows):
        own = [row for row in rows if row["model"] == name]
        method, training = own[0]["method"], own[0]["training"]
        made = made_by.get(name, NOBODY)
        found.append(
            {
                "name": name,
                "family": made["family"] or "none",
                "from": law(own[0]),
                "made": "search" if "candidates" in training else "training" if training else "neither",
                "words": " ".join(
                    [name, method or "", own[0]["export"] or "", *(p["name"] for p in made["papers"])]
                ),
                "points": [
                    {
                        "steps": row["steps"],
                        "nfe": row["nfe"],
                        "trained": training.get("seconds"),
                        "scores": {k: {"value": s.value, "sd": s.sd} for k, s in by_column(row).items()},
                    }
                    for row in own
                ],
            }
        )
    metrics = [
        {"key": k, "title": titles[k], "best": BEST[k], "digits": SCORES[k], "meaning": MEANING[k]}
        for k in keys
    ]
    return {"metrics": metrics, "models": found}


def _places(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Each model's place among the models, by which the page's parts name it."""
    return {name: i for i, name in enumerate(dict.fromkeys(row["model"] for row in rows))}


def _of(model: int, steps: int | None = None) -> str:
    return f' data-model="{model}"' + ("" if steps is None else f' data-steps="{steps}"')


def _steps(steps: int | None) -> str:
    return "condition" if steps is None else f"{steps} step{'s' * (steps > 1)}"
