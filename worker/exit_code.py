"""What the process ends with."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of `darkroom`."""

    OK = 0
    SETTINGS = 2  # the settings are wrong: see the message
    BUG = 1  # a thread ended by an unforeseen error
    ENGINE = 3  # the model cannot be loaded, or the engine crashed too often
    FORCED = 130  # a second signal
