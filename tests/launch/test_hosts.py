"""Hosts of one machine: what ranks see there, and that nothing is left of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_dl.errors import MissingComponentError, OptionError
from hpc_dl.launch.mpirun import find_mpirun, start_environment
from hpc_dl.testing import hosts
from hpc_dl.testing.hosts import Hosts

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, socket, sys, time
import numpy as np
from hpc_dl.comm import make

comm, _ = make("mpi")
x = np.full(1 << 18, comm.rank + 1.0, np.float32)
comm.barrier()
start = time.perf_counter()
comm.allreduce(x)
comm.barrier()
seconds = time.perf_counter() - start
place = [comm.local_rank, comm.local_size, comm.cross_rank, comm.cross_size]
sys.stdout.write(json.dumps([comm.rank, socket.gethostname(), place, float(x[0]), seconds]) + "\\n")
"""


@pytest.fixture
def two() -> Iterator[Hosts]:
    try:
        with Hosts(2, "20mbit") as both:
            yield both
    except MissingComponentError as error:
        pytest.skip(str(error))


def spaces() -> str:
    return subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, timeout=30, check=True
    ).stdout


def test_ranks_see_two_nodes_joined_by_a_slow_link(two: Hosts, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    mpirun = find_mpirun()
    command = [str(mpirun.path), "-n", "4", "--bind-to", "none", *two.mpirun_options(2)]
    environment = start_environment(mpirun, os.environ)
    done = subprocess.run(
        [*command, sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = sorted(json.loads(line) for line in done.stdout.splitlines() if line[:1] == "[")
    assert [host for _, host, *_ in said] == ["h1", "h1", "h2", "h2"]
    assert [place for _, _, place, *_ in said] == [[r % 2, 2, r // 2, 2] for r in range(4)]
    assert {value for *_, value, _ in said} == {10.0}
    # Each host has to send 1 MB, of which a bucket of 256 KB may go at once.
    bits = 8 * ((1 << 20) - (256 << 10))
    assert min(seconds for *_, seconds in said) > 0.9 * bits / 20e6


def test_nothing_is_left_of_them(two: Hosts) -> None:
    prefix = two._prefix
    assert spaces().count(prefix) == 2
    two.shape("50mbit")
    two.__exit__(None, None, None)
    assert prefix not in spaces()
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, timeout=30, check=True)
    assert prefix not in links.stdout


def limits(two: Hosts) -> list[str]:
    """Return how each link is limited, in both directions."""
    commands = []
    for name in two.names:
        commands.append(["-n", f"{two._prefix}-{name}", "qdisc", "show", "dev", "eth0"])
        commands.append(["qdisc", "show", "dev", f"{two._prefix}{name}"])
    return [
        subprocess.run(
            ["tc", *command], capture_output=True, text=True, timeout=30, check=True
        ).stdout
        for command in commands
    ]


def test_a_limit_is_taken_away_and_given_again(two: Hosts) -> None:
    assert all("rate 20Mbit" in said for said in limits(two))
    for _ in range(2):  # there is none the second time
        two.shape(None)
        assert two.rate is None
        assert not any("tbf" in said for said in limits(two))
    two.shape("50mbit")
    assert all("rate 50Mbit" in said for said in limits(two))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    with pytest.raises(MissingComponentError, match="need root"):
        Hosts(2)
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 0)
    monkeypatch.setattr(hosts.shutil, "which", lambda program: None)
    with pytest.raises(MissingComponentError, match=r"ip, tc.*iproute2"):
        Hosts(2)
    monkeypatch.setattr(hosts.shutil, "which", lambda program: program)
    monkeypatch.setattr(hosts.sys, "prefix", "/my environments/one")
    with pytest.raises(MissingComponentError, match="has a space"):
        Hosts(2)


def test_a_number_of_hosts_without_room_is_refused() -> None:
    with pytest.raises(OptionError, match="1 to 200"):
        Hosts(0)


@pytest.mark.usefixtures("two")
def test_the_benchmark_between_nodes_prints_its_table(tmp_path: Path) -> None:
    result = tmp_path / "results.json"
    options = ["--hosts", "2", "--ranks-per-host", "1", "--sizes", "1MB", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/between_nodes.py", *options, "--json", str(result)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hpc_dl / rate" in done.stdout
    assert set(json.loads(result.read_text())) == {"2 hosts, 1 ranks on each"}
