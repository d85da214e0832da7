"""pybustcall: one awaited call, and every cache drops the old value.

    async with BustcallClient("http://127.0.0.1:8989", peers=["http://10.0.0.2:8989"]) as client:
        await client.bust("cdn/main.css")

The supported surface is what this module, `pybustcall.errors` and `pybustcall.testing` export.
"""

from __future__ import annotations

from pybustcall.background import ReplayReport
from pybustcall.bustcall_core import BustcallClient, ClientOutbox, ClientStatistics
from pybustcall.capabilities import SEMVERX, VERSION, DaemonCapabilities, advertisement
from pybustcall.errors import (
    BustcallError,
    BustFailed,
    BustRejected,
    ClientClosed,
    ConfigurationError,
    DaemonsUnavailable,
    DeadlineExceeded,
    IncompatibleDaemon,
    InvalidRequest,
    InvalidVersion,
    NotAllowed,
    OutboxError,
    Panic,
    ProtocolViolation,
    SlotTimeout,
)
from pybustcall.events import BustEvent, EventStream, Reset
from pybustcall.faults import Band, Fault, FaultKind, Oversight
from pybustcall.fleet import DaemonView, FleetView
from pybustcall.hotswap import Dependency, Resolution, Swap, SwapResult
from pybustcall.jobs import BustJob
from pybustcall.models import CapabilityDocument, DaemonStatus, Requirements, Timestamp
from pybustcall.near_cache import NearCache, NearCacheStatistics
from pybustcall.outbox import Outbox, OutboxCounts, OutboxRow, RowState, StoredBust
from pybustcall.policies import Breaker, BreakerState, Budget, Failback, Hedge, Pool, Probes, Retry
from pybustcall.results import Attempt, BustReport, BustResult, Delivery, LayerResult
from pybustcall.semverx import SemverX, SemverXRange, Spec, State, SwapVerdict, can_hot_swap
from pybustcall.session import TLS, PoolStatistics
from pybustcall.telemetry import (
    AttemptMade,
    BreakerMoved,
    BustDeferred,
    BustReplayed,
    Event,
    FailedBack,
    FailedOver,
    FaultMet,
    Hedged,
    OutboxSetAside,
)
from pybustcall.topology import Route

__version__ = VERSION

__all__ = [
    "SEMVERX",
    "TLS",
    "VERSION",
    "Attempt",
    "AttemptMade",
    "Band",
    "Breaker",
    "BreakerMoved",
    "BreakerState",
    "Budget",
    "BustDeferred",
    "BustEvent",
    "BustFailed",
    "BustJob",
    "BustRejected",
    "BustReplayed",
    "BustReport",
    "BustResult",
    "BustcallClient",
    "BustcallError",
    "CapabilityDocument",
    "ClientClosed",
    "ClientOutbox",
    "ClientStatistics",
    "ConfigurationError",
    "DaemonCapabilities",
    "DaemonStatus",
    "DaemonView",
    "DaemonsUnavailable",
    "DeadlineExceeded",
    "Delivery",
    "Dependency",
    "Event",
    "EventStream",
    "Failback",
    "FailedBack",
    "FailedOver",
    "Fault",
    "FaultKind",
    "FaultMet",
    "FleetView",
    "Hedge",
    "Hedged",
    "IncompatibleDaemon",
    "InvalidRequest",
    "InvalidVersion",
    "LayerResult",
    "NearCache",
    "NearCacheStatistics",
    "NotAllowed",
    "Outbox",
    "OutboxCounts",
    "OutboxError",
    "OutboxRow",
    "OutboxSetAside",
    "Oversight",
    "Panic",
    "Pool",
    "PoolStatistics",
    "Probes",
    "ProtocolViolation",
    "ReplayReport",
    "Requirements",
    "Reset",
    "Resolution",
    "Retry",
    "Route",
    "RowState",
    "SemverX",
    "SemverXRange",
    "SlotTimeout",
    "Spec",
    "State",
    "StoredBust",
    "Swap",
    "SwapResult",
    "SwapVerdict",
    "Timestamp",
    "__version__",
    "advertisement",
    "can_hot_swap",
]
