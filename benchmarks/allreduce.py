"""Time of an all-reduce inside a node: hpc_dl against Horovod, mpi4py and gloo, in one run.

    python benchmarks/allreduce.py [--ranks 2,4] [--sizes 4KB,100MB] [--repeats 4] [--rounds 3]
                                   [--together] [--plot FILE] [--json FILE] [--markdown FILE]

The copy is a plain copy of the same bytes by every rank at once: the limit of a reduction in
shared memory. A time is that of the slowest rank. Figures are medians over all repetitions of
all rounds, the spread is that between the quartiles, a ratio is one of medians.

Horovod's background thread stays awake and slows whatever else runs in its process: Open
MPI's own all-reduce of 4 KB takes four times as long beside it. So each library has processes
of its own, and all of them have their turn in every round, so that a drift of the machine's
speed hits all alike. Within a process peers take turns in every repetition. ``--together``
puts all peers in the same processes, to show the difference.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

SIZES = "4KB,256KB,4MB,32MB,100MB"
UNITS = {"KB": 1 << 10, "MB": 1 << 20}
WINDOW, ORDINARY, OVER_HOROVOD = "hpc_dl mpi", "hpc_dl mpi (any buffer)", "hpc_dl horovod"
HOROVOD, MPI4PY, GLOO, COPY = "horovod.torch", "mpi4py", "torch gloo", "copy"
PEERS = (WINDOW, ORDINARY, OVER_HOROVOD, HOROVOD, MPI4PY, GLOO, COPY)
#: Peers that share processes; the copy is measured beside the first.
FAMILIES = ((WINDOW, ORDINARY, MPI4PY, COPY), (OVER_HOROVOD, HOROVOD), (GLOO,))
#: Pairs whose ratio of times is printed.
RATIOS = (
    (WINDOW, COPY),
    (ORDINARY, COPY),
    (HOROVOD, WINDOW),
    (GLOO, WINDOW),
    (MPI4PY, WINDOW),
    (HOROVOD, OVER_HOROVOD),
)

#: Of each peer, the seconds of a call in each repetition.
Seconds = dict[str, list[float]]
#: By the number of bytes, as written.
Results = dict[str, Seconds]


def bytes_of(text: str) -> int:
    """Read ``4KB`` or ``100MB``."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in UNITS or not number.isdigit():
        raise SystemExit(f"bad size {text!r}; write a number and KB or MB, as in 256KB")
    return int(number) * UNITS[unit]


def calls(nbytes: int) -> int:
    """Return how often a call is repeated for one time: about 0.1 s of work or less."""
    return max(1, min(100, (8 << 20) // nbytes))


class Libraries(NamedTuple):
    """The libraries of one rank; None where a library is not measured."""

    mpi: Any
    ours: Any
    ours_horovod: Any
    horovod: Any
    gloo: Any


def start_libraries(peers: Sequence[str], folder: str) -> Libraries:
    """Start what the peers need on this rank."""
    from hpc_dl.comm import make

    # First, so that MPI starts as it does in a job.
    ours, _ = make("mpi")
    from mpi4py import MPI

    ours_horovod = horovod = gloo = None
    if OVER_HOROVOD in peers:
        ours_horovod, _ = make("horovod", "torch")
    if HOROVOD in peers:
        import horovod.torch as horovod

        horovod.init()
    if GLOO in peers:
        import torch.distributed as gloo

        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = f"file://{folder}/gloo-{ours.size}"
        gloo.init_process_group("gloo", init_method=store, rank=ours.rank, world_size=ours.size)
    return Libraries(MPI, ours, ours_horovod, horovod, gloo)


def operations(
    libraries: Libraries, peers: Sequence[str], nbytes: int
) -> dict[str, Callable[[], Any]]:
    """Return for each peer a function that sums ``nbytes`` of float32 over the ranks."""
    import torch

    mpi, ours, ours_horovod, horovod, gloo = libraries
    count = nbytes // 4
    window, source = (ours.allocate(nbytes).view(np.float32) for _ in range(2))
    array = {peer: np.ones(count, np.float32) for peer in peers}
    tensor = {peer: torch.from_numpy(array[peer]) for peer in peers}
    every: dict[str, Callable[[], Any]] = {
        WINDOW: lambda: ours.allreduce(window),
        ORDINARY: lambda: ours.allreduce(array[ORDINARY]),
        OVER_HOROVOD: lambda: ours_horovod.allreduce(array[OVER_HOROVOD], name=f"ours.{nbytes}"),
        HOROVOD: lambda: horovod.allreduce_(tensor[HOROVOD], op=horovod.Sum, name=f"raw.{nbytes}"),
        MPI4PY: lambda: mpi.COMM_WORLD.Allreduce(mpi.IN_PLACE, array[MPI4PY]),
        GLOO: lambda: gloo.all_reduce(tensor[GLOO]),
        COPY: lambda: np.copyto(window, source),
    }
    return {peer: every[peer] for peer in peers}


def measure(libraries: Libraries, peers: Sequence[str], nbytes: int, repeats: int) -> Seconds:
    """Return the seconds of one call of each peer, a value for each repetition."""
    mpi = libraries.mpi
    world = mpi.COMM_WORLD
    operation = operations(libraries, peers, nbytes)
    seconds: Seconds = {peer: [] for peer in peers}
    for repeat in range(-2, repeats):
        shift = repeat % len(peers)
        for peer in (*peers[shift:], *peers[:shift]):
            number, call = calls(nbytes), operation[peer]
            world.Barrier()
            start = time.perf_counter()
            for _ in range(number):
                call()
            mine = (time.perf_counter() - start) / number
            slowest = world.allreduce(mine, mpi.MAX)
            if repeat >= 0:
                seconds[peer].append(slowest)
    return seconds


def rank_main(peers: Sequence[str], sizes: Sequence[str], repeats: int, folder: str) -> None:
    """Measure on this rank; rank 0 writes the results."""
    import torch

    torch.set_num_threads(1)
    libraries = start_libraries(peers, folder)
    results = {size: measure(libraries, peers, bytes_of(size), repeats) for size in sizes}
    if libraries.ours.rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))


def measure_on(ranks: int, peers: Sequence[str], sizes: Sequence[str], repeats: int) -> Results:
    """Run this program on some ranks and return what they measured."""
    from hpc_dl.launch.request import Request, launch

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--peers", ",".join(peers), "--sizes", ",".join(sizes)]
        request = Request(
            script=__file__,
            arguments=[*arguments, "--repeats", str(repeats), "--folder", folder],
            ranks=ranks,
            environment={"OMP_NUM_THREADS": "1"},
        )
        code = launch(request, sys.stdout.buffer, sys.stderr.buffer).code
        if code:
            sys.exit(code)
        results: Results = json.loads(Path(folder, "results.json").read_text())
        return results


def measure_in_rounds(
    ranks: int,
    families: Sequence[Sequence[str]],
    sizes: Sequence[str],
    repeats: int,
    rounds: int,
) -> Results:
    """Measure each family in processes of its own, in turn; return all that was measured."""
    results: Results = {size: {peer: [] for peer in PEERS} for size in sizes}
    for number in range(rounds):
        for family in families:
            progress(f"{ranks} ranks, round {number + 1} of {rounds}: {', '.join(family)}")
            for size, measured in measure_on(ranks, family, sizes, repeats).items():
                for peer, seconds in measured.items():
                    results[size][peer] += seconds
    return results


def progress(text: str) -> None:
    """Say what is being measured, where a person watches."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def ratio(result: Seconds, one: str, other: str) -> float:
    """Return the median time of one peer over that of another."""
    return float(np.median(result[one]) / np.median(result[other]))


def quartiles(seconds: list[float]) -> list[float]:
    """Return the quartiles in milliseconds."""
    return [float(x) for x in np.percentile(np.array(seconds) * 1e3, [25, 50, 75])]


def markdown(ranks: int, results: Results) -> str:
    """Write the medians with their quartiles, and the ratios, as two tables of a document."""
    lines = [
        f"| {ranks} ranks, ms | " + " | ".join(PEERS) + " |",
        "|---|" + "---|" * len(PEERS),
    ]
    for size, result in results.items():
        cells = ["{1:.3g} ({0:.3g}-{2:.3g})".format(*quartiles(result[peer])) for peer in PEERS]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"| {ranks} ranks, ratios | " + " | ".join(f"{a} / {b}" for a, b in RATIOS) + " |",
        "|---|" + "---|" * len(RATIOS),
    ]
    for size, result in results.items():
        cells = [f"{ratio(result, *pair):.2f}" for pair in RATIOS]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def show(ranks: int, results: Results, console: Console) -> None:
    """Print the times, then the ratios."""
    times = Table(title=f"{ranks} ranks: milliseconds, median and quartiles")
    times.add_column("bytes")
    for peer in PEERS:
        times.add_column(peer, justify="right")
    for label, result in results.items():
        cells = ["{1:.3g}\n({0:.3g}-{2:.3g})".format(*quartiles(result[peer])) for peer in PEERS]
        times.add_row(label, *cells)
    console.print(times)
    ratios = Table(title=f"{ranks} ranks: ratios")
    for column in ("bytes", *(f"{one} / {other}" for one, other in RATIOS)):
        ratios.add_column(column, justify="right")
    for label, result in results.items():
        ratios.add_row(label, *(f"{ratio(result, *pair):.2f}" for pair in RATIOS))
    console.print(ratios)


def plot(everything: dict[int, Results], path: Path) -> None:
    """Draw the medians, a panel for each number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(zip(PEERS, plt.get_cmap("tab10").colors, strict=False)) | {COPY: "0.6"}
    figure, panels = plt.subplots(1, len(everything), figsize=(10, 4), sharey=True, squeeze=False)
    for panel, (ranks, results) in zip(panels[0], everything.items(), strict=True):
        for peer in PEERS:
            medians = [np.median(result[peer]) * 1e3 for result in results.values()]
            style = "--" if peer == COPY else "-"
            width = 2.5 if peer == WINDOW else 1.3
            label = "plain copy (the limit)" if peer == COPY else peer
            xs = range(len(medians))
            panel.plot(
                xs, medians, style, color=colors[peer], lw=width, marker="o", ms=3, label=label
            )
        panel.set_xticks(range(len(results)), list(results))
        panel.set_yscale("log")
        panel.set_title(f"{ranks} ranks on one node", fontsize=10)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("milliseconds for one all-reduce (log scale)")
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Launch the ranks and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--peers", default=",".join(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes, repeats = options.sizes.split(","), options.repeats
    for size in sizes:
        bytes_of(size)
    if options.folder:
        rank_main(options.peers.split(","), sizes, repeats, options.folder)
        return
    families = (PEERS,) if options.together else FAMILIES
    everything = {
        ranks: measure_in_rounds(ranks, families, sizes, repeats, options.rounds)
        for ranks in map(int, options.ranks.split(","))
    }
    for ranks, results in everything.items():
        show(ranks, results, Console(width=130))
    if options.plot:
        plot(everything, options.plot)
    if options.json:
        options.json.write_text(json.dumps(everything))
    if options.markdown:
        options.markdown.write_text("\n".join(markdown(*item) for item in everything.items()))


if __name__ == "__main__":
    main()
