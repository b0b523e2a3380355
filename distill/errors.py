"""The exception for what a user can mend."""


class UserError(Exception):
    """One line that names the key or file, the value and the remedy. The command line prints it and exits with 2."""


class MissingSplit(UserError):
    """Data are there, and have no split of that name."""
