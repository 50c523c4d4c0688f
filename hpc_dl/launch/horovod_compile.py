"""Run Horovod's build to its end, or end it with all that it started."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hpc_dl.errors import BuildError
from hpc_dl.launch import compiler_log
from hpc_dl.launch.build_place import BuildPlace
from hpc_dl.launch.processes import die_with_parent

#: Called with the share of the build that is done (0 to 100) as it goes on.
Progress = Callable[[int], None]


def compile_wheel(
    source: Path,
    place: BuildPlace,
    settings: Mapping[str, str],
    log: Path,
    timeout: float,
    progress: Progress,
) -> Path:
    """Run the build in its own process group, its output in ``log``; return the wheel."""
    output = source.parent / "wheel"
    command = [os.fspath(place.python), "-m", "pip", "--disable-pip-version-check", "wheel"]
    command += ["-v", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    command += ["-w", os.fspath(output), os.fspath(source)]
    deadline = time.monotonic() + timeout
    with log.open("wb") as file, _signals_as_exits():
        try:
            pip = subprocess.Popen(
                command,
                env=dict(settings),
                cwd=source.parent,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )
        except OSError as error:
            raise BuildError(f"could not start the build: {error}") from error
        try:
            with log.open("r", errors="replace") as tail:
                while pip.poll() is None:
                    if time.monotonic() > deadline:
                        raise BuildError(
                            f"the build was not done after {timeout:g} s and was stopped; raise "
                            f"--timeout or --jobs. Its log: {log}"
                        )
                    for done in filter(None, map(compiler_log.percentage, tail)):
                        progress(done)
                    time.sleep(0.2)
        finally:
            if pip.poll() is None:
                os.killpg(pip.pid, signal.SIGKILL)
                pip.wait()
    wheels = sorted(output.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise _failed(log)
    progress(100)
    return wheels[0]


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """Let the signals that end a process run its ``finally`` clauses first, as SIGINT does."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.getsignal(number)
            if before[number] is not signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failed(log: Path) -> BuildError:
    failure = compiler_log.diagnose(log.read_text(errors="replace"))
    excerpt = "\n".join(f"    {line}" for line in failure.excerpt)
    return BuildError(
        f"Horovod's build failed. The first error (full log: {log}):\n\n{excerpt}\n\n"
        f"Likely remedy: {failure.remedy}"
    )
