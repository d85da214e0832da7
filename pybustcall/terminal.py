"""How the commands end: what each exit code means, and an error as one sentence.

Exit codes: 0 done; 1 refused or answered wrongly, repeating will not help; 2 wrong usage, target or settings, nothing
was sent; 3 no daemon could do it in time, try again; 4 the daemon cannot start; 130 interrupted.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from pybustcall.errors import BustcallError, ConfigurationError, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["CANNOT_START", "INTERRUPTED", "REFUSED", "UNAVAILABLE", "USAGE", "Failure", "printable", "run_through"]

REFUSED: Final = 1
USAGE: Final = 2
UNAVAILABLE: Final = 3
CANNOT_START: Final = 4
INTERRUPTED: Final = 130

_T = TypeVar("_T")


class Failure(click.ClickException):
    """One sentence on standard error, and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.code = exit_code


def printable(text: str) -> str:
    """Keep what a daemon said from steering the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def run_through(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a command's work; our own errors become one sentence and an exit code."""
    try:
        return asyncio.run(work)
    except ConfigurationError as error:
        if error.setting == "outbox":
            raise Failure(f"{error} (--outbox FILE here)", USAGE) from error
        raise
    except InvalidRequest as error:
        raise Failure(str(error), USAGE) from error
    except BustcallError as error:
        raise Failure(str(error), REFUSED) from error
