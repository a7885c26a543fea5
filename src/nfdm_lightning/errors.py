"""The errors that a user meets; the command line prints them as one line, without a traceback."""


class NfdmError(Exception):
    """Base of the errors below."""


class ConfigError(NfdmError, ValueError):
    """A configuration that cannot work; says which key, and what would."""


class DataError(NfdmError, ValueError):
    """Data that is missing, corrupt or of the wrong shape; names the file and the way out."""


class NonFiniteError(NfdmError, ArithmeticError):
    """A loss or gradient that is not finite; names term, time and process."""


class CheckpointError(NfdmError, ValueError):
    """A checkpoint that is missing, damaged or of another model; names the file and the way out."""
