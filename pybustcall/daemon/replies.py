"""How busts and jobs are told over the wire.

This module decides nothing but words: what a bust came to is decided in `jobs` and `engine`, and the status of the
answer goes by what is said here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pybustcall.faults import CLEAN, TABLE, FaultKind, Outcome
from pybustcall.models import DEFAULT_NAMESPACE, JobReply, Timestamp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pybustcall.daemon.journal import Entry
    from pybustcall.models import BustRequest, LayerReply, Progress

__all__ = ["bust_reply", "counted_reply", "echo_of", "job_reply"]

_BROKEN: Final = TABLE[FaultKind.SERVER_ERROR].stage
_PENDING: Final = Outcome.KEPT.value[1]


def echo_of(asked: BustRequest) -> dict[str, object]:
    """Repeat what was asked where it is not the default, so that the client knows that it was understood."""
    fields = {"kind": "key", "namespace": None, "soft": False, "dry_run": False}
    return {name: value for name in fields if (value := getattr(asked, name)) != fields[name]}


def counted_reply(counts: Mapping[str, int]) -> dict[str, object]:
    """Tell how many entries each layer would lose."""
    layers = [{"name": name, "ok": True, "removed": count} for name, count in counts.items()]
    told = {"removed": 0, "matched": sum(counts.values()), "layers": layers}
    return {"status": "success", "fault_stage": CLEAN, **told}


def bust_reply(entry: Entry, *, accepted: bool) -> dict[str, object]:
    """Tell what a bust came to, or that it is a job."""
    well = all(layer.ok for layer in entry.layers)
    return {
        "status": "accepted" if accepted else "success",
        "fault_stage": CLEAN if not accepted else _PENDING if well else _BROKEN,
        "removed": entry.removed,
        **({"verified": True} if entry.wish.verify and not accepted else {}),
        "layers": [_layer(layer) for layer in entry.layers],
        "job": entry.job,
    }


def _layer(layer: LayerReply) -> dict[str, object]:
    told: dict[str, object] = {"name": layer.name, "ok": layer.ok, "removed": layer.removed}
    if layer.error is not None:
        told["error"] = layer.error
    if layer.settle is not None:
        told["settle"] = layer.settle
    if layer.waits:
        told["waits"] = True
    return told


def job_reply(entry: Entry, progress: Progress) -> JobReply:
    """Tell how a bust in the journal stands, and all that the audit knows of it."""
    wish = entry.wish
    return JobReply(
        job=entry.job,
        state=entry.state,
        target=wish.target,
        kind=wish.kind,
        strategy=wish.strategy,
        soft=wish.soft,
        namespace=None if wish.namespace == DEFAULT_NAMESPACE else wish.namespace,
        who=entry.who,
        binding=entry.binding,
        reason=entry.reason,
        daemon=entry.daemon,
        at=Timestamp.of_nanoseconds(entry.at),
        ended=None if entry.ended is None else Timestamp.of_nanoseconds(entry.ended),
        removed=entry.removed,
        attempts=entry.attempts,
        progress=progress,
        layers=entry.layers,
    )
