"""``hpc-dl horovod build`` and ``hpc-dl horovod status``."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from hpc_dl.errors import BuildError
from hpc_dl.launch import horovod_build, horovod_install, horovod_status, wheel_cache
from hpc_dl.launch.horovod_compile import Progress as Report
from hpc_dl.launch.horovod_plan import BuildPlan, BuildRequest, Frameworks, plan
from hpc_dl.launch.toolchain import Gpu, default_jobs

_WHEEL_DIR = click.option(
    "--wheel-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where built wheels are kept.  [default: $XDG_CACHE_HOME/hpc_dl/wheels]",
)


@click.group("horovod")
def command() -> None:
    """Build Horovod for this environment, or show its state.

    \b
    Examples:
      hpc-dl horovod build
      hpc-dl horovod status
    """


@command.command("build")
@click.option(
    "--framework",
    type=click.Choice(get_args(Frameworks)),
    default="auto",
    show_default=True,
    help="Which frameworks; auto: those installed.",
)
@click.option(
    "--gpu",
    type=click.Choice(get_args(Gpu)),
    help="How GPUs talk.  [default: nccl with a CUDA framework, else none]",
)
@click.option("--jobs", type=int, help="Files compiled at once.  [default: by cores and memory]")
@_WHEEL_DIR
@click.option(
    "--sdist",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="Horovod's source archive, where there is no network.",
)
@click.option("--force", is_flag=True, help="Build even if a fitting wheel is there.")
@click.option("--no-install", is_flag=True, help="Leave the environment as it is.")
@click.option(
    "--timeout",
    type=float,
    default=7200.0,
    show_default=True,
    metavar="S",
    help="Stop the build after S seconds.",
)
def build(
    framework: Frameworks,
    gpu: Gpu | None,
    jobs: int | None,
    wheel_dir: Path | None,
    sdist: Path | None,
    force: bool,
    no_install: bool,
    timeout: float,
) -> None:
    """Compile Horovod for the frameworks and the MPI of this environment, and install it.

    The wheel is kept and used again as long as Python, frameworks, MPI, CUDA and patches are the
    same, and needs no compiler. See docs/horovod.md.

    \b
    Examples:
      hpc-dl horovod build
      hpc-dl horovod build --framework torch --jobs 8
      hpc-dl horovod build --gpu nccl --wheel-dir /project/me/wheels
    """
    console = Console(stderr=True, highlight=False)
    folder = wheel_dir or wheel_cache.default_folder(os.environ)
    request = BuildRequest(folder.absolute(), framework, gpu, jobs, sdist, force, timeout)
    chosen = plan(request, os.environ)
    described = f"Horovod {chosen.key.horovod} for {_description(chosen)}"
    console.print(escape(described), soft_wrap=True)
    start = time.monotonic()
    with _progress(console, jobs or default_jobs()) as progress:
        wheel = horovod_build.build(request, chosen, os.environ, progress)
    took = time.monotonic() - start
    state = f"built in {wheel.seconds:.0f} s" if took > wheel.seconds else "found in the cache"
    console.print(escape(f"{wheel.path} ({state})"), soft_wrap=True)
    if no_install:
        return
    if horovod_install.install(wheel.path):
        _check(chosen)
        console.print("[green]installed; it loads[/green]")
    else:
        console.print("[green]this very build is installed already[/green]")


def _description(chosen: BuildPlan) -> str:
    gpu = f"GPUs over {chosen.gpu} ({chosen.key.cuda})" if chosen.gpu != "none" else "no GPUs"
    return f"{', '.join(map(str, chosen.frameworks))}, {chosen.key.mpi}, {gpu}"


def _check(chosen: BuildPlan) -> None:
    for framework in chosen.frameworks:
        error = horovod_install.probe(framework.name).error
        if error:
            raise BuildError(
                f"Horovod was built and installed, but does not load with {framework.name}: {error}"
            )


@contextmanager
def _progress(console: Console, jobs: int) -> Iterator[Report]:
    if not console.is_terminal:
        yield _reporter(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"compiling, {jobs} at once", total=100)
        yield lambda done: bar.update(task, completed=done)


def _reporter(console: Console) -> Report:
    """Print a line at every tenth of the build, for logs."""
    start = time.monotonic()
    printed = 0

    def report(done: int) -> None:
        nonlocal printed
        if done >= printed + 10:
            printed = done - done % 10
            console.print(f"  {printed:3d} % after {time.monotonic() - start:.0f} s")

    return report


@command.command("status")
@_WHEEL_DIR
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(wheel_dir: Path | None, as_json: bool) -> None:
    """Show what is built with what, and whether it fits what is installed now.

    What the installed Horovod was built with is known if its wheel is in the cache. The exit code
    is 1 if an installed Horovod does not work, or if there is none.

    \b
    Examples:
      hpc-dl horovod status
      hpc-dl horovod status --json
    """
    folder = (wheel_dir or wheel_cache.default_folder(os.environ)).absolute()
    state = horovod_status.status(folder, os.environ)
    if as_json:
        click.echo(json.dumps(horovod_status.as_json(state), indent=2))
    else:
        _show(Console(highlight=False), state)
    works = any(framework.works for framework in state.frameworks.values())
    sys.exit(0 if works and not state.problems else 1)


def _show(console: Console, state: horovod_status.Status) -> None:
    if state.version is None:
        console.print("Horovod is not installed: [bold]hpc-dl horovod build[/bold]")
    else:
        table = Table(title=f"Horovod {state.version}", title_justify="left")
        for heading in ("framework", "installed", "compiled for", "built with", "state"):
            table.add_column(heading)
        for name, framework in state.frameworks.items():
            table.add_row(name, *_row(framework))
        console.print(table)
        _show_origin(console, state)
    for problem in state.problems:
        console.print(f"[red]{escape(problem)}[/red]", soft_wrap=True)
    console.print(escape(f"wheels in {state.folder}:"), soft_wrap=True)
    for wheel in state.wheels:
        line = f"  {wheel.key.name}: {wheel.key.mpi}, built in {wheel.seconds:.0f} s"
        console.print(escape(line), soft_wrap=True)
    if not state.wheels:
        console.print("  none")


def _show_origin(console: Console, state: horovod_status.Status) -> None:
    """Print what the installed Horovod was built with, beyond what it says of itself."""
    if state.origin is None:
        console.print("built with: not known, no wheel here is the installed one", soft_wrap=True)
        return
    key = state.origin.key
    parts = [key.mpi, key.cuda or "no GPUs", f"patches {key.patches}", key.python, key.machine]
    parts += [key.settings] if key.settings else []
    console.print(escape(f"built with: {', '.join(parts)}"), soft_wrap=True)
    for difference in state.differences:
        console.print(f"[yellow]{escape(difference)}[/yellow]", soft_wrap=True)
    if state.differences:
        console.print("for a build that fits: [bold]hpc-dl horovod build[/bold]")


def _row(framework: horovod_status.FrameworkState) -> tuple[Any, ...]:
    built = framework.probe.built if framework.probe else {}
    parts = ", ".join(name for name, there in built.items() if there)
    if framework.works:
        word = "[green]works[/green]"
    elif framework.problem:
        word = "[red]does not work[/red]"
    else:
        word = "not built"
    return (
        escape(framework.installed or "-"),
        escape(framework.built_for or "-"),
        parts or "-",
        word,
    )
