"""What a bust needs of a daemon beyond the base protocol, and what may be asked instead where a daemon lacks it.

It is decided here which capabilities a request takes, and which request is the next wider one that a daemon can do.
Whether a daemon has them is `capabilities`' and `negotiation`'s to know; whether wider will do, the caller's to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pybustcall.models import EVERYTHING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pybustcall.models import BustRequest, Kind

__all__ = ["needs_of", "phrase_of", "remedy_of", "widened"]

_NAMED: Final = {"key": "of a key", "prefix": "by prefix", "tag": "by tag", "all": "of everything"}


def needs_of(request: BustRequest) -> tuple[str, ...]:
    """Tell the capabilities that a daemon must advertise to be sent this bust, beside `cache.bust`; none for the base.

    `reason` takes none: a daemon that does not know it does the same without.
    """
    needs = [] if request.kind == "key" else [f"cache.bust.{request.kind}"]
    asked = {
        "soft": request.soft,
        "namespace": request.namespace is not None,
        "dry_run": request.dry_run,
        "verify": request.verify,
        "settle": request.settle is not None,
    }
    return (*needs, *(f"cache.bust.{name}" for name, given in asked.items() if given))


def phrase_of(request: BustRequest) -> str:
    """Say in a few words what kind of bust it is, such as "a soft bust by tag"."""
    what = f"a {'soft ' if request.soft else ''}{'dry run' if request.dry_run else 'bust'} {_NAMED[request.kind]}"
    what += " in a namespace" if request.namespace is not None else ""
    said = [word for word, given in (("verify", request.verify), ("settle", request.settle is not None)) if given]
    return f"{what} with {' and '.join(said)}" if said else what


def widened(request: BustRequest, supports: Callable[[str], bool]) -> BustRequest | None:
    """Tell what to ask of a daemon that has what `supports` says: the request, or the next wider, or None.

    A prefix and a tag become everything in the same namespace, soft becomes hard. A namespace is never left out, since
    that would reach other tenants; nor is a promise (dry run, verify, settle), which nothing wider would keep.
    """
    lacks = {name for name in needs_of(request) if not supports(name)}
    if not lacks:
        return request
    mends: dict[str, object] = {}
    if request.dry_run:
        return None
    if "cache.bust.soft" in lacks:
        lacks.remove("cache.bust.soft")
        mends["soft"] = False
    if request.kind in {"prefix", "tag"} and f"cache.bust.{request.kind}" in lacks and supports("cache.bust.all"):
        lacks.remove(f"cache.bust.{request.kind}")
        mends |= {"kind": "all", "target": EVERYTHING, "confirm": True}
    return None if lacks else request.model_copy(update=mends)


def remedy_of(kind: Kind, *, soft: bool, dry_run: bool, option: str | None) -> str:
    """Say what to do if no daemon has what such a bust needs. `option` is how its caller can say that wider will do."""
    told = (
        "Name another daemon, or bring this one up to date; it can do what all of its layers can, and pybustcall"
        " daemon --check names those that cannot."
    )
    if option is None or dry_run or not (soft or kind in {"prefix", "tag"}):
        return told
    return f"{told} With {option} the next wider bust is done instead, where there is one."
