"""Where progress is shown."""

import os
import sys

from rich.console import Console


def own_console() -> Console:
    """Return a console on the standard output.

    Open MPI's mpirun gives rank 0 a terminal even if its own output goes into a file. That
    terminal has no size, and what is drawn on it would fill the file with escape sequences; so
    it counts as a file.
    """
    try:
        drawable = os.get_terminal_size(sys.stdout.fileno()).columns > 0
    except (OSError, ValueError):  # no terminal, or no file at all
        return Console()
    return Console() if drawable else Console(force_terminal=False)
