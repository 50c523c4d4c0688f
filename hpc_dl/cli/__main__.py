"""``python -m hpc_dl.cli``: the command line where no ``hpc-dl`` is on the PATH."""

from hpc_dl.cli.group import main

main(prog_name="hpc-dl")
