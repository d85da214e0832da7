"""The suite: all checks, one after the other, against one daemon."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import aiohttp
from pydantic import ValidationError

from pybustcall.capabilities import advertisement_bytes
from pybustcall.errors import ConfigurationError
from pybustcall.models import CapabilityDocument
from pybustcall.testing.conformance import base, dependencies, document, events, idempotency, jobs, kinds
from pybustcall.testing.conformance.checking import Check, Skipped, Unmet, Verdict
from pybustcall.testing.conformance.dependencies import forget, known_dependencies
from pybustcall.testing.conformance.entries import removed_by, try_register
from pybustcall.testing.conformance.expecting import reply_of
from pybustcall.testing.conformance.probe import BINDINGS, CAPABILITIES, Probe
from pybustcall.topology import DaemonAddress

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CHECKS", "check_daemon", "judge"]

_PATIENCE: Final = 3  # checks in a row without an answer, after which nothing more is asked

CHECKS: Final[tuple[Check, ...]] = (
    *base.CHECKS,
    *document.CHECKS,
    *idempotency.CHECKS,
    *kinds.CHECKS,
    *jobs.CHECKS,
    *events.CHECKS,
    *dependencies.CHECKS,
)
"""The base protocol and the extensions, as checks."""


async def check_daemon(
    url: str, *, token: str | None = None, strict: bool = False, timeout: float = 10.0
) -> tuple[Verdict, ...]:
    """Run the checks of the base protocol, and of what it advertises, against the daemon at `url`; tell their verdicts.

    - `strict`: also what only daemons of ours must do
    - `timeout`: seconds for each request

    The checks bust and register keys that begin with "conformance/", also in namespaces that begin with "conformance-",
    and announce dependencies whose names begin so, ever new ones, and have these forgotten at the end. Everything is
    busted in such a namespace only, or as a dry run. What the daemon does not advertise is skipped, which is no
    failure. Raises `ConfigurationError` for a URL that is none, and for a token that is none or would cross
    a network in clear text; a daemon that does not answer makes verdicts that say so, and after three of them in a row
    it is asked no more.
    """
    address = DaemonAddress.parse(url)
    headers = {} if token is None else {"Authorization": f"Bearer {_checked(token, address)}"}
    async with Probe(address, headers, timeout) as probe:
        probe.advertised = await _advertised(probe)
        verdicts: list[Verdict] = []
        for check in [check for check in CHECKS if strict or not check.strict]:
            over = _is_given_up(verdicts)
            verdicts.append(_not_asked(check) if over else await judge(check, probe))
        await _clean_up(probe, verdicts)
        return tuple(verdicts)


async def _clean_up(probe: Probe, verdicts: Sequence[Verdict]) -> None:
    """Have forgotten what was announced and registered, as far as that goes: no verdict depends on it."""
    if _is_given_up(verdicts):
        return
    with suppress(Unmet, Skipped, aiohttp.ClientError, TimeoutError, OSError):
        for key, namespace in sorted(probe.entries, key=str):
            if await try_register(probe, key, namespace=namespace):  # so that it has nothing, also where it is not held
                await removed_by(probe, key, namespace)
        for name in sorted(probe.names.intersection(await known_dependencies(probe) if probe.names else ())):
            await forget(probe, name)


def _is_given_up(verdicts: Sequence[Verdict]) -> bool:
    """Tell whether the last checks went unanswered, so that more of them would only cost time."""
    recent = verdicts[-_PATIENCE:]
    return len(recent) == _PATIENCE and not any(verdict.answered for verdict in recent)


def _not_asked(check: Check) -> Verdict:
    return Verdict(check.name, ok=False, detail="not asked any more", answered=False)


def _checked(token: str, address: DaemonAddress) -> str:
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigurationError("token must be visible ASCII characters without spaces", setting="token")
    if not (address.is_encrypted or address.is_local):
        raise ConfigurationError(f"the token would go to {address} in clear text; use https://", setting="token")
    return token


async def _advertised(probe: Probe) -> frozenset[str]:
    """Tell what the daemon says it can do, and say the same of us; bad answers are for a check to tell."""
    try:
        answer = await probe.send("GET", CAPABILITIES)
        if answer.status == 200:
            found = frozenset(reply_of(CapabilityDocument, answer).capabilities)
            if "daemon.negotiate" in found:
                await probe.send("POST", CAPABILITIES, advertisement_bytes())
            return found
        answer = await probe.send("GET", "/api/v1/bindings/capabilities")
        if answer.status == 200:
            bindings = BINDINGS.validate_json(answer.body)
            return frozenset(name for binding in bindings.values() for name in binding.capabilities)
    except (Unmet, ValidationError, aiohttp.ClientError, OSError):
        pass
    return frozenset()


async def judge(check: Check, probe: Probe) -> Verdict:
    """Run one check; tell what it came to."""
    missing = [name for name in check.needs if not probe.advertises(name)]
    if check.any_of and not any(map(probe.advertises, check.any_of)):
        missing.append(f"any of {', '.join(check.any_of)}")
    if missing:
        return Verdict(check.name, ok=True, detail=f"it does not advertise {', '.join(missing)}", skipped=True)
    try:
        await check.run(probe)
    except Skipped as reason:
        return Verdict(check.name, ok=True, detail=str(reason), skipped=True)
    except Unmet as unmet:
        return Verdict(check.name, ok=False, detail=str(unmet))
    except aiohttp.ClientResponseError as error:
        return Verdict(check.name, ok=False, detail=f"it does not speak HTTP: {' '.join(error.message.split())}")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        detail = f"no answer: {str(error) or type(error).__name__}"
        return Verdict(check.name, ok=False, detail=detail, answered=False)
    return Verdict(check.name, ok=True)
