"""The kinds of failure that a person is told about without a traceback."""


class UserError(ValueError):
    """Something that was typed or passed is wrong: the message names the value, what is allowed, and what to change.

    The command line prints the message alone and exits with 2.
    """


class DamageError(UserError):
    """Stored data (a shard, a checkpoint) is missing, damaged or incomplete: the message names the file and the finding.

    The command line prints the message alone and exits with 1.
    """


class StorageError(UserError):
    """A storage does not answer, or not as it should: a mistake in its address, or something that may pass. Exit code 2."""


class Stopped(Exception):
    """A run was asked to stop and has committed its state: the same command goes on. The command line exits with 75 (try again)."""
