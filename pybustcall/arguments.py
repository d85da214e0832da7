"""Settings and arguments of a client, checked before anything is sent.

Bad settings raise `ConfigurationError`, bad arguments of a call `InvalidRequest`; each names what it is about.
"""

from __future__ import annotations

import inspect
import os
import re
import uuid
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, final, get_args

import aiohttp

from pybustcall.capabilities import advertisement, check_requirements
from pybustcall.delivery import DeliveryMode
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.faults import check_tolerance
from pybustcall.models import Requirements
from pybustcall.outbox import Outbox
from pybustcall.policies import Breaker, Budget, Failback, Hedge, Pool, Probes, Retry, check_seconds
from pybustcall.session import TLS

if TYPE_CHECKING:
    from pybustcall.topology import Topology

__all__ = [
    "KEPT",
    "Kept",
    "Options",
    "check_capability",
    "check_client_id",
    "check_flag",
    "check_hook",
    "check_key",
    "check_mode",
    "check_session",
    "check_token",
    "check_types",
    "options_of",
    "outbox_of",
    "requirements_of",
]

_TOKEN: Final = re.compile(r"[!-~]+")
_KEY: Final = re.compile(r"[!-~]{1,255}")
_MODES: Final = get_args(DeliveryMode)


class Kept(Enum):
    """Says that an option is left as it is, where None means something."""

    KEPT = "kept"


KEPT: Final = Kept.KEPT


@final
@dataclass(frozen=True, slots=True)
class Options:
    """What `with_options` may vary."""

    timeout: float
    fault_tolerance: int
    retry: Retry | None
    delivery: DeliveryMode
    reveal_targets: bool


def requirements_of(requires: object) -> tuple[Requirements, ...]:
    """Return what is required of daemons: by this package, and by the caller."""
    if requires is None:
        return (advertisement().requires,)
    if not isinstance(requires, Requirements):
        raise ConfigurationError(
            f"requires must be Requirements or None, not {type(requires).__name__}", setting="requires"
        )
    return (advertisement().requires, check_requirements(requires))


def options_of(
    timeout: float, fault_tolerance: int, retry: Retry | None, delivery: DeliveryMode, reveal_targets: bool
) -> Options:
    """Return what `with_options` may vary, checked."""
    try:
        tolerance = check_tolerance(fault_tolerance)
    except InvalidRequest:
        raise ConfigurationError(
            f"fault_tolerance must be an integer from 0 to 12, not {fault_tolerance!r}", setting="fault_tolerance"
        ) from None
    check_types(retry=retry)
    try:
        mode = check_mode(delivery)
    except InvalidRequest as error:
        raise ConfigurationError(str(error).removesuffix("; nothing was sent"), setting="delivery") from None
    return Options(check_seconds(timeout, "timeout"), tolerance, retry, mode, reveal_targets)


def outbox_of(outbox: Outbox | str | os.PathLike[str] | None) -> Outbox | None:
    """Return the outbox that a setting means: a path, or a policy; None for none."""
    if isinstance(outbox, str | os.PathLike):
        return Outbox(path=outbox)
    if outbox is not None and not isinstance(outbox, Outbox):
        raise ConfigurationError(f"outbox must be a path or Outbox, not {type(outbox).__name__}", setting="outbox")
    return outbox


def check_mode(delivery: DeliveryMode) -> DeliveryMode:
    """Return how a call is delivered, if it is one of the ways."""
    if delivery not in _MODES:
        raise InvalidRequest(
            f"delivery must be one of {', '.join(_MODES)}, not {delivery!r}; nothing was sent", field="delivery"
        )
    return delivery


def check_flag(flag: object, name: str) -> None:
    """Refuse what is neither true nor false."""
    if type(flag) is not bool:
        raise InvalidRequest(f"{name} must be true or false, not {flag!r}; nothing was sent", field=name)


def check_hook(hook: object) -> None:
    """Refuse what cannot be called, or would have to be awaited."""
    if not callable(hook) or inspect.iscoroutinefunction(hook):
        what = "an async function, which nobody would await" if callable(hook) else type(hook).__name__
        raise ConfigurationError(f"a hook must be a plain callable, not {what}", setting="hook")


def check_capability(name: object) -> None:
    """Refuse what is no capability's name."""
    if not (isinstance(name, str) and name):
        raise InvalidRequest(f"a capability's name is text, not {name!r}; nothing was sent", field="name")


def check_client_id(client_id: object) -> None:
    """Refuse a name that cannot be printed."""
    if client_id is not None and not (isinstance(client_id, str) and client_id.isprintable() and client_id):
        raise ConfigurationError(f"client_id must be printable text, not {client_id!r}", setting="client_id")


def check_key(key: object) -> str:
    """Return the idempotency key of a bust: the given one if a header can carry it, else a new one."""
    if key is None:
        return str(uuid.uuid4())
    if not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise InvalidRequest(
            "idempotency_key must be 1 to 255 visible ASCII characters without spaces; nothing was sent",
            field="idempotency_key",
        )
    return key


_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "tls": (TLS, type(None)),
    "retry": (Retry, type(None)),
    "hedge": (Hedge, type(None)),
    "breaker": (Breaker, type(None)),
    "budget": (Budget, type(None)),
    "probes": (Probes, type(None)),
    "failback": (Failback, type(None)),
    "pool": (Pool,),
    "session": (aiohttp.ClientSession, type(None)),
}


def check_types(**settings: object) -> None:
    """Refuse settings that are of another type than theirs."""
    for setting, value in settings.items():
        if not isinstance(value, _TYPES[setting]):
            expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in _TYPES[setting])
            raise ConfigurationError(f"{setting} must be {expected}, not {type(value).__name__}", setting=setting)


def check_token(token: object, topology: Topology, *, allowed: bool, proxied: bool) -> None:
    """Refuse a token that no header can carry, or that would cross a network, or a proxy, in clear text."""
    if token is None:
        return
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ConfigurationError("token must be visible ASCII characters without spaces", setting="token")
    for address in topology:
        kept = address.is_encrypted or address.scheme == "unix" or (address.is_local and not proxied)
        if not kept and not allowed:
            raise ConfigurationError(
                f"the token would go to {address} in clear text; use https://, or say allow_insecure_token=True",
                setting="token",
            )


def check_session(
    session: aiohttp.ClientSession | None, topology: Topology, *, token: str | None, tls: TLS | None, trust_env: bool
) -> None:
    """Refuse a session of the caller that contradicts the settings beside it, or cannot reach a daemon."""
    if session is None:
        return
    if tls is not None or trust_env:
        raise ConfigurationError(
            "tls and trust_env belong to the session that was passed in; set them there", setting="session"
        )
    if token is not None and session.auth is not None:
        raise ConfigurationError(
            "the session that was passed in has an auth of its own, which the token would contradict; give one of them",
            setting="session",
        )
    on_socket = isinstance(session.connector, aiohttp.UnixConnector)
    for address in topology:
        if (address.socket_path is not None) != on_socket:
            raise ConfigurationError(
                f"the session that was passed in cannot reach {address}: its connector is "
                f"{'a' if on_socket else 'not a'} Unix socket's",
                setting="session",
            )
