"""The `distattn` command: brings a service up, talks to it, and shows what it does.

Each command is a function of one of this package's files; what they start or ask they reach through `gmanager.cli.service` and
`gmanager.AsyncClient` alone.
"""

import os
import sys

USAGE = 2
FAILED = 1


def main() -> None:
    """Entry point."""
    try:
        from gmanager.cli.app import app
    except ModuleNotFoundError as error:
        sys.exit(f"distattn: {error.name} is not installed: pip install 'distattn[cli]'")
    from gmanager.wire.errors import DistattnError

    try:
        app()
    except DistattnError as error:
        print(f"distattn: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except BrokenPipeError:  # of `distattn ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
