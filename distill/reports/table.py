"""Reports side by side: tables, each of whose columns is of one protocol."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..metrics.protocol import Score, comparable
from ..scorers.image_text import CLIP_SCORE, CLIP_SCORE_HESSEL, COSINE
from .markup import markdown_text

SCORES = {  # metric: digits
    "KID": 4,
    "KID hold-out": 4,
    "FD": 1,
    "FD-infinity": 1,
    "image-text": 4,
    "image-text of classes": 4,
    "precision": 3,
    "recall": 3,
    "coverage": 3,
    "NN ratio": 3,
    "caption match": 3,
    "condition error": 4,
}
SUFFIX = {"KID hold-out": " hold-out", "image-text of classes": " of classes"}  # of scores of one name
IMAGE_TEXT = {m.metric for m in (COSINE, CLIP_SCORE, CLIP_SCORE_HESSEL)}
BEST = dict.fromkeys(SCORES, "higher is better") | {
    **dict.fromkeys(("KID", "KID hold-out", "FD", "FD-infinity", "condition error"), "lower is better"),
    "NN ratio": "near 1 is best",
}


@dataclass(frozen=True)
class Column:
    """A column of a comparison. value: what is sorted and plotted, None for a gap; text: what is shown."""

    key: str
    title: str
    value: Callable[[Mapping[str, Any]], Any]
    text: Callable[[Any], str]


def rows_of(model: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report (from `evaluate` or `read_report`) under a model's name, for markdown_table."""
    shared = {"model": model, "device": report["device"], "batch_size": report["batch_size"]}
    return [{**row, **shared} for row in report["rows"]]


def score_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of the scores that some row has; values are Scores.

    Raises UserError, naming the field, if the numbers of a column were not measured in the same way; what the pictures
    were made from may differ.
    """
    scores = [by_column(row) for row in rows]
    out = []
    for key, digits in SCORES.items():
        found = [s[key] for s in scores if key in s]
        if found:
            comparable(found)
            out.append(Column(key, found[0].name + SUFFIX.get(key, ""), _score_of(key), _digits(digits)))
    return out


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """All columns of a comparison's rows; errors as in `score_columns`."""
    several = len({(row["device"], row["batch_size"]) for row in rows}) > 1

    def training(key: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: row["training"].get(key)

    def memory(row: Mapping[str, Any]) -> int | None:
        return row["peak_memory"]["bytes"]

    out = [
        Column("model", "model", lambda r: r["model"], str),
        Column("method", "method", lambda r: r["method"], str),
        Column("export", "export", lambda r: r["export"], str),
        *([Column("law", "made from", law, str)] if len({law(row) for row in rows}) > 1 else []),
        Column("steps", "steps", lambda r: r["steps"], str),
        Column("nfe", "NFE", lambda r: r["nfe"], str),
        *score_columns(rows),
        Column("seconds", "s/image", lambda r: r["seconds_per_image"], lambda v: f"{v:.3g}"),
        Column("memory", "peak memory", memory, _size),
        Column("training_steps", "training steps", training("steps"), lambda v: f"{v:,}"),
        Column("training_seconds", "training or search", training("seconds"), _duration),
        Column("trained", "trained parameters", training("trained_parameters"), _count),
        Column("bytes", "download", lambda r: r["bytes"], _size),
    ]
    if several:
        out.append(Column("device", "device, batch", lambda r: f"{r['device']}, {r['batch_size']}", str))
    return [c for c in out if any(c.value(row) is not None for row in rows)]


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows (of `rows_of`) and a line with what its numbers mean.

    Raises UserError, naming the field, if the numbers of a column were not measured in the same way. A dash
    stands for a score that a row does not have; timings name their device where it differs.
    """
    if not rows:
        raise ValueError("no rows to tabulate")
    machines = {(row["device"], row["batch_size"]) for row in rows}

    def seconds(row: Mapping[str, Any]) -> Any:
        value = row["seconds_per_image"]
        where = f" ({row['device']}, batch {row['batch_size']})" if len(machines) > 1 else ""
        return None if value is None else f"{value:.3g}{where}"

    columns = [
        Column("model", "model", lambda r: r["model"], str),
        Column("steps", "steps", lambda r: r["steps"], str),
        *score_columns(rows),
        Column("seconds", "s/image", seconds, str),
    ]
    return f"{_table(columns, rows)}\n{markdown_text(protocol_notes(rows))}\n"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a comparison."""
    return _table(columns_of(rows), rows)


def by_steps(rows: Sequence[Mapping[str, Any]]) -> str:
    """A model a line, a number of steps a column: the first score that rows have, KID where it is among them."""
    first = score_columns(rows)[0]
    cells: dict[str, dict[int | None, str]] = {}
    for row in rows:
        cells.setdefault(row["model"], {})[row["steps"]] = shown(first, row)
    steps = sorted({row["steps"] for row in rows}, key=lambda n: n or 0)
    titles = ["pictures" if n is None else f"{n} step{'s' * (n > 1)}" for n in steps]
    lines = [[first.title, *titles], ["---", *["---:"] * len(steps)]]
    lines += [[name, *[found.get(n, "") for n in steps]] for name, found in cells.items()]
    return _lines(lines)


def protocol_notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """The plain text below a table: how many pictures, seeds, made from what, which reference, each column's
    protocol."""
    columns = score_columns(rows)
    seeds = sorted({row["seeds"] for row in rows})
    repeats = " to ".join(str(s) for s in dict.fromkeys((seeds[0], seeds[-1])))
    protocols = {c.title: next(s for r in rows if (s := c.value(r))).protocol for c in columns}
    ids = ", ".join(f"{title} {protocol.id}" for title, protocol in protocols.items())
    first = next(iter(protocols.values()))
    plural = "" if seeds == [1] else "s"
    return (
        f"{first.n_gen} pictures a value (precision, recall, coverage: at most as many as the reference), "
        f"{repeats} seed{plural} (mean ± sd), conditioning: {'; '.join(dict.fromkeys(law(r) for r in rows))}; "
        f"reference {first.reference} ({first.n_ref}); KID not x1000. Protocols: {ids}."
    )


def law(row: Mapping[str, Any]) -> str:
    """What the pictures of a row were made from."""
    return str(row["scores"][0]["protocol"]["conditioning"])


def by_column(row: Mapping[str, Any]) -> dict[str, Score]:
    """A row's scores by column; the split that FD is measured against is the one called training."""
    scores = [Score.from_json(s) for s in row["scores"]]
    train = next(s.protocol.reference for s in scores if s.protocol.metric == "FD")
    out = {}
    for score in scores:
        metric = score.protocol.metric
        if metric in IMAGE_TEXT:
            metric = "image-text" if score.protocol.conditioning != "class" else "image-text of classes"
        out["KID hold-out" if metric == "KID" and score.protocol.reference != train else metric] = score
    return out


def shown(column: Column, row: Mapping[str, Any]) -> str:
    """A cell's text."""
    value = column.value(row)
    return "-" if value is None else column.text(value)


def _table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    texts = {"model", "method", "export", "law", "device"}
    lines = [[c.title for c in columns], ["---" if c.key in texts else "---:" for c in columns]]
    lines += [[shown(c, row) for c in columns] for row in rows]
    return _lines(lines)


def _lines(cells: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(markdown_text(c) for c in line) + " |\n" for line in cells)


def _score_of(key: str) -> Callable[[Mapping[str, Any]], Score | None]:
    return lambda row: by_column(row).get(key)


def _digits(digits: int) -> Callable[[Score], str]:
    def text(score: Score) -> str:
        value = f"{score.value:.{digits}f}"
        return value if score.sd is None else f"{value} ± {score.sd:.{digits}f}"

    return text


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _count(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 10**5 else f"{count:,}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
