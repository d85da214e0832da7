"""A file that tells what is made of what, read when a daemon starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.models import check_target

if TYPE_CHECKING:
    import os


__all__ = ["read_registrations", "refuse_entries", "shown_name"]


def read_registrations(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Read a JSON object {"entry": ["what it depends on", ...], ...}.

    Raises `ConfigurationError` (setting "entries") for anything else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise refuse_entries(path, f"the key {shown_name(key)} is there twice; list what it depends on once")
            seen[key] = value
        return seen

    try:
        document = json.loads(Path(path).read_bytes().decode(), object_pairs_hook=once)
    except OSError as error:
        raise refuse_entries(path, f"the file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise refuse_entries(
            path, f"expected UTF-8, found the byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        raise refuse_entries(path, f"expected JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise refuse_entries(path, "expected an object of lists, found deeper nesting") from None
    if not isinstance(document, dict):
        raise refuse_entries(path, f"expected an object of lists, found {_kind(document)}")
    return {_checked(path, "the key", key): _read_list(path, key, value) for key, value in document.items()}


def _read_list(path: str | os.PathLike[str], key: str, value: object) -> tuple[str, ...]:
    where = f"the key {shown_name(key)}"
    if not isinstance(value, list):
        raise refuse_entries(path, f"{where}: expected a list of what it depends on, found {_kind(value)}")
    return tuple(_checked(path, f"{where}: number {number}", name) for number, name in enumerate(value, start=1))


def _checked(path: str | os.PathLike[str], where: str, name: object) -> str:
    if not isinstance(name, str):
        raise refuse_entries(path, f"{where}: expected a string, found {_kind(name)}")
    try:
        return check_target(name)
    except InvalidRequest as error:
        reason = str(error).removeprefix("target ").removesuffix("; nothing was sent")
        raise refuse_entries(path, f"{where} ({shown_name(name)}) {reason}") from None


def refuse_entries(path: str | os.PathLike[str], why: str) -> ConfigurationError:
    """Make the error of a file of entries."""
    return ConfigurationError(f"entries file {str(path)!r}: {why}", setting="entries")


def shown_name(name: str) -> str:
    """Show a name of such a file, if it is not too long."""
    return ascii(name if len(name) <= 60 else f"{name[:60]}...")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
