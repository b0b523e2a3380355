"""The exception for what a user can mend."""


class UserError(Exception):
    """One line that names the key or file, the value and the remedy. The command line prints it and exits with 2."""


class MissingSplit(UserError):
    """Data are there, and have no split of that name."""


def first_line(error: BaseException) -> str:
    """The first 200 characters of the first line of an error's text, for one-line messages."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:197] + "..."
