"""The command line: ``hpc-dl``."""

from hpc_dl.cli.group import main

__all__ = ["main"]
