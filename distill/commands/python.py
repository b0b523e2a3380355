"""The commands as functions of `fewstep`. Each imports what it needs when it is called: the module itself no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import UserError

if TYPE_CHECKING:
    from ..settings import MethodSettings

Call = dict[str, Any]
Place: TypeAlias = "str | Path | Run"


class Run:
    """The folder of a run or a search that exported: as `run` returns it, or opened again by its path.

    >>> fewstep.Run("runs/two_steps").calls[1]["guidance_scale"]
    3.0
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def calls(self) -> dict[int | str, Call]:
        """The arguments that the pipeline is called with, by the number of steps; "default" for any other number.

        Raises UserError where the run exported none.
        """
        from ..reports.loading import SAMPLING, read_sampling

        calls = read_sampling(self._exported() / SAMPLING)
        return {int(steps) if steps.isdecimal() else steps: call for steps, call in calls.items()}

    def pipeline(self) -> Any:
        """The exported diffusers pipeline, in float32 on the CPU. Raises UserError where the run exported none."""
        from ..reports.loading import load_pipeline

        return load_pipeline(str(self._exported()), trust_remote_code=False)[0]

    def _exported(self) -> Path:
        pipeline = self.folder / "pipeline"
        if (pipeline / "model_index.json").is_file():
            return pipeline
        if (self.folder / "lora").is_dir():
            raise UserError(
                f"{self.folder}: holds a LoRA and no pipeline; load {self.folder / 'lora'} into the teacher's, or run "
                "again with student.export_fused true"
            )
        raise UserError(f"{self.folder}: holds no exported pipeline; give the folder of a finished run")


def run(recipe: str | Path | Mapping[str, Any], **overrides: Any) -> Run:
    """Train or search as `fewstep distill` does, export, and return the run. A finished one is returned as it is.

    recipe     a recipe's name, a YAML file, or the same keys as a dict
    overrides  keys in place of the recipe's; a dict changes the keys of its section and leaves the others

    >>> run = fewstep.run("emoji/lcd", output_dir="runs/two_steps", max_train_steps=2, train_batch_size=2)
    >>> run.folder, sorted(run.calls)
    (PosixPath('runs/two_steps'), [1, 2, 3, 4, 6, 8])
    >>> fewstep.run("emoji/lcd", method={"w_maxx": 8.0})
    Traceback (most recent call last):
    fewstep.distill.errors.UserError: method.w_maxx: no such key; the nearest is w_max

    Interrupted, it goes on when it is called again. Raises UserError for what the caller can mend.
    """
    from ..catalog.configuration import fitted, is_search, load_config, load_search
    from ..catalog.recipes import find
    from ..config.tree import merged, read_yaml

    ready = dict(recipe) if isinstance(recipe, Mapping) else read_yaml(find(recipe))
    if "stages" in ready:
        raise UserError(f"{recipe}: trains a teacher in stages; use `fewstep train-teacher`")
    tree = merged(ready, overrides)
    if is_search(tree):
        search = load_search(tree)
        from ..search.runner import SearchRunner

        searcher = SearchRunner(search)
        if not searcher.finished():
            searcher.search()
        return Run(search.output_dir)
    config = load_config(fitted(tree, ready))
    from ..training.runner import Runner

    runner = Runner(config)
    if not runner.finished():
        runner.train()
    return Run(config.output_dir)


def evaluate(
    pipeline: Place,
    *,
    steps: Sequence[int] = (),
    num_images: int = 500,
    seeds: int = 1,
    data: str | None = None,
    split: str | None = None,
    holdout: str | None = None,
    protocol: str | None = None,
    extractor: str | None = None,
    clip: str | None = None,
    control: str | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 64,
    device: str | None = None,
    trust_remote_code: bool = False,
    fresh: bool = False,
    progress: bool = True,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Scores of a run, a pipeline or a folder of pictures: the report of `fewstep evaluate`, also written to `output`.

    The arguments are that command's flags; `fewstep evaluate --help` explains them.

    >>> run = fewstep.Run("runs/two_steps")
    >>> report = fewstep.evaluate(run, steps=[1, 2], num_images=4, output="runs/report.json", progress=False)
    >>> [(row["steps"], row["scores"][0]["protocol"]["metric"]) for row in report["rows"]]
    [(1, 'KID'), (2, 'KID')]

    Raises UserError for what the caller can mend.
    """
    from ..config.third_party import quiet
    from ..reports.conditions import read_control
    from ..reports.evaluate import evaluate as score
    from ..reports.trained_on import reference_of

    quiet()
    place = _pipeline_of(pipeline)
    if protocol is None:
        own = reference_of(place, data, split, holdout)
    else:
        own = {k: v for k, v in {"data": data, "split": split, "holdout": holdout}.items() if v is not None}
        if own or extractor is not None:
            raise UserError(
                f"{next(iter(own), 'extractor')}: has no effect beside protocol {protocol}; leave it out"
            )
    if extractor is not None:
        own["extractor"] = extractor
    return score(
        place, **own, steps=steps, num_images=num_images, seeds=seeds, protocol=protocol, clip=clip,
        control=None if control is None else read_control(control), guidance_scale=guidance_scale,
        batch_size=batch_size, device=device, trust_remote_code=trust_remote_code, fresh=fresh, progress=progress,
        output=None if output is None else Path(output),
    )  # fmt: skip


def sample(
    pipeline: Place,
    output: str | Path,
    *,
    steps: int,
    num_images: int | None = None,
    data: str | None = None,
    split: str | None = None,
    prompts: str | Path | None = None,
    seed_block: int = 1000,
    control: str | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 64,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Path:
    """A new folder of pictures and their captions, made as `fewstep sample` makes them; returns the folder.

    >>> folder = fewstep.sample("emoji-sd", "runs/pictures", steps=2, num_images=2, progress=False)
    >>> sorted(path.name for path in folder.glob("*.png"))
    ['00000.png', '00001.png']

    Raises UserError for what the caller can mend.
    """
    from ..config.third_party import quiet
    from ..reports.conditions import read_control
    from ..reports.sample import sample as make
    from ..reports.trained_on import reference_of

    quiet()
    place = _pipeline_of(pipeline)
    own: dict[str, Any] = {"prompts": str(prompts)}
    if prompts is None:
        own = reference_of(place, data, split, "none")
        del own["holdout"]
    elif data is not None or split is not None:
        raise UserError(f"prompts: {prompts} stands in place of data and split; leave either out")
    return make(
        place, Path(output), **own, steps=steps, num_images=num_images, seed_block=seed_block,
        control=None if control is None else read_control(control), guidance_scale=guidance_scale,
        batch_size=batch_size, device=device, trust_remote_code=trust_remote_code, progress=progress,
    )  # fmt: skip


def compare(
    entries: Sequence[Place],
    output: str | Path,
    *,
    steps: Sequence[int] = (1, 2, 4),
    teacher: str | None = None,
    teacher_steps: Sequence[int] = (1, 2, 4, 8, 50),
    data: str | None = None,
    num_images: int = 500,
    seeds: int = 3,
    device: str | None = None,
    title: str | None = None,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Score runs and pipelines alike: compare.json, compare.md and compare.html in `output`; returns the first.

    entries  runs, their folders, pipelines, embedded teachers, reports; "NAME=PLACE" gives one its name in the table
    options  further flags of `fewstep evaluate`

    >>> page = fewstep.compare(["student=runs/report.json"], "runs/page")
    >>> [(row["model"], row["steps"]) for row in page["rows"]]
    [('student', 1), ('student', 2)]

    Raises UserError for what the caller can mend.
    """
    from ..catalog.methods import origins
    from ..reports.compare import compare as score

    places = [str(entry.folder if isinstance(entry, Run) else entry) for entry in entries]
    return score(
        places, Path(output), steps=steps, teacher=teacher, teacher_steps=teacher_steps, data=data,
        num_images=num_images, seeds=seeds, device=device, options=options, title=title, origins=origins(),
    )  # fmt: skip


def methods() -> dict[str, "type[MethodSettings]"]:
    """The methods and searches by name, each with the class of its settings: the keys below `method` of a recipe.

    >>> fewstep.methods()["lcd"].w_max
    15.0
    """
    from ..catalog.methods import METHODS, SEARCHES

    return {name: entry.settings for name, entry in {**METHODS, **SEARCHES}.items()}


def _pipeline_of(place: Place) -> str:
    return str(place.folder / "pipeline" if isinstance(place, Run) else place)
