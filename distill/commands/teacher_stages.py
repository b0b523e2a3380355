"""A teacher's configuration as the run configurations of its stages, which inherit `data` and `resolution`."""

from inspect import signature
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from ..catalog.configuration import load_config
from ..catalog.methods import settings_of
from ..config.nearest import hint
from ..config.run import DataSettings, RunConfig
from ..config.tree import method_name
from ..config.validation import numbers, shown, validate
from ..errors import UserError
from ..pretrain.settings import SharedSettings

STAGES = ("autoencoder", "text_encoder", "diffusion")
PIXEL_STAGES = ("pixels",)
SHARED = ("data", "resolution", "name", "license")
EXAMPLES = "see configs/emoji/teacher.yaml and configs/fashion/teacher.yaml"


def shared_of(tree: dict[str, Any]) -> SharedSettings:
    """What a teacher's configuration says of all stages. UserError for missing, unknown and wrong keys."""
    for key in ("output_dir", "stages"):
        if not tree.get(key):
            raise UserError(f"{key}: missing; {EXAMPLES}")
    if not isinstance(tree["stages"], dict):
        raise UserError(f"stages: {shown(tree['stages'])} has no keys; write `stages: {{pixels: ...}}`")
    of_pixels = is_pixels(tree)
    parts = () if of_pixels else ("network", "scheduler")
    _check_keys("", tree, ("output_dir", "stages", *parts), SHARED)
    _check_keys("stages.", tree["stages"], PIXEL_STAGES if of_pixels else STAGES)
    if not of_pixels:
        _check_arguments("network", UNet2DConditionModel, tree["network"])
        _check_arguments("scheduler", DDIMScheduler, tree["scheduler"])
    shared: SharedSettings = validate(SharedSettings, {k: tree[k] for k in SHARED if k in tree})
    return shared


def is_pixels(tree: dict[str, Any]) -> bool:
    return "pixels" in tree["stages"]


def stages_of(tree: dict[str, Any]) -> dict[str, RunConfig]:
    """The configuration of every stage, before the first of them takes its hours.

    A key of a stage's own `data` counts before that of the shared `data`; so does its own `resolution`.
    """
    out, root = {}, Path(str(tree["output_dir"]))
    shared = {k: tree[k] for k in ("data", "resolution") if tree.get(k) is not None}
    _check_inherited(shared, tree["stages"])
    for name, stage in tree["stages"].items():
        if not isinstance(stage, dict):
            raise UserError(
                f"stages.{name}: {shown(stage)} has no keys; write `stages: {{{name}: {{method: ...}}}}`"
            )
        placed: dict[str, Any] = {"output_dir": str(root / name)}
        if name == "diffusion":
            placed["teacher"] = {"path": str(root / "start")}
        for key in placed:
            if key in stage:
                raise UserError(f"stages.{name}.{key}: follows from output_dir; leave it out")
        own = {**_inherited(name, stage, shared), **stage, **placed}
        if name == "pixels":
            own = _with_side_of_pixels(own)
        if isinstance(stage.get("data"), dict):
            own["data"] = {**_inherited(name, stage, shared).get("data", {}), **stage["data"]}
        if "data" not in own:
            raise UserError(f"data: missing; write `data: {{name: ...}}`, or --data.name FOLDER; {EXAMPLES}")
        out[name] = load_config(own, f"stages.{name}.")
    if any(config.resolution is None for name, config in out.items() if name != "diffusion"):
        raise UserError(f"resolution: missing; write `resolution: 32`, the side of the pictures; {EXAMPLES}")
    return out


def network_of(tree: dict[str, Any], stages: dict[str, RunConfig]) -> dict[str, Any]:
    """The diffusion network's arguments, with sample_size the side of the autoencoder's latents.

    UserError for a resolution that the autoencoder's factor does not divide, and for another sample_size.
    """
    resolution = stages["autoencoder"].resolution
    assert resolution is not None
    factor = 2 ** (len(stages["autoencoder"].method.settings.block_out_channels) - 1)
    side = _divided("resolution", resolution, factor, "the autoencoder")
    for name in ("text_encoder", "diffusion"):
        if stages[name].resolution not in (None, resolution):
            raise UserError(
                f"stages.{name}.resolution: {stages[name].resolution} is not {resolution}, that of the autoencoder; "
                "leave it out"
            )
    given = numbers(tree["network"].get("sample_size", side))
    if given != side:
        raise UserError(
            f"network.sample_size: {shown(given)} is not {side}, the side of the latents at resolution {resolution}; "
            "leave it out"
        )
    return {**tree["network"], "sample_size": side}


def _with_side_of_pixels(tree: dict[str, Any]) -> dict[str, Any]:
    """A stage of pixels whose UNet2DModel has the resolution as sample_size, where it says none."""
    student = tree.get("student")
    network = student.get("network") if isinstance(student, dict) else None
    resolution = numbers(tree.get("resolution"))
    if not isinstance(network, dict) or network.get("_class_name", "UNet2DModel") != "UNet2DModel":
        return tree
    if not isinstance(resolution, int) or isinstance(resolution, bool) or resolution < 1:  # refused below
        return tree
    default = signature(UNet2DModel).parameters["block_out_channels"].default
    levels = network.get("block_out_channels", default)
    if isinstance(levels, list | tuple) and levels:
        _divided("resolution", resolution, 2 ** (len(levels) - 1), "the network")
    network = {**network, "sample_size": network.get("sample_size", resolution)}
    return {**tree, "student": {**tree["student"], "network": network}}


def _divided(key: str, resolution: int, factor: int, part: str) -> int:
    if resolution % factor:
        below = resolution - resolution % factor
        near = f"{below} or {below + factor}" if below else str(factor)
        raise UserError(f"{key}: {resolution} is not divisible by {factor}, as {part} needs; take {near}")
    return resolution // factor


def _inherited(name: str, stage: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """The shared keys that a stage reads: a network in latents has the resolution of its autoencoder."""
    try:
        ignores = settings_of(method_name(stage)).ignores
    except UserError:  # told when the stage is checked
        ignores = ()
    data = {k: v for k, v in shared.get("data", {}).items() if f"data.{k}" not in ignores}
    out: dict[str, Any] = {"data": data} if data else {}
    if "resolution" in shared and name != "diffusion":
        out["resolution"] = shared["resolution"]
    return out


def _check_inherited(shared: dict[str, Any], stages: dict[str, Any]) -> None:
    """UserError for a shared key that every stage has for itself."""
    if "data" in shared:
        validate(DataSettings, shared["data"], "data.")
    sections = [stage if isinstance(stage, dict) else {} for stage in stages.values()]
    own = [stage["data"] if isinstance(stage.get("data"), dict) else {} for stage in sections]
    taken = [f"data.{key}" for key in shared.get("data", {}) if all(key in data for data in own)]
    takers = [stage for name, stage in zip(stages, sections, strict=True) if name != "diffusion"]
    if "resolution" in shared and all("resolution" in stage for stage in takers):
        taken.append("resolution")
    for key in taken:
        each = f"stages.{next(iter(stages))}.{key}"
        raise UserError(f"{key}: has no effect, since every stage has its own ({each}, ...); take those out")


def _check_keys(
    prefix: str, tree: dict[str, Any], wanted: tuple[str, ...], free: tuple[str, ...] = ()
) -> None:
    for key in wanted:
        if key not in tree:
            raise UserError(f"{prefix}{key}: missing; {EXAMPLES}")
    for key in tree:
        if key not in (*wanted, *free):
            raise UserError(f"{prefix}{key}: no such key; {hint(str(key), (*wanted, *free))}")


def _check_arguments(key: str, cls: Any, given: Any) -> None:
    """UserError for what the class does not take."""
    if not isinstance(given, dict):
        raise UserError(f"{key}: {shown(given)} has no keys; give the arguments of diffusers' {cls.__name__}")
    known = [name for name in signature(cls).parameters if not name.startswith("_")]
    for name in given:
        if name not in known:
            raise UserError(f"{key}.{name}: {cls.__name__} takes no such argument; {hint(str(name), known)}")
