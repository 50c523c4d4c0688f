"""What the command lines of training jobs have in common."""

import importlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click

from hpc_dl.comm.abort import end_job
from hpc_dl.comm.launched import find_launcher
from hpc_dl.compress import policy_of
from hpc_dl.errors import (
    DataError,
    LaunchError,
    MissingComponentError,
    OptionError,
)
from hpc_dl.launch.channel import Failure

#: Framework -> (what it needs, the extra of this package that brings it).
FRAMEWORKS = {
    "torch": ("torch", "torch"),
    "keras": ("keras", "tensorflow"),
}

#: Errors whose message says everything; others keep their traceback.
_CLEAR = (OptionError, MissingComponentError, DataError, LaunchError)


class JobCommand(click.Command):
    """The command of a job: an error of the user's is one message and ends all ranks."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the job."""
        try:
            return super().invoke(ctx)
        except _CLEAR as error:
            code = 2 if isinstance(error, OptionError | DataError) else 1
            launcher = find_launcher()
            if launcher is not None and launcher.name == "hpc-dl launch":
                # It shows the message once, also where every rank comes to the same.
                raise Failure(f"Error: {error}", code) from error
            click.secho(f"Error: {error}", fg="red", err=True)
            if launcher is not None:
                # This rank may be the only one that failed; the others would wait for it.
                end_job(code)
            ctx.exit(code)


class JobOptions(NamedTuple):
    """The options that every job has."""

    framework: str
    epochs: int
    batch_size: int
    lr: float
    seed: int
    comm: str
    compression: str
    run_dir: Path | None


def job_options(epochs: int, batch_size: int, lr: float) -> Callable[[Any], Any]:
    """Give a click command the options of `JobOptions`, with these defaults."""
    options = (
        click.option(
            "--framework",
            type=click.Choice(list(FRAMEWORKS)),
            default="torch",
            show_default=True,
            help="What computes.",
        ),
        click.option(
            "--epochs",
            type=click.IntRange(min=1),
            default=epochs,
            show_default=True,
            help="How many times to go through the training images.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=batch_size,
            show_default=True,
            help="Images in a step, on each rank.",
        ),
        click.option(
            "--lr",
            type=float,
            callback=_positive,
            default=lr,
            show_default=True,
            help="Learning rate for one rank; it is multiplied by the number of ranks.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0, max=2**32 - 1),
            default=1,
            show_default=True,
            help="Where all random numbers derive from: initial weights and order of images.",
        ),
        click.option(
            "--comm",
            default="auto",
            show_default=True,
            metavar="auto|mpi|horovod|serial",
            help="How the ranks talk; with options as mpi:cuda=stage.",
        ),
        click.option(
            "--compression",
            default="none",
            show_default=True,
            metavar="none|fp16|topk:ratio=0.01|auto|...",
            help="How gradients travel; `hpc-dl compress list` shows all.",
        ),
        click.option(
            "--run-dir",
            type=click.Path(path_type=Path),
            help="Where to write results; else runs/JOB-DATE-TIME.",
        ),
    )

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def adapter(framework: str) -> ModuleType:
    """Import ``hpc_dl.torch`` or ``hpc_dl.keras``.

    Raises:
        MissingComponentError: the framework is not installed, or cannot be imported.
    """
    # TensorFlow tells at every start how it was compiled, once for each rank.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    needed, extra = FRAMEWORKS[framework]
    try:
        importlib.import_module(needed)
    except ImportError as error:
        raise MissingComponentError(
            f"--framework {framework} needs {needed}, which cannot be imported ({error}); run "
            f"`pip install 'hpc_dl[{extra}]'`"
        ) from error
    return importlib.import_module(f"hpc_dl.{framework}")


def momentum_beside(compression: str, momentum: float) -> float:
    """Return the optimizer's momentum: none where compression takes it before it sends."""
    return 0.0 if policy_of(compression).takes_momentum else momentum


def _positive(ctx: click.Context, parameter: click.Parameter, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"{value} is not a finite number above 0.")
    return value
