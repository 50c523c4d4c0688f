"""Which mpirun is taken, whose it is, and what is passed to it."""

import os
import sys
from pathlib import Path

import pytest

from hpc_dl.errors import LaunchError, MissingComponentError, OptionError
from hpc_dl.launch import mpirun
from hpc_dl.launch.channel import (
    EXPECTED_SIZE,
    SOCKET,
    End,
    Hello,
    decode_end,
    decode_hello,
    encode,
)
from hpc_dl.launch.mpirun import Mpirun, family_of, find_mpirun, start_environment, start_options
from hpc_dl.launch.request import Request, cores, plan


def program(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'EOT'\n{says}\nEOT\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A Python environment without an mpirun, and a PATH with only the basic tools."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "bin" / "python"))
    monkeypatch.setattr(mpirun.sys, "executable", str(tmp_path / "env" / "bin" / "python"))
    (tmp_path / "path").mkdir()
    return {"PATH": str(tmp_path / "path")}


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("mpirun (Open MPI) 5.0.11", "openmpi"),
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org", "openmpi"),
        ("prterun (PRRTE) 3.0.5", "openmpi"),
        ("HYDRA build details:\n    Version:    4.2.0", "hydra"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11", "hydra"),
        ("slurm 22.05", None),
    ],
)
def test_families(text: str, family: str | None) -> None:
    assert family_of(text) == family


def test_the_order_of_search(tmp_path: Path, bare: dict[str, str]) -> None:
    on_path = program(tmp_path / "path" / "mpirun", "mpirun (Open MPI) 4.1.4")
    assert find_mpirun(None, bare).path == on_path
    beside = program(tmp_path / "env" / "bin" / "mpirun", "mpirun (Open MPI) 5.0.11")
    assert find_mpirun(None, bare).path == beside
    named = program(tmp_path / "site" / "mpirun", "HYDRA build details:\n    Version:   4.2.0")
    found = find_mpirun(None, {**bare, "HPC_DL_MPIRUN": str(named)})
    assert (found.path, found.family, found.version) == (named, "hydra", "Hydra 4.2.0")
    assert find_mpirun(str(on_path), {**bare, "HPC_DL_MPIRUN": str(named)}).path == on_path


def test_none_found_says_how_to_get_one(bare: dict[str, str]) -> None:
    with pytest.raises(MissingComponentError, match=r"hpc_dl\[mpi\].*--mpirun or HPC_DL_MPIRUN"):
        find_mpirun(None, bare)


def test_a_named_program_that_is_missing_is_an_error(bare: dict[str, str]) -> None:
    with pytest.raises(MissingComponentError, match="--mpirun names 'nope'"):
        find_mpirun("nope", bare)


def test_an_unknown_program_is_an_error(tmp_path: Path, bare: dict[str, str]) -> None:
    program(tmp_path / "path" / "mpirun", "frobnicate 1.0")
    with pytest.raises(LaunchError, match="frobnicate"):
        find_mpirun(None, {**bare, "PATH": f"{tmp_path / 'path'}:{os.defpath}"})


def test_open_mpi_gets_what_a_small_machine_needs() -> None:
    found = Mpirun(Path("/opt/mpi/bin/mpirun"), "openmpi", "5", "PATH")
    options = start_options(found, 3, ("NAME",))
    assert options[:2] == ["-n", "3"]
    assert {"--oversubscribe", "--bind-to", "-x"} <= set(options)
    assert options[options.index("--host") + 1] == "localhost:3"
    hydra = Mpirun(Path("/opt/mpi/bin/mpirun"), "hydra", "4", "PATH")
    assert start_options(hydra, 3, ("NAME",)) == ["-n", "3", "-hosts", "localhost"]


@pytest.mark.parametrize(
    ("given", "gone", "kept"),
    [
        (["--bind-to", "core"], "--bind-to", "--oversubscribe"),
        (["--map-by", "numa"], "--oversubscribe", "--bind-to"),
        (["-map-by", "slot:PE=2", "--bind-to", "core"], "--oversubscribe", "--host"),
        (["--hostfile", "hosts"], "--host", "--bind-to"),
        (["-H", "localhost:8"], "--host", "--bind-to"),
    ],
)
def test_an_option_of_the_users_replaces_ours(given: list[str], gone: str, kept: str) -> None:
    found = Mpirun(Path("/opt/mpi/bin/mpirun"), "openmpi", "5", "PATH")
    options = start_options(found, 2, (), given)
    assert gone not in options
    assert kept in options


@pytest.mark.parametrize("user", [0, 1000])
def test_only_root_is_told_to_be_root(user: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    found = Mpirun(Path("mpirun"), "openmpi", "5", "PATH")
    assert ("OMPI_ALLOW_RUN_AS_ROOT" in start_environment(found, {})) is (user == 0)


def test_marks_of_an_outer_job_are_not_inherited() -> None:
    outer = {
        "OMPI_COMM_WORLD_RANK": "1",
        "PMIX_NAMESPACE": "x",
        "PMI_RANK": "1",
        "PMIX_MCA_gds": "hash",
        "OMPI_MCA_btl": "self,sm",
        "HOME": "/home/me",
        "HPC_DL_LAUNCH_SOCKET": "/tmp/x",
        "HPC_DL_LAUNCH_TERMINAL": "/dev/pts/1",
        "HPC_DL_LAUNCH_MERGED": "1",
        "HPC_DL_EXPECTED_SIZE": "2",
        "HPC_DL_COMM": "mpi",
    }
    assert start_environment(None, outer) == {
        "PMIX_MCA_gds": "hash",
        "OMPI_MCA_btl": "self,sm",
        "HOME": "/home/me",
        "HPC_DL_COMM": "mpi",
    }


def test_ranks_that_wait_leave_their_core_where_there_are_too_few(tmp_path: Path) -> None:
    script, name = tmp_path / "train.py", "OMPI_MCA_mpi_yield_when_idle"
    script.touch()
    openmpi = Mpirun(tmp_path / "mpirun", "openmpi", "5", "a test")

    def planned(ranks: int, environ: dict[str, str]) -> str | None:
        job = plan(Request(str(script), ranks=ranks), openmpi, environ)
        return job.environment.get(name)

    assert planned(cores(), {}) is None
    assert planned(cores() + 1, {}) == "1"
    assert planned(cores() + 1, {name: "0"}) == "0"


def test_threads_are_shared_out_unless_the_user_has_done_so(tmp_path: Path) -> None:
    script = tmp_path / "a script.py"
    script.touch()
    for ranks in (1, 2, 10_000):
        job = plan(Request(str(script), ["x y"], ranks=ranks), None, {})
        assert job.environment["OMP_NUM_THREADS"] == str(max(1, cores() // ranks))
        assert job.command[-2:] == [str(script), "x y"]
    job = plan(Request(str(script)), None, {"OMP_NUM_THREADS": "7"})
    assert job.environment["OMP_NUM_THREADS"] == "7"
    job = plan(Request(str(script), environment={"OMP_NUM_THREADS": "3"}), None, {})
    assert job.environment["OMP_NUM_THREADS"] == "3"


def test_what_the_user_sets_reaches_every_rank(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.touch()
    found = Mpirun(Path("/opt/mpi/bin/mpirun"), "openmpi", "5", "PATH")
    request = Request(str(script), ranks=2, environment={"A": "1"}, mpirun_options=["--tag"])
    job = plan(request, found, {})
    exported = [
        name for flag, name in zip(job.command, job.command[1:], strict=False) if flag == "-x"
    ]
    assert set(exported) == {SOCKET, EXPECTED_SIZE, "OMP_NUM_THREADS", "A"}
    assert job.environment["A"] == "1"
    assert job.command.index("--tag") < job.command.index(sys.executable)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ranks": 0}, "-n 0"),
        ({"timeout": -1.0}, "--timeout -1"),
        ({"timeout": float("nan")}, "--timeout nan"),
        ({"script": "missing.py"}, "no script 'missing.py'"),
    ],
)
def test_requests_that_make_no_sense(
    changes: dict[str, object], match: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.touch()
    with pytest.raises(OptionError, match=match):
        Request(**{"script": str(script), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("message", [Hello(3, 12, ("stdout", "stderr")), Hello(0, 1)])
def test_a_greeting_survives_the_wire(message: Hello) -> None:
    assert decode_hello(encode(message)) == message


@pytest.mark.parametrize("message", [End(0), End(3, "ü: \n", "line\nline\n")])
def test_an_end_survives_the_wire(message: End) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode_end(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b'{"rank": 0, "pid": 1, "streams": ["stdin"]}',
        b'{"streams": ["stdout"]}',
        b"GET / HTTP/1.1",
    ],
)
def test_strangers_are_not_taken_for_ranks(line: bytes) -> None:
    with pytest.raises(ValueError, match="not the greeting of a rank"):
        decode_hello(line)
