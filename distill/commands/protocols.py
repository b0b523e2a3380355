"""The verbs prepare-data and verify-metrics."""

from pathlib import Path

from ..errors import UserError
from .arguments import Parser, whole


def prepare_data_command(arguments: list[str]) -> int:
    """prepare-data NAME [--statistics PATH] [--pictures PATH] [--prompts PATH] [--weights PATH]

    Fetch, check by hash and keep what a protocol or a check of verify-metrics needs.
    """
    parser = Parser(
        prepare_data_command,
        epilog="The Inception weights are fetched too. Give local copies where there is no network.",
    )
    parser.add_argument("name", help="protocol, check of verify-metrics, or inception for the weights alone")
    parser.add_argument("--statistics", type=Path, help=".npz of mu and sigma of the reference")
    parser.add_argument("--pictures", type=Path, help="archive of the reference's or the check's pictures")
    parser.add_argument("--prompts", type=Path, help="the file of the protocol's captions")
    parser.add_argument("--weights", type=Path, help="the Inception weights")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(arguments)

    from ..protocols.prepare import prepare_data
    from ..protocols.table import STANDARDS

    done = prepare_data(
        args.name, statistics=args.statistics, pictures=args.pictures, prompts=args.prompts, weights=args.weights,
        progress=not args.quiet,
    )  # fmt: skip
    for file in done:
        print(file)
    if args.name in STANDARDS:
        for sentence in STANDARDS[args.name].not_established:
            print(sentence)
    return 0


def verify_metrics_command(arguments: list[str]) -> int:
    """verify-metrics [CHECK ...] [--device DEVICE]

    Reproduce published FIDs from prepared files, so that reports say "verified here".
    """
    parser = Parser(verify_metrics_command)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="which; all that are prepared by default")
    parser.add_argument("--device", default="cpu", help="where Inception runs")
    parser.add_argument("--batch_size", type=whole(1, 65536), default=64, help="pictures seen at once")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(arguments)

    import torch

    from ..protocols.verify import verify_metrics

    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {args.device}: not usable here ({reason}); leave it out or use cpu"
        ) from None
    for outcome in verify_metrics(
        args.checks, device=args.device, batch_size=args.batch_size, progress=not args.quiet
    ):
        print(outcome)
    return 0
