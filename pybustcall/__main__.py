"""`python -m pybustcall` and the command `pybustcall`: loads the command line, or says which extra it needs."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; exit with 1 and a hint where its extra is not installed."""
    try:
        from pybustcall.cli import run  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit("pybustcall: the command line needs an extra; install it with: pip install 'pybustcall[cli]'")
    run()


if __name__ == "__main__":
    main()
