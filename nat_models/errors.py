"""Errors that the caller can mend. Each is made of one message, so it crosses process borders whole."""


class UserError(Exception):
    """Something the caller can mend; commands print it as one line, without a traceback."""


class CheckpointError(RuntimeError):
    """Weights could not be found, read or fitted to the model; the message says what was found and expected."""
