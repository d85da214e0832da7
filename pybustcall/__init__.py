"""pybustcall: one awaited call, and every cache drops the old value.

    async with BustcallClient("http://127.0.0.1:8989", peers=["http://10.0.0.2:8989"]) as client:
        await client.bust("cdn/main.css")

The supported surface is what this module, `pybustcall.errors` and `pybustcall.testing` export.
"""

from __future__ import annotations

from pybustcall.bustcall_core import BustcallClient, ClientStatistics
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
    NotAllowed,
    Panic,
    ProtocolViolation,
    SlotTimeout,
)
from pybustcall.faults import Band, Fault, FaultKind
from pybustcall.models import CapabilityDocument, DaemonStatus, Timestamp
from pybustcall.policies import Pool, Retry
from pybustcall.results import Attempt, BustReport, BustResult
from pybustcall.session import TLS, PoolStatistics

__version__ = VERSION

__all__ = [
    "SEMVERX",
    "TLS",
    "VERSION",
    "Attempt",
    "Band",
    "BustFailed",
    "BustRejected",
    "BustReport",
    "BustResult",
    "BustcallClient",
    "BustcallError",
    "CapabilityDocument",
    "ClientClosed",
    "ClientStatistics",
    "ConfigurationError",
    "DaemonCapabilities",
    "DaemonStatus",
    "DaemonsUnavailable",
    "DeadlineExceeded",
    "Fault",
    "FaultKind",
    "IncompatibleDaemon",
    "InvalidRequest",
    "NotAllowed",
    "Panic",
    "Pool",
    "PoolStatistics",
    "ProtocolViolation",
    "Retry",
    "SlotTimeout",
    "Timestamp",
    "__version__",
    "advertisement",
]
