"""Requests as they come: what is read of them, in which bounds, and what is well formed.

This module decides what is JSON, what is an idempotency key, which fields make a request, and how aiohttp's own
refusals read in our words. What is done with a request is `app`'s to decide.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiohttp import HttpVersion11, web
from pydantic import BaseModel, ValidationError

from pybustcall.daemon.access import Refusal, presentable
from pybustcall.faults import TABLE, FaultKind
from pybustcall.models import explain

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "KEY_HEADER",
    "binding_of",
    "check_expectation",
    "parse_json",
    "read_body",
    "read_key",
    "refusal_of",
    "validate",
]

KEY_HEADER: Final = "Idempotency-Key"

_KEY: Final = re.compile(r"[!-~]{1,255}")
_REJECTED: Final = TABLE[FaultKind.REJECTED].stage
_DENIED: Final = TABLE[FaultKind.NOT_ALLOWED].stage
_Model = TypeVar("_Model", bound=BaseModel)

_DETAILS: Final[Mapping[int, tuple[int, str]]] = {
    404: (_DENIED, "there is no such route; see /api/v1/capabilities for those that there are"),
    405: (_DENIED, "this route does not take this method; the Allow header says which it takes"),
    417: (_REJECTED, "the only expectation that this daemon knows is 100-continue"),
}


def refusal_of(error: web.HTTPException, most: int) -> Refusal:
    """Say an exception of aiohttp's in our own words."""
    if error.status == 413:
        return Refusal(413, f"the body is larger than {most} bytes")
    stage, detail = _DETAILS.get(error.status, (_REJECTED, "the request cannot be served as it is"))
    allow = error.headers.get("Allow")
    return Refusal(error.status, detail, stage=stage, headers=None if allow is None else {"Allow": allow})


def _expects(request: web.Request) -> str | None:
    """Tell what the request expects before it sends its body; HTTP/1.0 knows nothing of that."""
    return request.headers.get("Expect", "").lower() or None if request.version >= HttpVersion11 else None


def check_expectation(request: web.Request) -> None:
    """Raise the refusal of an expectation that nobody here knows."""
    if _expects(request) not in {None, "100-continue"}:
        stage, detail = _DETAILS[417]
        raise Refusal(417, detail, stage=stage)


async def read_body(request: web.Request, *, most: int, patience: float) -> bytes:
    """Read a body of JSON: at most so many bytes, in so many seconds.

    Raises the refusal if it is something else, too large, late or cut off.
    """
    if request.content_type != "application/json":
        raise Refusal(415, "the body must be application/json")
    if (request.content_length or 0) > most:
        raise Refusal(413, f"the body is larger than {most} bytes")
    try:
        async with asyncio.timeout(patience):
            if _expects(request) == "100-continue":
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # of the answer proper, nothing was written yet
            return await request.read()
    except TimeoutError:
        raise Refusal(
            408, f"the body did not arrive within {patience:g} seconds", headers={"Connection": "close"}
        ) from None
    except web.RequestPayloadError:
        raise Refusal(400, "the body is not what its headers announce") from None


def parse_json(body: bytes) -> object:
    """Parse JSON, more strictly than the standard library: no field twice, no NaN, no endless nesting."""
    try:
        return json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Refusal(400, f"the body is not JSON: {error.msg} ({where})") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deep") from None
    except ValueError:
        raise Refusal(400, "the body has a number that cannot be read") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refusal(400, "the body names a field twice; which of them counts cannot be told")
    return found


def _no_constant(_name: str) -> float:
    raise Refusal(400, "the body has NaN or Infinity, which JSON does not know")


def binding_of(document: object) -> str:
    """Tell the binding that a request says, if it can be shown; "unknown" otherwise."""
    return presentable(document.get("binding") if isinstance(document, dict) else None)


def read_key(request: web.Request, binding: str) -> str | None:
    """Read the idempotency key, if there is one. Raises the refusal of one that cannot be."""
    given = request.headers.getall(KEY_HEADER, [])
    if not given:
        return None
    if len(given) != 1 or not _KEY.fullmatch(given[0]):
        raise Refusal(
            400,
            f"{KEY_HEADER} must be there once, with 1 to 255 visible ASCII characters",
            field_name=KEY_HEADER,
            binding=binding,
        )
    return given[0]


def validate(model: type[_Model], document: object) -> _Model:
    """Make the request of a document. Raises the refusal, which names the field, of one that it is not."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        name, reason = explain(error)
        detail = reason if name is None or reason.startswith(f"{name} ") else f"{name}: {reason}"
        raise Refusal(422, detail, field_name=name, binding=binding_of(document)) from None
