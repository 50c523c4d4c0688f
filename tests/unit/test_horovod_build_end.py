"""A build that is ended leaves no compiler running; an installation that fails is explained."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from hpc_dl.errors import BuildError
from hpc_dl.launch import horovod_install

PATIENCE = 60.0

#: Builds with a stand-in for pip that starts a "compiler" and waits for it.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from hpc_dl.launch.build_place import BuildPlace
from hpc_dl.launch.horovod_compile import compile_wheel

folder = Path(sys.argv[1])
if sys.argv[2] == "ignore":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
place = BuildPlace(folder / "python", ())
settings = {"PATH": os.defpath}
try:
    compile_wheel(folder / "source", place, settings, folder / "log", 60.0, print)
finally:
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
"""


@pytest.fixture
def building(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/bin/sh\ncd '{tmp_path}'\n"
        "(sleep 300 & echo $! >compiler.part; mv compiler.part compiler; wait) &\n"
        "echo $$ >pip\nwait\n"
    )
    fake.chmod(0o755)
    return tmp_path


def start(folder: Path, hangup: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", SCRIPT, str(folder), hangup]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not ((folder / "compiler").exists() and (folder / "pip").exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline, "the build did not start"
        time.sleep(0.02)
    return process


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def ends(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not runs(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_the_compilers_too(building: Path, number: signal.Signals) -> None:
    process = start(building, "default")
    compiler = int((building / "compiler").read_text())
    process.send_signal(number)
    code = process.wait(PATIENCE)
    assert ends(compiler)
    # Python ends itself by the signal after a KeyboardInterrupt.
    assert code == (-number if number == signal.SIGINT else 128 + number)


def test_a_hangup_that_nohup_ignores_stays_ignored(building: Path) -> None:
    process = start(building, "ignore")
    compiler = int((building / "compiler").read_text())
    process.send_signal(signal.SIGHUP)
    # Were it not ignored, it would be handled before the next one, and its code be returned.
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert ends(compiler)


def test_pip_ends_with_a_parent_that_is_killed(building: Path) -> None:
    process = start(building, "default")
    process.kill()
    process.wait(PATIENCE)
    try:
        assert ends(int((building / "pip").read_text()))
    finally:
        os.kill(int((building / "compiler").read_text()), signal.SIGKILL)


def test_an_installation_that_hangs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 300)

    monkeypatch.setattr(subprocess, "run", hang)
    wheel = tmp_path / "horovod.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("horovod/other.so", "other")
    with pytest.raises(BuildError, match="300 s") as caught:
        horovod_install.install(wheel)
    assert str(wheel) in str(caught.value)
