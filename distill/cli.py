"""`fewstep <verb>`: the command line.

A user's mistake is one line on stderr and exit code 2; a signal ends a command with 128 + its number.
"""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands.arguments import MOST_IMAGES, MOST_STEPS, Parser, place, scale, whole
from .commands.protocols import prepare_data_command, verify_metrics_command
from .config.nearest import hint
from .config.third_party import quiet
from .errors import UserError
from .training.interrupts import exit_code, terminations_raised

if TYPE_CHECKING:
    from .config.search import SearchConfig


def distill(arguments: list[str]) -> int:
    """distill CONFIG [--key.sub value ...] [--output_dir DIR] [--max_train_steps N] [--dry_run]"""
    from .catalog.configuration import fitted, is_search, load_config, load_search, with_overrides
    from .config.tree import read_yaml

    dry = "--dry_run" in arguments
    path, *rest = _with_config([a for a in arguments if a != "--dry_run"], distill)
    tree = read_yaml(path)
    if "stages" in tree:
        raise UserError(f"{path} trains a teacher in stages; use `fewstep train-teacher {path}`")
    ready, tree = tree, with_overrides(tree, rest)
    if is_search(tree):
        return _search(load_search(tree), dry)
    config = load_config(fitted(tree, ready))
    if dry:
        from .planning.dry_run import describe

        print(describe(config))
        return 0
    from .training.runner import Runner

    runner = Runner(config)
    if runner.finished():
        print(
            f"{config.output_dir} is finished: {config.max_train_steps} steps, exported; nothing was changed"
        )
        return 0
    runner.train()
    return 0


def _search(config: "SearchConfig", dry: bool) -> int:
    if dry:
        from .search.plan import describe

        print(describe(config))
        return 0
    from .search.runner import SearchRunner

    runner = SearchRunner(config)
    if runner.finished():
        print(f"{config.output_dir} is finished: searched and exported; nothing was changed")
        return 0
    print(runner.search())
    return 0


def turbo(arguments: list[str]) -> int:
    """turbo MODEL --prompts FILE [--lora STYLE.safetensors] [--method lcd] [--dry_run] [--key.sub value ...]"""
    parser = Parser(
        prog="fewstep turbo",
        description="Distil a few-step LoRA of your own model from prompts alone, on one device.",
        epilog="Any key of a configuration is a flag too: --max_train_steps 500, --student.rank 16, ...",
    )
    parser.add_argument("model", type=place, help="pipeline folder, embedded teacher or hub id")
    parser.add_argument("--prompts", help="text file of one prompt a line, or a folder of such files")
    parser.add_argument("--lora", help="a style LoRA that the model shall have: file, or owner/name/file")
    parser.add_argument("--method", help="default: lcd for Stable Diffusion and SDXL, rcm for the others")
    parser.add_argument("--output_dir", help="default: runs/turbo/<model>")
    parser.add_argument("--dry_run", action="store_true", help="print what it would take")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the LoRA when it is finished")
    args, overrides = parser.parse_known_args(arguments)
    from .commands.turbo import turbo as run
    from .models.hub import check_name, push

    if args.push_to_hub is not None:
        check_name(args.push_to_hub)
    config = run(
        args.model, lora=args.lora, prompts=args.prompts, method=args.method, output_dir=args.output_dir,
        overrides=overrides, dry=args.dry_run,
    )  # fmt: skip
    if args.push_to_hub and not args.dry_run:
        print(push(Path(config.output_dir), args.push_to_hub))
    return 0


def push_to_hub(arguments: list[str]) -> int:
    """push-to-hub RUN OWNER/NAME [--private]: upload what a run exported"""
    parser = Parser(prog="fewstep push-to-hub", description="Upload what a run exported.")
    parser.add_argument("run", type=Path, help="run folder; of a LoRA the file goes up, else the pipeline")
    parser.add_argument("repo_id", help="OWNER/NAME on the hub, made if it is not there")
    parser.add_argument("--private", action="store_true", help="of a repository that is made")
    args = parser.parse_args(arguments)
    from .models.hub import push

    print(push(args.run, args.repo_id, private=args.private))
    return 0


def train_teacher(arguments: list[str]) -> int:
    """train-teacher CONFIG [--stages.<stage>.key value ...]: autoencoder, text encoder, then the network"""
    from .catalog.configuration import fitted, with_overrides
    from .commands.train_teacher import train
    from .config.tree import read_yaml

    path, *rest = _with_config(arguments, train_teacher)
    ready = read_yaml(path)
    tree = with_overrides(ready, rest)
    before, after = ready.get("stages"), tree.get("stages")
    if isinstance(before, dict) and isinstance(after, dict):
        for name, stage in after.items():
            if isinstance(stage, dict) and isinstance(before.get(name), dict):
                after[name] = fitted(stage, before[name])
    print(f"teacher: {train(tree)}")
    return 0


def _evaluate_parser() -> Parser:
    parser = Parser(prog="fewstep evaluate", description="Score a pipeline or a folder of pictures.")
    parser.add_argument(
        "pipeline",
        type=place,
        help="diffusers pipeline folder, embedded teacher, hub id, each with +LORA; or folder of images",
    )
    parser.add_argument(
        "--data",
        type=place,
        help="name or folder, or '{name: photos, caption_column: null}'; default: what the pipeline was trained on, "
        "where it is a run's or an embedded teacher",
    )
    parser.add_argument(
        "--split", help="of real pictures and prompts, default: that of the training, or train"
    )
    parser.add_argument(
        "--holdout",
        help="split of unseen real pictures, or none; default: holdout, or test, where it is there",
    )
    parser.add_argument("--num_images", type=whole(1, MOST_IMAGES), default=500)
    parser.add_argument("--steps", type=whole(1, MOST_STEPS), nargs="*", default=[])
    parser.add_argument(
        "--seeds", type=whole(1, 1000), default=1, help="disjoint blocks of num_images pictures"
    )
    parser.add_argument("--batch_size", type=whole(1, 65536), default=64)
    parser.add_argument("--guidance_scale", type=scale)
    parser.add_argument("--extractor", help="default: efflite0-128")
    parser.add_argument("--clip", help="also an image-text score: lite0-minilm, MODEL:TAG of open_clip, ...")
    parser.add_argument(
        "--control",
        help="score against conditions: canny, '{name: superres, factor: 4}', ...; see methods/nct",
    )
    parser.add_argument("--protocol", help="cifar10-50k, coco2014-30k, ...: in place of data and extractor")
    parser.add_argument("--device")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the pipeline brings; ours runs anyway"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="make and time every picture anew, cached or not"
    )
    parser.add_argument("--output", type=Path)
    return parser


def evaluate(arguments: list[str]) -> int:
    """evaluate PIPELINE --data NAME_OR_FOLDER --num_images N --steps 1 2 4 [--seeds 3] [--output report.json]"""
    args = _evaluate_parser().parse_args(arguments)

    from .reports.conditions import read_control
    from .reports.evaluate import evaluate as score
    from .reports.table import markdown_table, rows_of
    from .reports.trained_on import data_for, default_holdout, read_data
    from .teachers import EMBEDDED
    from .training.model_card import with_scores

    if args.pipeline in EMBEDDED:
        name, args.pipeline = args.pipeline, str(EMBEDDED[args.pipeline])
    else:
        name = Path(args.pipeline).name
    quiet()
    own: dict[str, Any] = {
        k: getattr(args, k) for k in ("data", "split", "holdout", "extractor") if getattr(args, k)
    }
    if args.protocol and own:
        raise UserError(f"{next(iter(own))}: has no effect beside --protocol {args.protocol}; leave it out")
    if not args.protocol:
        data = read_data(args.data) if args.data else data_for([args.pipeline])
        own |= {"data": data.name, "data_options": data.options, "split": args.split or data.split}
        if not args.holdout:
            own["holdout"] = default_holdout(data, own["split"])
            if own["holdout"] is None:
                note = "has no split of unseen pictures: scored without a hold-out"
                print(f"fewstep: {data.name}: {note}", file=sys.stderr)
    if own.get("holdout") == "none":
        own["holdout"] = None
    report = score(
        args.pipeline, **own, num_images=args.num_images, steps=args.steps, seeds=args.seeds,
        batch_size=args.batch_size, device=args.device, output=args.output,
        guidance_scale=args.guidance_scale, fresh=args.fresh, clip=args.clip, protocol=args.protocol,
        control=None if args.control is None else read_control(args.control),
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    if not report:  # another process of the launch has it
        return 0
    rows = rows_of(name, report)
    table = markdown_table(rows)
    if (Path(args.pipeline) / "sampling.json").is_file() and name not in EMBEDDED:  # an export of ours
        with_scores(Path(args.pipeline), table, rows)
    print(table)
    return 0


def sample(arguments: list[str]) -> int:
    """sample PIPELINE --data NAME_OR_FOLDER --num_images N --steps 4 --output FOLDER | --prompts FILE"""
    parser = Parser(
        prog="fewstep sample",
        description="A folder of pictures, each of the caption or class of a real one, or of a line of a text file.",
    )
    parser.add_argument("pipeline", type=place, help="as of evaluate, images apart")
    parser.add_argument(
        "--output", type=Path, required=True, help="a new folder, or one that was not finished"
    )
    parser.add_argument("--data", type=place, help="as of evaluate")
    parser.add_argument("--split", help="as of evaluate")
    parser.add_argument("--prompts", help="a text file with one a line, in place of --data")
    parser.add_argument(
        "--num_images", type=whole(1, MOST_IMAGES), help="default: one for each prompt, else 500"
    )
    parser.add_argument("--steps", type=whole(1, MOST_STEPS), required=True)
    parser.add_argument(
        "--seed_block", type=whole(0, 10**12), default=1000, help="of the noise; scores use 0, 1, ..."
    )
    parser.add_argument("--batch_size", type=whole(1, 65536), default=64)
    parser.add_argument("--guidance_scale", type=scale)
    parser.add_argument("--control", help="as of evaluate")
    parser.add_argument("--device")
    parser.add_argument("--trust_remote_code", action="store_true")
    args = vars(parser.parse_args(arguments))

    from .reports.conditions import read_control
    from .reports.sample import sample as make
    from .reports.trained_on import data_for, read_data

    quiet()
    given, split = args.pop("data"), args.pop("split")
    if args["prompts"] is None:
        data = read_data(given) if given else data_for([args["pipeline"]])
        args |= {"data": data.name, "data_options": data.options, "split": split or data.split}
    control = args.pop("control")
    print(make(**args, control=None if control is None else read_control(control)))
    return 0


def compare(arguments: list[str]) -> int:
    """compare RUN [NAME=RUN ...] --output DIR [--num_images N] [--seeds 3] [--steps 1 2 4] [--teacher NAME]"""
    parser = Parser(
        prog="fewstep compare",
        description="Score students of one teacher alike: compare.json, compare.md and compare.html.",
        epilog="Further flags go to `fewstep evaluate` (--batch_size, --clip, --trust_remote_code, ...).",
    )
    parser.add_argument(
        "entries",
        nargs="+",
        type=place,
        help="[NAME=] run folder, pipeline folder, embedded teacher, hub id, each but runs with +LORA; or report.json",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--steps", type=whole(1, MOST_STEPS), nargs="+", default=[1, 2, 4], help="of students"
    )
    parser.add_argument("--teacher", help="scored too; default: the one that the runs name; none: no row")
    parser.add_argument("--teacher_steps", type=whole(1, MOST_STEPS), nargs="+", default=[1, 2, 4, 8, 50])
    parser.add_argument("--data", type=place, help="as of evaluate; default: what the models were trained on")
    parser.add_argument("--num_images", type=whole(1, MOST_IMAGES), default=500)
    parser.add_argument(
        "--seeds", type=whole(1, 1000), default=3, help="disjoint blocks of num_images pictures"
    )
    parser.add_argument("--device")
    parser.add_argument("--title")
    args, options = parser.parse_known_args(arguments)
    _evaluate_parser().parse_args(["pipeline", *options])  # before the long work

    from .reports.compare import compare as score

    score(
        args.entries, args.output, steps=args.steps, teacher=args.teacher, teacher_steps=args.teacher_steps,
        data=args.data, num_images=args.num_images, seeds=args.seeds, device=args.device, options=options,
        title=args.title,
    )  # fmt: skip
    print((args.output / "compare.md").read_text())
    print(f"page: {args.output / 'compare.html'}")
    return 0


def demo(arguments: list[str]) -> int:
    """demo [--output_dir DIR] [--key.sub value ...]: distil the embedded teacher, score both, and draw them"""
    parser = Parser(prog="fewstep demo")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--config", type=Path, help="what is distilled (default: configs/emoji/demo.yaml)")
    parser.add_argument("--num_images", type=whole(1, MOST_IMAGES), default=100, help="pictures in one value")
    parser.add_argument(
        "--seeds", type=whole(1, 1000), help="values per row (default: 3; 1 at the teacher's 50 and 8 steps)"
    )
    args, overrides = parser.parse_known_args(arguments)
    from .commands.demo import CONFIGS, run_demo

    config = args.config or CONFIGS / "emoji" / "demo.yaml"
    run_demo(args.output_dir, overrides, config=config, num_images=args.num_images, seeds=args.seeds)
    return 0


def _with_config(arguments: list[str], verb: Callable[[list[str]], int]) -> list[str]:
    if not arguments or arguments[0].startswith("--"):
        raise UserError(f"which configuration? usage: fewstep {verb.__doc__}")
    return arguments


VERBS: dict[str, Callable[[list[str]], int]] = {
    "turbo": turbo,
    "distill": distill,
    "evaluate": evaluate,
    "compare": compare,
    "sample": sample,
    "push-to-hub": push_to_hub,
    "train-teacher": train_teacher,
    "demo": demo,
    "prepare-data": prepare_data_command,
    "verify-metrics": verify_metrics_command,
}


def usage() -> str:
    verbs = "\n".join(f"  fewstep {(f.__doc__ or '').splitlines()[0]}" for f in VERBS.values())
    return f"usage:\n{verbs}\n--traceback anywhere shows where an unexpected error comes from"


def main(argv: list[str] | None = None) -> int:
    """The exit code: 2 after a user's mistake, 1 after a fault of ours or of a library's, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    quiet()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    try:
        with terminations_raised():
            return _run(*arguments)
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt as interrupt:
        return exit_code(interrupt)
    except Exception as error:
        if traceback:
            raise
        if isinstance(error, OSError) and error.filename is not None:
            reason = error.strerror or type(error).__name__
            return _fail(f"{error.filename}: cannot be read or written ({reason}); {_mend(error)}", 2)
        first = " ".join((str(error).strip().splitlines() or [""])[0].split())[:200]
        name = type(error).__name__
        return _fail(
            f"{name}: {first} (this is a fault of fewstep or of a library; --traceback shows where)", 1
        )


def _run(verb: str, *arguments: str) -> int:
    rest = list(arguments)
    if verb not in VERBS:
        raise UserError(f"no command {verb!r}; {hint(verb, VERBS)}")
    if rest[:1] in (["-h"], ["--help"]) and verb in ("distill", "train-teacher"):
        print(f"usage: fewstep {VERBS[verb].__doc__}")
        return 0
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        from .training.launch import join_on_cpus

        join_on_cpus()
    return VERBS[verb](rest)


def _fail(line: str, code: int) -> int:
    print(f"fewstep: error: {' '.join(line.split())}", file=sys.stderr)
    return code


def _mend(error: OSError) -> str:
    """What to do about a file that the system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space, or write elsewhere"
    return "check that it is there, of the right kind and open to you, or name another"


if __name__ == "__main__":
    sys.exit(main())
