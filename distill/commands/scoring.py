"""The verbs that score: evaluate, sample and compare."""

import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from .arguments import MOST_IMAGES, MOST_STEPS, Parser, place, scale, whole


def _evaluate_parser() -> Parser:
    parser = Parser(evaluate)
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
    parser.add_argument("--num_images", type=whole(1, MOST_IMAGES), default=500, help="pictures in one value")
    parser.add_argument(
        "--steps",
        type=whole(1, MOST_STEPS),
        nargs="*",
        default=[],
        help="one row for each number; a pipeline has no default, pictures have no steps",
    )
    parser.add_argument(
        "--seeds", type=whole(1, 1000), default=1, help="disjoint blocks of num_images pictures"
    )
    parser.add_argument("--batch_size", type=whole(1, 65536), default=64, help="pictures made at once")
    parser.add_argument(
        "--guidance_scale", type=scale, help="default: as the pipeline's sampling.json, or its own"
    )
    parser.add_argument("--extractor", help="network of the picture features (default: efflite0-128)")
    parser.add_argument("--clip", help="also an image-text score: lite0-minilm, MODEL:TAG of open_clip, ...")
    parser.add_argument(
        "--control",
        help="score against conditions: canny, '{name: superres, factor: 4}', ...; see methods/nct",
    )
    parser.add_argument("--protocol", help="cifar10-50k, coco2014-30k, ...: in place of data and extractor")
    parser.add_argument("--device", help="default: a GPU where there is one, else cpu")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the pipeline brings; ours runs anyway"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="make and time every picture anew, cached or not"
    )
    parser.add_argument(
        "--output", type=Path, help="report to write, .json (default: the table is only printed)"
    )
    return parser


def evaluate(arguments: list[str]) -> int:
    """evaluate PIPELINE --data NAME_OR_FOLDER --num_images N --steps 1 2 4 [--seeds 3] [--output report.json]

    Score a pipeline or a folder of pictures.
    """
    args = _evaluate_parser().parse_args(arguments)

    from ..reports.conditions import read_control
    from ..reports.evaluate import evaluate as score
    from ..reports.table import markdown_table, rows_of
    from ..reports.trained_on import reference_of
    from ..teachers import EMBEDDED
    from ..training.model_card import with_scores

    if args.pipeline in EMBEDDED:
        name, args.pipeline = args.pipeline, str(EMBEDDED[args.pipeline])
    else:
        name = Path(args.pipeline).name
    own: dict[str, Any] = {
        k: getattr(args, k) for k in ("data", "split", "holdout", "extractor") if getattr(args, k)
    }
    if args.protocol and own:
        raise UserError(f"{next(iter(own))}: has no effect beside --protocol {args.protocol}; leave it out")
    if not args.protocol:
        own |= reference_of(args.pipeline, args.data, args.split, args.holdout)
        if own["holdout"] is None and not args.holdout:
            note = "has no split of unseen pictures: scored without a hold-out"
            print(f"fewstep: {own['data']}: {note}", file=sys.stderr)
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
    """sample PIPELINE --data NAME_OR_FOLDER --num_images N --steps 4 --output FOLDER | --prompts FILE

    Make a folder of pictures, each of the caption or class of a real one, or of a line of a text file.
    """
    parser = Parser(sample)
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
    parser.add_argument(
        "--steps", type=whole(1, MOST_STEPS), required=True, help="network steps of a picture"
    )
    parser.add_argument(
        "--seed_block", type=whole(0, 10**12), default=1000, help="of the noise; scores use 0, 1, ..."
    )
    parser.add_argument("--batch_size", type=whole(1, 65536), default=64, help="pictures made at once")
    parser.add_argument("--guidance_scale", type=scale, help="as of evaluate")
    parser.add_argument("--control", help="as of evaluate")
    parser.add_argument("--device", help="default: a GPU where there is one, else cpu")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the pipeline brings")
    args = vars(parser.parse_args(arguments))

    from ..reports.conditions import read_control
    from ..reports.sample import sample as make
    from ..reports.trained_on import data_for, read_data

    given, split = args.pop("data"), args.pop("split")
    if args["prompts"] is None:
        data = read_data(given) if given else data_for([args["pipeline"]])
        args |= {"data": data.name, "data_options": data.options, "split": split or data.split}
    control = args.pop("control")
    print(make(**args, control=None if control is None else read_control(control)))
    return 0


def compare(arguments: list[str]) -> int:
    """compare RUN [NAME=RUN ...] --output DIR [--num_images N] [--seeds 3] [--steps 1 2 4] [--teacher NAME]

    Score students of one teacher alike: compare.html, and the same as .json, .md, .csv and .tex.
    """
    parser = Parser(
        compare,
        epilog="Further flags go to `fewstep evaluate` (--batch_size, --clip, --trust_remote_code, ...).",
    )
    parser.add_argument(
        "entries",
        nargs="+",
        type=place,
        help="[NAME=] run folder, pipeline folder, embedded teacher, hub id, each but runs with +LORA; or report.json",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the page and its pictures")
    parser.add_argument(
        "--steps", type=whole(1, MOST_STEPS), nargs="+", default=[1, 2, 4], help="of students"
    )
    parser.add_argument("--teacher", help="scored too; default: the one that the runs name; none: no row")
    parser.add_argument(
        "--teacher_steps",
        type=whole(1, MOST_STEPS),
        nargs="+",
        default=[1, 2, 4, 8, 50],
        help="of the teacher",
    )
    parser.add_argument("--data", type=place, help="as of evaluate; default: what the models were trained on")
    parser.add_argument("--num_images", type=whole(1, MOST_IMAGES), default=500, help="pictures in one value")
    parser.add_argument(
        "--seeds", type=whole(1, 1000), default=3, help="disjoint blocks of num_images pictures"
    )
    parser.add_argument("--device", help="default: a GPU where there is one, else cpu")
    parser.add_argument("--title", help="head of the page (default: made from the teacher's name)")
    args, options = parser.parse_known_args(arguments)
    _evaluate_parser().parse_args(["pipeline", *options])  # before the long work

    from ..catalog.methods import origins
    from ..reports.compare import compare as score

    score(
        args.entries, args.output, steps=args.steps, teacher=args.teacher, teacher_steps=args.teacher_steps,
        data=args.data, num_images=args.num_images, seeds=args.seeds, device=args.device, options=options,
        title=args.title, origins=origins(),
    )  # fmt: skip
    print((args.output / "compare.md").read_text())
    print(f"page: {args.output / 'compare.html'}")
    return 0
