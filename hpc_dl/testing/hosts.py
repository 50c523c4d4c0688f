"""Hosts of one machine that are real to the network: namespaces joined by shaped links.

Each host has a network, a host name and shared memory of its own. What it sends and receives
goes through a token bucket, so a link has the bandwidth that it is given, and ranks started
here by Open MPI talk over TCP as they would between machines. Needs root and Linux's ``ip``
and ``tc``.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from hpc_dl.errors import MissingComponentError, OptionError

#: What the hosts need besides root.
PROGRAMS = ("ip", "tc", "unshare", "hostname", "mount")

#: Bytes that may leave at once; a few packets of a gigabit link.
BURST = "256kb"

#: Starts what mpirun asks for on a host: drops the options of ssh, takes the host's name.
_AGENT = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec "{prefix}-$host" unshare --uts --mount --propagation private sh -c \\
    "hostname $host; mount -t tmpfs tmpfs /dev/shm; $*"
"""


class Hosts:
    """Some hosts ``h1``, ``h2``, ..., as a context manager that takes them away again."""

    def __init__(self, count: int, rate: str | None = "1gbit"):
        """Describe them.

        Args:
            count: how many.
            rate: of each host's link, in both directions, as ``tc`` writes it; None for as
                fast as the machine can.

        Raises:
            MissingComponentError: not root, or a program is not there.
            OptionError: a number of hosts that has no room in the network.
        """
        if not 1 <= count <= 200:
            raise OptionError(f"{count} hosts; give 1 to 200")
        missing = unavailable()
        if missing:
            raise MissingComponentError(missing)
        self.names = [f"h{number + 1}" for number in range(count)]
        self.rate = rate
        # Names of network devices have at most 15 characters.
        self._prefix = f"d{os.getpid() % 10**6}"
        self._subnet = f"10.{80 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Hosts":
        self._folder = tempfile.TemporaryDirectory(prefix="hpc-dl-hosts-")
        try:
            self._bring_up()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name in self.names:
            # It would go with the namespace too, but some time later.
            _run("ip", "link", "delete", f"{self._prefix}{name}", check=False)
            _run("ip", "netns", "delete", f"{self._prefix}-{name}", check=False)
        _run("ip", "link", "delete", self._bridge, check=False)
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def _bridge(self) -> str:
        return f"{self._prefix}b"

    def _bring_up(self) -> None:
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "address", "add", f"{self._subnet}.254/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        for number, name in enumerate(self.names, 1):
            space, outside = f"{self._prefix}-{name}", f"{self._prefix}{name}"
            inside = ("ip", "-n", space)
            _run("ip", "netns", "add", space)
            link = ("type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "add", outside, *link)
            _run("ip", "link", "set", outside, "master", self._bridge, "up")
            _run(*inside, "address", "add", f"{self._subnet}.{number}/24", "dev", "eth0")
            _run(*inside, "link", "set", "eth0", "up")
            _run(*inside, "link", "set", "lo", "up")
        self.shape(self.rate)
        self._agent.write_text(_AGENT.format(prefix=self._prefix))
        self._agent.chmod(0o700)

    def shape(self, rate: str | None) -> None:
        """Give all links another rate, also while ranks run; None takes the limit away."""
        self.rate = rate
        bucket = ("tbf", "rate", rate or "", "burst", BURST, "latency", "50ms")
        for name in self.names:
            for where in (("-n", f"{self._prefix}-{name}"), ()):
                device = ("dev", "eth0" if where else f"{self._prefix}{name}", "root")
                if rate is None:
                    # There may be none to be taken away.
                    _run("tc", *where, "qdisc", "delete", *device, check=False)
                else:
                    _run("tc", *where, "qdisc", "replace", *device, *bucket)

    def address(self, number: int) -> str:
        """Return the address of a host, by its number from 0."""
        return f"{self._subnet}.{number + 1}"

    @property
    def _agent(self) -> Path:
        if self._folder is None:
            raise OptionError("the hosts are not there; use them in a `with` statement")
        return Path(self._folder.name, "agent")

    def mpirun_options(self, ranks_per_host: int = 1) -> list[str]:
        """Return the options with which Open MPI's mpirun starts ranks on these hosts."""
        hosts = ",".join(f"{name}:{ranks_per_host}" for name in self.names)
        return [
            *("--prtemca", "plm_ssh_agent", shlex.quote(os.fspath(self._agent))),
            *("--prtemca", "plm", "ssh"),
            *("--host", hosts),
            *("--mca", "pml", "ob1"),
            *("--mca", "btl", "self,sm,tcp"),
            *("--mca", "btl_tcp_if_include", f"{self._subnet}.0/24"),
        ]


def unavailable() -> str:
    """Say why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "hosts of one machine need root: network namespaces cannot be made otherwise"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"hosts of one machine need {', '.join(missing)} (apt, dnf: iproute2, util-linux)"
    if " " in sys.prefix:
        return (
            f"Open MPI does not quote its own path when it starts ranks on other hosts, and "
            f"{sys.prefix!r} has a space; use an environment at a path without"
        )
    return ""


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if check and done.returncode:
        raise MissingComponentError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
