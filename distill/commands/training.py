"""The verbs that train: distill, turbo, train-teacher and demo."""

from pathlib import Path

from ..catalog.configuration import fitted, is_search, load_config, load_search, with_overrides
from ..catalog.recipes import find
from ..config.search import SearchConfig
from ..config.tree import read_yaml
from ..errors import UserError
from ..training.run_folder import RunFolder
from .arguments import MOST_IMAGES, Parser, Verb, place, usage_of, whole
from .keys_help import keys_help, stages_help

HELP = {"-h", "--help"}


def distill(arguments: list[str]) -> int:
    """distill CONFIG [--key.sub value ...] [--output_dir DIR] [--max_train_steps N] [--dry_run]

    Distil a teacher, train from data or search, as a configuration says.
    """
    if HELP.intersection(arguments):
        print(keys_help(distill, [a for a in arguments if a not in HELP]))
        return 0
    dry = "--dry_run" in arguments
    path, *rest = _with_config([a for a in arguments if a != "--dry_run"], distill)
    ready = read_yaml(find(path))
    if "stages" in ready:
        raise UserError(f"{path} trains a teacher in stages; use `fewstep train-teacher {path}`")
    tree = with_overrides(ready, rest)
    if is_search(tree):
        return _search(load_search(tree), dry)
    config = load_config(fitted(tree, ready))
    if dry:
        from ..planning.dry_run import describe

        print(describe(config))
        return 0
    if RunFolder(config).finished():
        print(
            f"{config.output_dir} is finished: {config.max_train_steps} steps, exported; nothing was changed"
        )
        return 0
    from ..training.runner import Runner

    Runner(config).train()
    return 0


def _search(config: SearchConfig, dry: bool) -> int:
    if dry:
        from ..search.plan import describe

        print(describe(config))
        return 0
    if RunFolder(config).finished():
        print(f"{config.output_dir} is finished: searched and exported; nothing was changed")
        return 0
    from ..search.runner import SearchRunner

    print(SearchRunner(config).search())
    return 0


def turbo(arguments: list[str]) -> int:
    """turbo MODEL --prompts FILE [--lora STYLE.safetensors] [--method lcd] [--dry_run] [--key.sub value ...]

    Distil a few-step LoRA of your own model from prompts alone, on one device.
    """
    parser = Parser(
        turbo,
        epilog="Any key of a configuration is a flag too: --max_train_steps 500, --student.rank 16, ...; "
        "`fewstep distill --help` lists them.",
    )
    parser.add_argument("model", type=place, help="pipeline folder, embedded teacher or hub id")
    parser.add_argument("--prompts", help="text file of one prompt a line, or a folder of such files")
    parser.add_argument("--lora", help="a style LoRA that the model shall have: file, or owner/name/file")
    parser.add_argument("--method", help="default: lcd for Stable Diffusion and SDXL, rcm for the others")
    parser.add_argument("--output_dir", help="default: runs/turbo/<model>")
    parser.add_argument("--dry_run", action="store_true", help="print what it would take")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the LoRA when it is finished")
    args, overrides = parser.parse_known_args(arguments)
    from ..models.hub import check_name, push
    from .turbo import turbo as run

    if args.push_to_hub is not None:
        check_name(args.push_to_hub)
    config = run(
        args.model, lora=args.lora, prompts=args.prompts, method=args.method, output_dir=args.output_dir,
        overrides=overrides, dry=args.dry_run,
    )  # fmt: skip
    if args.push_to_hub and not args.dry_run:
        print(push(Path(config.output_dir), args.push_to_hub))
    return 0


def train_teacher(arguments: list[str]) -> int:
    """train-teacher CONFIG [--stages.<stage>.key value ...]

    Train a teacher in stages: autoencoder, text encoder, then the network.
    """
    if HELP.intersection(arguments):
        print(stages_help(train_teacher))
        return 0
    path, *rest = _with_config(arguments, train_teacher)
    ready = read_yaml(find(path))
    tree = with_overrides(ready, rest)
    before, after = ready.get("stages"), tree.get("stages")
    if isinstance(before, dict) and isinstance(after, dict):
        for name, stage in after.items():
            if isinstance(stage, dict) and isinstance(before.get(name), dict):
                after[name] = fitted(stage, before[name])
    from .train_teacher import train

    print(f"teacher: {train(tree)}")
    return 0


def demo(arguments: list[str]) -> int:
    """demo [--output_dir DIR] [--key.sub value ...]

    Distil the embedded teacher, score both, and draw them.
    """
    parser = Parser(
        demo, epilog="Any key of a configuration is a flag too; `fewstep distill --help` lists them."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where all of it goes")
    parser.add_argument("--config", default="emoji/demo", help="recipe or file of what is distilled")
    parser.add_argument("--num_images", type=whole(1, MOST_IMAGES), default=100, help="pictures in one value")
    parser.add_argument(
        "--seeds", type=whole(1, 1000), help="values per row (default: 3; 1 at the teacher's 50 and 8 steps)"
    )
    args, overrides = parser.parse_known_args(arguments)
    config = find(args.config)
    from .demo import run_demo

    run_demo(args.output_dir, overrides, config=config, num_images=args.num_images, seeds=args.seeds)
    return 0


def _with_config(arguments: list[str], verb: Verb) -> list[str]:
    if not arguments or arguments[0].startswith("--"):
        raise UserError(f"which configuration? usage: {usage_of(verb)}")
    return arguments
