"""The one exception that means the user's input is at fault, not the program."""


class InputError(ValueError):
    """Says in one line what was given, what is allowed and what to do. The scripts print it and exit with code 2."""
