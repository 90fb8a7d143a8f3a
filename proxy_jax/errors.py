"""The one error that users see as a line of text instead of a traceback."""


class InputError(ValueError):
    """Something a user gave us is wrong: a file, a key, a tensor, a mesh.

    The message is one line that names the thing and says what was expected. Programs print it and
    exit with status 2; library callers catch it like any ValueError.
    """
