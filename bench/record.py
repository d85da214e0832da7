"""What a bench measured, as a file: its figures, with what they were measured by and on."""

from __future__ import annotations

import json
import os
import platform
import time
from typing import TYPE_CHECKING, Any

from pybustcall.capabilities import VERSION

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["record"]


def record(directory: Path, bench: str, begun: float, **figures: Any) -> str:
    """Write the figures of a bench that began at `begun` (`time.perf_counter`) to DIRECTORY/BENCH.json.

    The directory is made where it is missing. Returns the figures on one line, for those who asked for JSON.
    """
    result = {
        "bench": bench,
        "pybustcall": VERSION,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "seconds": round(time.perf_counter() - begun, 1),
        **figures,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{bench}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return json.dumps(result)
