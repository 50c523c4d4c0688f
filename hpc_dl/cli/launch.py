"""``hpc-dl launch``."""

import sys

import click

from hpc_dl.errors import OptionError
from hpc_dl.launch.request import Request, launch


def _environment(pairs: tuple[str, ...]) -> dict[str, str]:
    environment = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"--env {pair!r}: write it as NAME=VALUE")
        environment[name] = value
    return environment


@click.command(
    "launch",
    context_settings={"allow_interspersed_args": False},
)
@click.option(
    "-n",
    "-np",
    "--np",
    "--ranks",
    "ranks",
    type=int,
    default=1,
    show_default=True,
    help="How many ranks.",
)
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as of python -m.")
@click.option("--timeout", type=float, metavar="S", help="End the job after S seconds (code 124).")
@click.option("--no-prefix", is_flag=True, help="Do not begin each line with its rank.")
@click.option(
    "--mpirun",
    metavar="PATH",
    help="The program that starts ranks. Else $HPC_DL_MPIRUN, the one of this Python "
    "environment, the first on PATH.",
)
@click.option("--mpirun-arg", multiple=True, metavar="ARG", help="One more argument for mpirun.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Set a variable for all ranks.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    ranks: int,
    module: bool,
    timeout: float | None,
    no_prefix: bool,
    mpirun: str | None,
    mpirun_arg: tuple[str, ...],
    env: tuple[str, ...],
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run a Python script on several ranks of this machine.

    Each line of output begins with its rank; on a terminal rank 0 has the screen, so that its
    progress bar draws as usual. When one rank fails, all are ended, its traceback is shown once
    and its exit code is returned (128 + signal for a rank that a signal ended).

    \b
    Examples:
      hpc-dl launch -n 2 train.py --epochs 3
      hpc-dl launch -n 4 --timeout 600 --env NCCL_DEBUG=INFO train.py
      hpc-dl launch -n 2 -m my_project.train --lr 0.1
      hpc-dl launch -n 2 --mpirun-arg=--report-bindings train.py
    """
    request = Request(
        script=script,
        arguments=arguments,
        ranks=ranks,
        module=module,
        timeout=timeout,
        prefix=not no_prefix,
        mpirun=mpirun,
        mpirun_options=mpirun_arg,
        environment=_environment(env),
    )
    sys.exit(launch(request, sys.stdout.buffer, sys.stderr.buffer).code)
