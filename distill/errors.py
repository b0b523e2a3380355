"""The one exception for what a user can mend."""


class UserError(Exception):
    """One line that names the key or file, the value and the remedy. The command line prints it and exits with 2."""
