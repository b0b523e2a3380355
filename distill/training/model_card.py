"""The README.md of an exported folder: what it is, pictures, the lines that load it, how it was made, what to cite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...pipelines.export import KOHYA, Export
from ..config.method import as_tree
from ..config.run import RunConfig
from ..config.search import SearchConfig
from ..settings import Paper, StudentSettings, TeacherSettings
from ..writers import write_file
from .card_code import PROMPT, adapter_loading_lines, is_quantised, loading_lines, package_lines, takes_prompt
from .card_head import front_matter, search_front_matter, with_results
from .licence import licence_of
from .public_names import data_line, public, published, teacher_line

GRID, SETTINGS = "samples.png", "config.yaml"  # beside the card
PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "accelerate", "peft")


@dataclass(frozen=True)
class Made:
    """What a card says beside the configuration.

    training  what it took, as exported.json has it
    prompts   captions to show: of the example call, and of the columns of the pictures
    pictures  whether GRID lies beside the card
    """

    step: int
    training: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    pictures: bool = False

    @property
    def prompt(self) -> str:
        return next((p for p in self.prompts if p), PROMPT)


def run_card(config: RunConfig, export: Export, made: Made) -> str:
    """The card of a finished or interrupted run; scores are added by `with_scores` when they are known."""
    out = [front_matter(config, export), title(config, export), *picture_lines(made, takes_prompt(export))]
    if export.sampling:
        out += [
            "```python\n" + loading_lines(export, prompt=made.prompt) + "```\n",
            *package_lines(export.model),
        ]
        out += ["## Steps\n", steps_table(export.sampling), *checked_lines(export)]
    out += ["## Training\n", training_table(config, made), *citation(config)]
    return "\n".join(out)


def adapter_card(config: RunConfig, export: Export, made: Made) -> str:
    """The card of a LoRA's folder."""
    out = [
        front_matter(config, export, adapter=True),
        title(config, export, "a LoRA"),
        *picture_lines(made, prompted=True),
        "```python\n" + adapter_loading_lines(config, export, prompt=made.prompt) + "```\n",
        "## Steps\n",
        steps_table(export.sampling),
        *checked_lines(export),
        *(
            [f"`{KOHYA}/` beside this folder holds the same LoRA in the key layout of kohya and ComfyUI.\n"]
            if export.adapter is not None and export.adapter.component == "unet"
            else []
        ),
        "## Training\n",
        training_table(config, made),
        *citation(config),
    ]
    return "\n".join(out)


def search_card(
    config: SearchConfig,
    pipeline: Any,
    sampling: dict[str, dict[str, Any]],
    notes: Sequence[tuple[str, str]],
    own: bool,
    student: Path,
    made: Made,
) -> str:
    """The card of a pipeline that a search found; own: whether its folder holds code; student: the folder that it is
    made from."""
    name = config.method["name"]
    # without it the integer weights' network opens in bfloat16
    options = ", dtype=torch.float32" if is_quantised(pipeline) else ""
    export = Export(pipeline, sampling=sampling)
    rows = [
        ("method", called(config)),
        ("student", Path(config.student.path).name),
        ("found for", f"{config.steps} network evaluations; for no other number"),
        *notes,
        ("searched on", f"{public(config.data.name)}, split {config.data.split}, seed {config.seed}"),
        ("fitness", fitness_line(config)),
        *cost_rows(made.training),
        *settings_rows(),
    ]
    out = [
        search_front_matter(student, name),
        f"# {Path(config.output_dir).name}{few_steps(sampling)} ({name_of(config)} of "
        f"{Path(config.student.path).name})\n",
        *picture_lines(made, takes_prompt(export)),
        "```python\n" + loading_lines(export, own=own, options=options, prompt=made.prompt) + "```\n",
        *package_lines(pipeline),
        "## Steps\n",
        steps_table(sampling),
        "## Search\n",
        markdown(("what", "value"), rows),
        *citation(config),
    ]
    return "\n".join(out)


def title(config: RunConfig, export: Export, kind: str = "") -> str:
    """ "# NAME in 1 to 4 steps (LCM of TEACHER)"."""
    origin = f"of {public(config.teacher.path)}" if config.teacher else f"on {public(config.data.name)}"
    what = f"{kind}, " if kind else ""
    return (
        f"# {Path(config.output_dir).name}{few_steps(export.sampling)} ({what}{name_of(config)} {origin})\n"
    )


def few_steps(sampling: Mapping[str, Any]) -> str:
    """ " in 1 to 4 steps"; "" where calls take any number."""
    steps = sorted(int(n) for n in sampling if n.isdigit())
    if not steps:
        return ""
    first, last = steps[0], steps[-1]
    return f" in {first} step{'s' * (first > 1)}" if first == last else f" in {first} to {last} steps"


def picture_lines(made: Made, prompted: bool) -> list[str]:
    """The grid by a link that holds in the folder and on the hub, and what its columns show."""
    if not made.pictures:
        return []
    shown = [" ".join(p.split()).replace("`", "'") for p in made.prompts] if prompted else []
    columns = f"Columns: {', '.join(f'`{p}`' for p in shown)}.\n" if any(shown) else ""
    return [
        f"![Pictures of this model, a row for each number of steps]({GRID})\n",
        *([columns] if columns else []),
    ]


def checked_lines(export: Export) -> list[str]:
    return [f"Checked at export: {export.checked}.\n"] if export.checked else []


def papers_of(config: RunConfig | SearchConfig) -> list[Paper]:
    """What a run follows by its settings: of `ict` with `curriculum: continuous` ECT."""
    origin = config.method.settings.origin
    return origin.papers(as_tree(config)) if origin else []


def name_of(config: RunConfig | SearchConfig) -> str:
    """What the field calls a run's method; its key where no paper has it."""
    papers = papers_of(config)
    return papers[-1].name if papers else str(config.method["name"])


def citation(config: RunConfig | SearchConfig) -> list[str]:
    """The papers of a run in BibTeX."""
    entries = "\n".join(paper.bibtex() for paper in papers_of(config))
    return [f"## Cite\n\n```bibtex\n{entries}\n```\n"] if entries else []


def called(config: RunConfig | SearchConfig) -> str:
    """ "ict (ECT)"."""
    key, name = config.method["name"], name_of(config)
    return str(key) if name.lower() == key else f"{key} ({name})"


def converted(student: StudentSettings) -> str:
    """How a student came to predict something else than its teacher."""
    return f"{student.prediction} learnt in the first {student.conversion_steps:,} steps"


def fitness_line(config: SearchConfig) -> str:
    f = config.fitness
    if f.kind == "kid":
        return f"KID ({f.extractor}) to {config.data.split}, lower is better"
    text = f"log({f.text})" if f.log_text else f.text
    return f"{text} + {f.weight:g} x {f.quality}"


def training_table(config: RunConfig, made: Made) -> str:
    """How the student was made."""
    teacher = teacher_line(published(config.teacher)) if config.teacher else "none"
    rows = [
        ("method", called(config)),
        ("teacher", teacher),
        *([("licence of the teacher", licence_line(config.teacher))] if config.teacher else []),
        ("student", config.student.kind),
        *([("prediction", converted(config.student))] if config.student.prediction else []),
        ("data", data_line(published(config.data))),
        ("training steps", f"{made.step} of {config.max_train_steps}"),
        ("batch", made.training.get("batch", config.train_batch_size * config.gradient_accumulation_steps)),
        ("learning rate", config.learning_rate),
        ("seed", config.seed),
        *cost_rows(made.training),
        *settings_rows(),
    ]
    return markdown(("what", "value"), rows)


def cost_rows(training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What the making took, as far as it is known."""
    rows = [
        ("pictures seen", training.get("images"), ","),
        ("candidates", training.get("candidates"), ","),
        ("trained parameters", training.get("trained_parameters"), ","),
        ("seconds", training.get("seconds"), ",.0f"),
        ("device", training.get("device"), ""),
    ]
    return [(name, format(value, how)) for name, value, how in rows if value is not None]


def settings_rows() -> list[tuple[str, str]]:
    return [("all settings", f"[{SETTINGS}]({SETTINGS})"), ("made with", versions())]


def versions() -> str:
    """ "fewstep 0.1.0, torch 2.14.1, ..." of what is installed."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # a clone on the path, not installed
            continue
    return ", ".join(found)


def licence_line(teacher: TeacherSettings) -> str:
    stated = licence_of(teacher)
    line = stated.get("license_name") or stated.get("license") or "not stated in its model card"
    return f"{line}; that of its LoRA holds too" if teacher.lora else line


def with_scores(folder: Path, table: str, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Put the table of an evaluation into the card of an exported folder, and its rows into the front matter, in place
    of earlier ones."""
    card = folder / "README.md"
    before = card.read_text().split("\n## Scores\n")[0].rstrip("\n") if card.is_file() else f"# {folder.name}"
    name = folder.parent.name if folder.name == "pipeline" else folder.name
    write_file(card, f"{with_results(before, name, rows)}\n\n## Scores\n\n{table}")


def steps_table(sampling: Mapping[str, Mapping[str, Any]]) -> str:
    def call(arguments: Mapping[str, Any]) -> str:
        return ", ".join(f"`{k}={v}`" for k, v in arguments.items())

    return markdown(("network evaluations", "call arguments"), [(n, call(a)) for n, a in sampling.items()])


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
