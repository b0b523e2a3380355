"""`fewstep <verb>`: the command line. A user's mistake is one line on stderr and exit code 2."""

import sys
from collections.abc import Callable

from .errors import UserError


def distill(arguments: list[str]) -> int:
    """distill CONFIG [--key.sub value ...] [--output_dir DIR] [--max_train_steps N] [--dry_run]"""
    from .config import load_config, read_yaml, with_overrides

    dry = "--dry_run" in arguments
    path, *rest = _with_config([a for a in arguments if a != "--dry_run"], distill)
    config = load_config(with_overrides(read_yaml(path), rest))
    if dry:
        from .dry_run import describe

        print(describe(config))
        return 0
    from .runner import Runner

    runner = Runner(config)
    if runner.finished():
        print(
            f"{config.output_dir} is finished: {config.max_train_steps} steps, exported to {runner.run / 'pipeline'}"
        )
        return 0
    runner.train()
    return 0


def train_teacher(arguments: list[str]) -> int:
    """train-teacher CONFIG [--stages.<stage>.key value ...]: autoencoder, text encoder and network, one after another"""
    from .config import read_yaml, with_overrides
    from .pretrain.teacher import train

    path, *rest = _with_config(arguments, train_teacher)
    print(f"teacher: {train(with_overrides(read_yaml(path), rest))}")
    return 0


def _with_config(arguments: list[str], verb: Callable[[list[str]], int]) -> list[str]:
    if not arguments or arguments[0].startswith("--"):
        raise UserError(f"which configuration? usage: fewstep {verb.__doc__}")
    return arguments


VERBS: dict[str, Callable[[list[str]], int]] = {
    "distill": distill,
    "train-teacher": train_teacher,
}


def usage() -> str:
    return "usage:\n" + "\n".join(f"  fewstep {(f.__doc__ or '').splitlines()[0]}" for f in VERBS.values())


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    verb, *rest = arguments
    try:
        if verb not in VERBS:
            raise UserError(f"no command {verb!r}; there are: {', '.join(VERBS)}")
        if rest[:1] in (["-h"], ["--help"]):
            print(f"usage: fewstep {VERBS[verb].__doc__}")
            return 0
        return VERBS[verb](rest)
    except UserError as error:
        print(f"fewstep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
