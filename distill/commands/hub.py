"""The verb push-to-hub."""

from pathlib import Path

from .arguments import Parser


def push_to_hub(arguments: list[str]) -> int:
    """push-to-hub RUN OWNER/NAME [--private]

    Upload what a run exported.
    """
    parser = Parser(push_to_hub)
    parser.add_argument("run", type=Path, help="run folder; of a LoRA the file goes up, else the pipeline")
    parser.add_argument("repo_id", help="OWNER/NAME on the hub, made if it is not there")
    parser.add_argument("--private", action="store_true", help="of a repository that is made")
    args = parser.parse_args(arguments)
    from ..models.hub import push

    print(push(args.run, args.repo_id, private=args.private))
    return 0
