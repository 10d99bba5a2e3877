"""What a command can say when it cannot do what it was asked.

    CommandError      the world is not as the command needs it: exit status 1
      RefusedError    the request itself cannot work as it stands: exit status 2

Both are shown as one line, `error: ...`, without a traceback (KVASIR_DEBUG=1 shows it).
"""

import os

from kvasir_proto.errors import KvasirError


class CommandError(Exception):
    """A command failed; its text is meant for the person at the terminal."""

    exit_status = 1


class RefusedError(CommandError):
    """A command was refused before it changed anything."""

    exit_status = 2


REFUSALS = (400, 404)
"""HTTP statuses of errors that no retry mends."""


def describe(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit status for an error, or None: it is our bug and keeps its traceback."""
    if isinstance(error, CommandError):
        return str(error), error.exit_status
    if isinstance(error, KvasirError):
        line = f"{error.param}: {error.message}" if error.param else error.message
        return line, 2 if error.status.http in REFUSALS else 1
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1
    return None


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("KVASIR_DEBUG", "") not in ("", "0")
