"""A comparison for spreadsheets and papers: CSV with every digit, LaTeX with deviations."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics.protocol import Score
from .table import BEST, Column, columns_of, score_columns

UNITS = {"memory": "bytes", "training_seconds": "s", "bytes": "bytes"}
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}",
    **{c: "\\" + c for c in "&%$#_{}"},
    # Brackets after a line's end would be an argument of it.
    "[": "{[}", "]": "{]}",
}  # fmt: skip


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a line; a score has a column for its value and one for its deviation; a gap is empty."""
    columns = columns_of(rows)
    scores = {c.key for c in score_columns(rows)}
    head, lines = [], []
    for c in columns:
        unit = f" ({UNITS[c.key]})" if c.key in UNITS else ""
        head += [c.title, f"{c.title} sd"] if c.key in scores else [c.title + unit]
    for row in rows:
        line: list[Any] = []
        for c in columns:
            value = c.value(row)
            if c.key in scores:
                line += ["", ""] if value is None else [value.value, "" if value.sd is None else value.sd]
            else:
                line.append("" if value is None else value)
        lines.append(line)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *lines])
    return out.getvalue()


def latex_text(text: str) -> str:
    """Text as one line of LaTeX that shows it."""
    return "".join(LATEX.get(c, c) for c in " ".join(text.split()))


def latex(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    r"""Two tables for booktabs (\input after \usepackage{booktabs}): the first score by steps, the best of each number
    of steps bold, and all scores."""
    first, *_ = scores = score_columns(rows)
    steps = sorted({row["steps"] for row in rows}, key=lambda n: n or 0)
    found = {(row["model"], row["steps"]): first.value(row) for row in rows}
    best = {n: _best(first, [s for (_, m), s in found.items() if m == n and s]) for n in steps}
    by_steps = [
        [latex_text(first.title), *("pictures" if n is None else f"{n} step{'s' * (n > 1)}" for n in steps)]
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [_cell(first, found.get((model, n)), best[n]) for n in steps]
        by_steps.append([latex_text(model), *cells])
    every = [["model", "steps", "NFE", *(latex_text(c.title) for c in scores)]]
    for row in rows:
        counts = ["--" if row[k] is None else str(row[k]) for k in ("steps", "nfe")]
        every.append([latex_text(row["model"]), *counts, *(_cell(c, c.value(row)) for c in scores)])
    caption = latex_text(title)
    return (
        "% \\usepackage{booktabs}; XeLaTeX or LuaLaTeX where names are not Latin\n"
        + _tabular(by_steps, f"{caption}: {latex_text(f'{first.title}, {BEST[first.key]}')}")
        + "\n"
        + _tabular(every, f"{caption}: all scores")
    )


def _best(column: Column, scores: Sequence[Score]) -> Score | None:
    """None where there is nothing to compare with."""
    sign = -1 if BEST[column.key].startswith("higher") else 1
    return min(scores, key=lambda s: sign * s.value) if len(scores) > 1 else None


def _cell(column: Column, score: Score | None, best: Score | None = None) -> str:
    if score is None:
        return "--"
    value, plus_minus, sd = column.text(score).partition(" ± ")
    value = rf"\mathbf{{{value}}}" if score is best else value
    return rf"${value} \pm {sd}$" if plus_minus else f"${value}$"


def _tabular(lines: Sequence[Sequence[str]], caption: str) -> str:
    head, *body = (" & ".join(line) + r" \\" for line in lines)
    columns = "l" + "r" * (len(lines[0]) - 1)
    return "\n".join(
        [
            r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
        ]
    )  # fmt: skip
