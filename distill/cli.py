"""`fewstep <verb>`: the command line.

A user's mistake is one line on stderr and exit code 2; a signal ends a command with 128 + its number.
"""

import errno
import os
import sys
from collections.abc import Callable
from importlib.metadata import version

from .commands.arguments import described, usage_of
from .commands.hub import push_to_hub
from .commands.methods import methods
from .commands.process import settle
from .commands.protocols import prepare_data_command, verify_metrics_command
from .commands.recipes import recipes_command
from .commands.scoring import compare, evaluate, sample
from .commands.training import demo, distill, train_teacher, turbo
from .config.nearest import hint
from .config.third_party import quiet
from .errors import UserError
from .training.interrupts import exit_code, terminations_raised

VERBS: dict[str, Callable[[list[str]], int]] = {
    "turbo": turbo,
    "distill": distill,
    "evaluate": evaluate,
    "compare": compare,
    "sample": sample,
    "push-to-hub": push_to_hub,
    "train-teacher": train_teacher,
    "demo": demo,
    "recipes": recipes_command,
    "methods": methods,
    "prepare-data": prepare_data_command,
    "verify-metrics": verify_metrics_command,
}


def usage() -> str:
    verbs = "\n".join(f"  {usage_of(verb)}\n      {described(verb)}" for verb in VERBS.values())
    return (
        f"usage:\n{verbs}\n\n"
        "`fewstep VERB --help` shows every flag with its default, `fewstep --version` the version.\n"
        "--traceback anywhere shows where an unexpected error comes from."
    )


def main(argv: list[str] | None = None) -> int:
    """The exit code: 2 after a user's mistake, 1 after a fault of ours or of a library's, 130 after Ctrl-C."""
    settle()
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    quiet()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fewstep {version('fewstep')}")
        return 0
    try:
        with terminations_raised():
            return _run(*arguments)
    except UserError as error:
        return _fail(str(error), 2)
    except SystemExit as end:  # a verb's --help ends so
        if end.code:
            raise
        return 0
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
    if verb not in VERBS:
        raise UserError(f"no command {verb!r}; {hint(verb, VERBS)}")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        from .training.launch import join_on_cpus

        join_on_cpus()
    return VERBS[verb](list(arguments))


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
