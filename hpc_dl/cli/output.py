"""Where the tables of the command line are printed."""

import os

from rich.console import Console

#: Columns of a table that nobody looks at on a screen: enough for a line not to be wrapped.
WIDTH = 160


def console() -> Console:
    """Make a console for standard output; in a pipe or a file it is wide."""
    made = Console(highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        return Console(highlight=False, width=WIDTH)
    return made
