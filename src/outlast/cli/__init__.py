"""The command ``outlast``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command and exit with its code."""
    try:
        from outlast.cli._app import run_command
    except ImportError as error:
        print(
            f'outlast: the command needs packages that are missing ({error}); install them with: pip install "outlast[cli]"',
            file=sys.stderr,
        )
        sys.exit(1)
    sys.exit(run_command(sys.argv[1:]))
