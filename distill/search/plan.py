"""`--dry_run` of a search: what it would try, evaluate, hold and download. Reads and fetches no weights."""

from pathlib import Path

from ..config.search import SearchConfig
from ..planning.dry_run import gib, missing_data
from ..reports.entries import size_of
from ..scorers.lite_minilm import SHIPPED
from .candidates import SearchParts
from .student_folder import located


def describe(config: SearchConfig) -> str:
    """What a search would do, as text. UserError for whatever the search itself would refuse."""
    c = config
    found = located(c.student.path)
    folder, run = (found.pipeline, found.run) if found else (Path(c.student.path), None)
    search = c.method.load()(c.method.settings, SearchParts(folder, run, c.steps, c.seed, c.max_candidates))
    final = (c.finalists + 2) * c.final_images
    per_subject = c.max_candidates * c.num_images + final
    rows = [
        ("method", c.method["name"]),
        ("student", c.student.path + (f", {gib(size_of(found.pipeline))} GiB here" if found else "")),
        ("searched", ", then ".join(search.subjects)),
        ("candidates", f"at most {c.max_candidates:,} of each, {c.num_images:,} pictures in {c.steps} steps"),
        ("finalists", f"{c.finalists} and the baselines, {c.final_images:,} pictures of other noise"),
        (
            "network evaluations",
            f"about {len(search.subjects) * per_subject * c.steps:,}, twice with guidance",
        ),
        ("prompts", f"{c.data.name}, split {c.data.split}"),
        ("fitness", fitness(c)),
        ("report", reported(c)),
        ("output_dir", c.output_dir),
    ]
    wanted = [] if found else [(c.student.path, "the pipeline; its size is not known offline")]
    wanted += [(c.student.lora, "a LoRA")] if c.student.lora and not Path(c.student.lora).is_file() else []
    names = dict.fromkeys([c.data.name, *([c.report.name] if c.report and c.report.name else [])])
    wanted += [(name, reason) for name in names for reason in missing_data(name)]
    terms = (c.fitness.text, c.fitness.quality) if c.fitness.kind == "jaq" else ()
    wanted += [(s, "a scorer, unless it is here") for s in terms if s not in (*SHIPPED, "realism")]
    return f"{table(rows)}\n\nmust be downloaded\n{table(wanted or [('nothing', '')], '  ')}"


def fitness(c: SearchConfig) -> str:
    f = c.fitness
    if f.kind == "kid":
        return f"KID in {f.extractor}'s features to {c.data.split}"
    return f"{'log of ' if f.log_text else ''}{f.text} + {f.weight:g} x {f.quality}"


def reported(c: SearchConfig) -> str:
    r = c.report
    if r is None:
        return "none"
    return f"{r.name or c.data.name}, split {r.split}, {r.num_images:,} pictures, {r.seeds} seeds, every cell"


def table(rows: list[tuple[str, str]], indent: str = "") -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{indent}{name:<{width}}  {value}".rstrip() for name, value in rows)
