"""The command line: help with examples, errors as one message, a quick start."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hpc_dl import __version__
from hpc_dl.cli import checkup, main
from hpc_dl.cli import horovod as horovod_command
from hpc_dl.errors import BuildError
from hpc_dl.launch.horovod_status import FrameworkState, Status

COMMANDS = [["launch"], ["doctor"], ["horovod"], ["horovod", "build"], ["horovod", "status"]]


@pytest.mark.parametrize("arguments", [[], *COMMANDS], ids=" ".join)
def test_help_has_examples(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, [*arguments, "--help"])
    assert done.exit_code == 0
    assert "Examples:" in done.output
    assert " ".join(["hpc-dl", *arguments]) in done.output


def test_the_version_is_that_of_the_package() -> None:
    assert __version__ in CliRunner().invoke(main, ["--version"]).output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["launch", "-n", "2", "missing.py"], 2, "Error: there is no script 'missing.py'"),
        (["launch", "-n", "0", __file__], 2, "Error: -n 0"),
        (["launch", "--np", "0", __file__], 2, "Error: -n 0"),
        (["launch", "-np", "0", __file__], 2, "Error: -n 0"),
        (["launch", "--frobnicate", "2", __file__], 2, "--frobnicate"),
        (["launch", "--timeout", "nan", __file__], 2, "Error: --timeout nan"),
        (["launch", "--env", "NOVALUE", __file__], 2, "Error: --env 'NOVALUE'"),
        (["launch", "--mpirun", "nope", "-n", "2", __file__], 1, "Error: --mpirun names 'nope'"),
        (["horovod", "build", "--jobs", "0"], 2, "Error: --jobs 0"),
        (["horovod", "build", "--gpu", "amd"], 2, "'nccl', 'mpi', 'none'"),
        (["nope"], 2, "No such command 'nope'"),
    ],
)
def test_errors_are_one_message(arguments: list[str], code: int, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpc_dl.cli", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_starting_loads_no_framework() -> None:
    """A command line that takes seconds to print its help is not used."""
    heavy = ("torch", "tensorflow", "keras", "mpi4py", "horovod", "numpy", "numba", "matplotlib")
    code = (
        "import sys, hpc_dl.cli, hpc_dl.cli.launch, hpc_dl.cli.horovod, hpc_dl.cli.doctor; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def finding(name: str, state: checkup.State) -> checkup.Finding:
    return checkup.Finding(name, "seen", state, "" if state == "ok" else "[repair] it")


@pytest.mark.parametrize("states", [("ok", "absent"), ("ok", "broken", "absent")])
@pytest.mark.parametrize("as_json", [False, True])
def test_doctor_fails_exactly_when_something_is_broken(
    monkeypatch: pytest.MonkeyPatch, states: tuple[checkup.State, ...], as_json: bool
) -> None:
    found = [finding(f"thing {number}", state) for number, state in enumerate(states)]
    monkeypatch.setattr("hpc_dl.cli.doctor.findings", lambda: iter(found))
    done = CliRunner().invoke(main, ["doctor", *(["--json"] if as_json else [])])
    assert done.exit_code == int("broken" in states)
    if as_json:
        report = json.loads(done.stdout)
        assert report["healthy"] is ("broken" not in states)
        assert [item["state"] for item in report["findings"]] == list(states)
    else:
        assert ("all is well" in done.stdout) is ("broken" not in states)
        # What looks like markup in a remedy (extras, for instance) is printed as it is.
        assert "[repair] it" in done.stdout


def test_status_is_a_failure_when_horovod_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = FrameworkState("2.13.0", "2.1.0", problem="Horovod was compiled for torch 2.1.0")
    state = Status("0.28.1", {"torch": broken}, (), tmp_path)
    monkeypatch.setattr(horovod_command.horovod_status, "status", lambda *_: state)
    done = CliRunner().invoke(main, ["horovod", "status", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["frameworks"]["torch"]["works"] is False
    done = CliRunner().invoke(main, ["horovod", "status"])
    assert "Horovod was compiled for torch 2.1.0" in done.stdout


def test_a_failed_build_shows_its_error_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise BuildError("x.cc:1:1: error: boom\nLikely remedy: less")

    monkeypatch.setattr(horovod_command, "plan", fail)
    done = CliRunner().invoke(main, ["horovod", "build", "--wheel-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "Error: x.cc:1:1: error: boom" in done.stderr
    assert isinstance(main, click.Group)
