"""Time of an all-reduce between hosts on shaped links: hpc_dl and Open MPI against the wire.

    python benchmarks/between_nodes.py [--hosts 2,4] [--ranks-per-host 1,2] [--rate 1gbit]
                                       [--sizes 4MB,32MB] [--repeats 9] [--json FILE]

Hosts are network namespaces of this machine (as root; hpc_dl/testing/hosts.py). The wire time
is what a ring cannot beat, 2 (n - 1) / n times the bytes over the bandwidth, n hosts, whatever
the ranks on each. It is given for the rate of the link, and for the bandwidth that one message
of the same bytes between two hosts reaches, headers of TCP included. Figures are medians with
their quartiles, of the slowest rank.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hpc_dl.launch.request import Request, launch
from hpc_dl.testing.hosts import Hosts

UNITS = {"KB": 1 << 10, "MB": 1 << 20}
OURS, MPI4PY, MESSAGE = "hpc_dl mpi", "mpi4py", "one message"
Results = dict[str, dict[str, list[float]]]


def bytes_of(size: str) -> int:
    """Return the bytes of a size such as 4MB."""
    return int(size[:-2]) * UNITS[size[-2:]]


def rank_main(sizes: list[str], repeats: int, result: Path) -> None:
    """Measure on this rank; rank 0 writes the results."""
    from hpc_dl.comm import make

    ours, _ = make("mpi")
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    results: Results = {}
    for size in sizes:
        nbytes = bytes_of(size)
        window = ours.allocate(nbytes).view(np.float32)
        array = np.ones(nbytes // 4, np.float32)

        def message(array: np.ndarray = array) -> None:
            """Send it from the first rank to the last, which is on another host."""
            if world.rank == 0:
                world.Send(array, world.size - 1)
            elif world.rank == world.size - 1:
                world.Recv(array, 0)

        calls = {
            OURS: lambda window=window: ours.allreduce(window),
            MPI4PY: lambda array=array: world.Allreduce(MPI.IN_PLACE, array),
            MESSAGE: message,
        }
        results[size] = {peer: [] for peer in calls}
        for repeat in range(-1, repeats):
            for peer, call in calls.items():
                world.Barrier()
                start = time.perf_counter()
                call()
                slowest = world.allreduce(time.perf_counter() - start, MPI.MAX)
                if repeat >= 0:
                    results[size][peer].append(slowest)
    if world.rank == 0:
        result.write_text(json.dumps(results))


def measure(hosts: Hosts, ranks_per_host: int, sizes: list[str], repeats: int) -> Results:
    """Run this program on the hosts and return what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "results.json")
        arguments = ["--sizes", ",".join(sizes), "--repeats", str(repeats), "--result", str(result)]
        request = Request(
            script=__file__,
            arguments=arguments,
            ranks=len(hosts.names) * ranks_per_host,
            mpirun_options=hosts.mpirun_options(ranks_per_host),
            environment={"OMP_NUM_THREADS": "1"},
        )
        code = launch(request, sys.stdout.buffer, sys.stderr.buffer).code
        if code:
            sys.exit(code)
        found: Results = json.loads(result.read_text())
        return found


def bits_per_second(rate: str) -> float:
    """Read a rate as ``tc`` writes it."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise SystemExit(f"--rate {rate}: give a number of gbit, mbit or kbit")


def main() -> None:
    """Measure and print one table for each number of hosts and ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", default="2,4")
    parser.add_argument("--ranks-per-host", default="1,2")
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--sizes", default="4MB,32MB")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    if options.result:
        rank_main(sizes, options.repeats, options.result)
        return
    everything = {}
    for count in map(int, options.hosts.split(",")):
        with Hosts(count, options.rate) as hosts:
            for ranks in map(int, options.ranks_per_host.split(",")):
                found = measure(hosts, ranks, sizes, options.repeats)
                everything[f"{count} hosts, {ranks} ranks on each"] = found
                show(count, ranks, options.rate, found)
    if options.json:
        options.json.write_text(json.dumps(everything))


def show(hosts: int, ranks: int, rate: str, results: Results) -> None:
    """Print the table of one number of hosts and ranks."""
    table = Table(
        title=f"{hosts} hosts of {ranks} rank{'s' * (ranks > 1)}, {rate}: milliseconds, ratios"
    )
    columns = ("bytes", OURS, MPI4PY, "wire at the rate", "wire as one message")
    for column in (*columns, "hpc_dl / rate", "hpc_dl / message", "mpi4py / hpc_dl"):
        table.add_column(column, justify="right")
    share = 2 * (hosts - 1) / hosts
    for size, result in results.items():
        ours, theirs, message = (float(np.median(x)) for x in result.values())
        wire = share * bytes_of(size) * 8 / bits_per_second(rate)
        cells = [
            "{1:.1f} ({0:.1f}-{2:.1f})".format(
                *np.percentile(np.array(result[p]) * 1e3, (25, 50, 75))
            )
            for p in (OURS, MPI4PY)
        ]
        table.add_row(
            size,
            *cells,
            f"{wire * 1e3:.1f}",
            f"{share * message * 1e3:.1f}",
            f"{ours / wire:.2f}",
            f"{ours / (share * message):.2f}",
            f"{theirs / ours:.2f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
