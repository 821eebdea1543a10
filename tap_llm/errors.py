"""Errors for people: one message that names the thing and the way out.

Everything a user can get wrong raises [`InputError`]; the command line turns it into one line and exit status 2.
"""


class InputError(ValueError):
    """Input that cannot be used: a broken image, an impossible region, an unknown model, a damaged checkpoint."""


class MissingFileError(InputError):
    """A file that the user has to provide is not there; the message says which file and where to put it."""
