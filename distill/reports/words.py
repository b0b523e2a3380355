"""What a comparison's head and footnotes say in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from .table import law, score_columns

MEANING = {
    "KID": "distance between the features of generated pictures and the reference's",
    "KID hold-out": "the same distance to pictures that no model was trained on",
    "FD": "Frechet distance between the features of generated pictures and the reference's",
    "FD-infinity": "Frechet distance, extrapolated to infinitely many pictures",
    "image-text": "how well pictures fit the captions that they were made from",
    "image-text of classes": "how well pictures of models of classes fit the captions of the same rows",
    "precision": "share of generated pictures that lie among real ones",
    "recall": "share of real pictures that lie among generated ones",
    "coverage": "share of real pictures with a generated one near by",
    "NN ratio": "distance to the nearest training picture over that of unseen real ones; below 1 means memorising",
    "caption match": "share of pictures nearer to the real picture of their caption than to another's",
    "condition error": "difference between the condition and the same condition taken from the picture",
}


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The head of a page: how many models, what a value is, and what it is measured against."""
    models = len({row["model"] for row in rows})
    first = score_columns(rows)[0]
    protocol = next(score for row in rows if (score := first.value(row))).protocol
    seeds = sorted({row["seeds"] for row in rows})
    if seeds == [1]:
        value = f"A value is of {protocol.n_gen:,} pictures and one noise seed"
    else:
        repeats = " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))
        value = (
            f"A value is the mean ± standard deviation over {repeats} noise seeds, {protocol.n_gen:,} pictures "
            "each"
        )
    laws = list(dict.fromkeys(law(row) for row in rows))
    return (
        f"{models} model{'s' * (models > 1)}. {value}, made from: {'; '.join(laws)}. {first.title} is the distance to "
        f"the {protocol.n_ref:,} pictures of {protocol.reference}."
    )


def timing(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far seconds per picture may be compared."""
    machines = dict.fromkeys(f"{row['device']}, batch {row['batch_size']}" for row in rows)
    before = {row["model"] for row in rows if row.get("measured") == "before"}
    timed = {row["model"] for row in rows}
    text = "s/image is the median time of the pipeline's call over the pictures of a batch; "
    if len(machines) > 1:
        text += (
            f"it was measured on different devices ({'; '.join(machines)}): compare it within one of them."
        )
    elif len(timed) == 1:
        text += f"measured on {next(iter(machines))}."
    elif before:
        which = "all models" if before == timed else ", ".join(sorted(before))
        text += (
            f"of {which} it was measured in different runs, each at a time of its own, on {next(iter(machines))}: "
            "other work on the machine lengthens it, so small differences mean nothing."
        )
    else:
        text += (
            f"the models were measured one after another on {next(iter(machines))}; what was in the cache has the "
            "time of its first run."
        )
    return text
