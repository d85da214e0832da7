"""For tests of code that busts: a fake daemon with a fault plan, and the conformance suite that keeps it honest."""

from __future__ import annotations

from pybustcall.testing.conformance import CHECKS, Check, Verdict, check_daemon
from pybustcall.testing.fake_daemon import Answer, FakeDaemon

__all__ = ["CHECKS", "Answer", "Check", "FakeDaemon", "Verdict", "check_daemon"]
