"""Reports side by side: one table, each of its columns of one protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

from .protocol import Score, same_protocol

COLUMNS = {  # metric: digits
    "KID": 4,
    "KID hold-out": 4,
    "FD": 1,
    "FD-infinity": 1,
    "precision": 3,
    "recall": 3,
    "coverage": 3,
    "NN ratio": 3,
    "caption match": 3,
}


def rows_of(model: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report (from `evaluate` or `read_report`) under a model's name, for markdown_table."""
    shared = {"model": model, "device": report["device"], "batch_size": report["batch_size"]}
    return [{**row, **shared} for row in report["rows"]]


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows (of `rows_of`) and a line with what its numbers mean.

    Raises UserError, naming the field, if the numbers of a column were not measured in the same way. A dash
    stands for a score that a row does not have; timings name their device where it differs.
    """
    if not rows:
        raise ValueError("no rows to tabulate")
    scores = [_by_column(row) for row in rows]
    shown = [c for c in COLUMNS if any(c in s for s in scores)]
    protocols = {c: same_protocol([s[c] for s in scores if c in s]) for c in shown}
    labels = {c: next(s[c].name for s in scores if c in s) for c in shown}
    labels |= {"KID hold-out": f"{labels.get('KID', 'KID')} hold-out"} if "KID hold-out" in labels else {}
    machines = {(row["device"], row["batch_size"]) for row in rows}
    header = ["model", "steps", *(labels[c] for c in shown), "s/image"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row, own in zip(rows, scores, strict=True):
        cells = [row["model"].replace("|", r"\|"), "-" if row["nfe"] is None else str(row["nfe"])]
        cells += [_number(own[c], COLUMNS[c]) if c in own else "-" for c in shown]
        lines.append([*cells, _seconds(row, len(machines) > 1)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    seeds = sorted({row["seeds"] for row in rows})
    repeats = " to ".join(str(s) for s in dict.fromkeys((seeds[0], seeds[-1])))
    first = protocols[shown[0]]
    ids = ", ".join(f"{labels[c]} {protocols[c].id}" for c in shown)
    plural = "" if seeds == [1] else "s"
    return (
        f"{table}\n\n{first.n_gen} pictures a value, {repeats} seed{plural} (mean ± sd); "
        f"reference {first.reference} ({first.n_ref}); KID not x1000. Protocols: {ids}.\n"
    )


def _by_column(row: Mapping[str, Any]) -> dict[str, Score]:
    """A row's scores by column; the split that FD is measured against is the one called training."""
    scores = [Score.from_json(s) for s in row["scores"]]
    train = next(s.protocol.reference for s in scores if s.protocol.metric == "FD")
    out = {}
    for score in scores:
        metric = score.protocol.metric
        out["KID hold-out" if metric == "KID" and score.protocol.reference != train else metric] = score
    return out


def _number(score: Score, digits: int) -> str:
    value = f"{score.value:.{digits}f}"
    return value if score.sd is None else f"{value} ± {score.sd:.{digits}f}"


def _seconds(row: Mapping[str, Any], name_machine: bool) -> str:
    if row["seconds_per_image"] is None:
        return "-"
    seconds = f"{row['seconds_per_image']:.3g}"
    return f"{seconds} ({row['device']}, batch {row['batch_size']})" if name_machine else seconds
