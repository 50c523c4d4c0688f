"""Time of an all-reduce inside a node: hpc_dl against Horovod, mpi4py and gloo, in one run.

    python benchmarks/allreduce.py [--ranks 2,4] [--repeats 11] [--plot FILE] [--json FILE]

All peers live in the same processes and take turns within every repetition, with the copy
beside them: a plain copy of the same bytes by every rank at once, which is the limit of a
reduction in shared memory. A time is that of the slowest rank. Figures are medians, the
spread is that between the quartiles, and ratios are medians of ratios within a repetition.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

SIZES = {"4 KB": 4 << 10, "256 KB": 256 << 10, "4 MB": 4 << 20, "32 MB": 32 << 20}
SIZES["100 MB"] = 100 << 20
WINDOW, ORDINARY, OVER_HOROVOD = "hpc_dl mpi", "hpc_dl mpi, any buffer", "hpc_dl horovod"
HOROVOD, MPI4PY, GLOO, COPY = "horovod.torch", "mpi4py", "torch gloo", "copy"
PEERS = (WINDOW, ORDINARY, OVER_HOROVOD, HOROVOD, MPI4PY, GLOO, COPY)


def calls(nbytes: int) -> int:
    """Return how often a call is repeated for one time: about 0.1 s of work or less."""
    return max(1, min(100, (8 << 20) // nbytes))


class Peers(NamedTuple):
    """The started libraries of one rank."""

    mpi: Any
    ours: Any
    ours_horovod: Any
    horovod: Any
    gloo: Any


def start_peers(folder: str) -> Peers:
    """Start every library on this rank."""
    from hpc_dl.comm import make

    # First, so that MPI starts as it does in a job.
    ours, _ = make("mpi")

    import horovod.torch as horovod
    import torch.distributed as gloo
    from mpi4py import MPI

    ours_horovod, _ = make("horovod", "torch")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/gloo-{ours.size}"
    gloo.init_process_group("gloo", init_method=store, rank=ours.rank, world_size=ours.size)
    return Peers(MPI, ours, ours_horovod, horovod, gloo)


def operations(peers: Peers, nbytes: int) -> dict[str, Callable[[], Any]]:
    """Return for each peer a function that sums ``nbytes`` of float32 over the ranks."""
    import torch

    count = nbytes // 4
    window = peers.ours.allocate(nbytes).view(np.float32)
    source = peers.ours.allocate(nbytes).view(np.float32)
    ordinary, for_horovod, for_mpi = (np.ones(count, np.float32) for _ in range(3))
    raw, for_gloo = torch.ones(count), torch.ones(count)
    world = peers.mpi.COMM_WORLD
    return {
        WINDOW: lambda: peers.ours.allreduce(window),
        ORDINARY: lambda: peers.ours.allreduce(ordinary),
        OVER_HOROVOD: lambda: peers.ours_horovod.allreduce(for_horovod, name=f"ours.{nbytes}"),
        HOROVOD: lambda: peers.horovod.allreduce_(raw, op=peers.horovod.Sum, name=f"raw.{nbytes}"),
        MPI4PY: lambda: world.Allreduce(peers.mpi.IN_PLACE, for_mpi),
        GLOO: lambda: peers.gloo.all_reduce(for_gloo),
        COPY: lambda: np.copyto(window, source),
    }


def measure(peers: Peers, nbytes: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of one call of each peer, a value for each repetition."""
    world, mpi = peers.mpi.COMM_WORLD, peers.mpi
    operation = operations(peers, nbytes)
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for repeat in range(-2, repeats):
        shift = repeat % len(PEERS)
        for peer in PEERS[shift:] + PEERS[:shift]:
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


def rank_main(repeats: int, folder: str) -> None:
    """Measure on this rank; rank 0 writes the results."""
    import torch

    torch.set_num_threads(1)
    peers = start_peers(folder)
    results = {label: measure(peers, nbytes, repeats) for label, nbytes in SIZES.items()}
    if peers.ours.rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))


def launch_ranks(ranks: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Run this program on some ranks and return what they measured."""
    from hpc_dl.launch.request import Request, launch

    with tempfile.TemporaryDirectory() as folder:
        request = Request(
            script=__file__,
            arguments=["--repeats", str(repeats), "--folder", folder],
            ranks=ranks,
            environment={"OMP_NUM_THREADS": "1"},
        )
        code = launch(request, sys.stdout.buffer, sys.stderr.buffer).code
        if code:
            sys.exit(code)
        results: dict[str, dict[str, list[float]]] = json.loads(
            Path(folder, "results.json").read_text()
        )
        return results


def ratio(result: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median, over the repetitions, of one peer's time over another's."""
    return float(np.median(np.array(result[one]) / np.array(result[other])))


def show(ranks: int, results: dict[str, dict[str, list[float]]], console: Console) -> None:
    """Print the times, then the ratios."""
    times = Table(title=f"{ranks} ranks: milliseconds, median and quartiles")
    times.add_column("bytes")
    for peer in PEERS:
        times.add_column(peer, justify="right")
    for label, result in results.items():
        cells = []
        for peer in PEERS:
            low, middle, high = np.percentile(np.array(result[peer]) * 1e3, [25, 50, 75])
            cells.append(f"{middle:.3g}\n({low:.3g}-{high:.3g})")
        times.add_row(label, *cells)
    console.print(times)
    ratios = Table(title=f"{ranks} ranks: ratios")
    for column in ("bytes", f"{WINDOW} / {COPY}", f"{ORDINARY} / {COPY}"):
        ratios.add_column(column, justify="right")
    others = [(HOROVOD, WINDOW), (GLOO, WINDOW), (MPI4PY, WINDOW), (HOROVOD, OVER_HOROVOD)]
    for one, other in others:
        ratios.add_column(f"{one} / {other}", justify="right")
    for label, result in results.items():
        pairs = [(WINDOW, COPY), (ORDINARY, COPY), *others]
        ratios.add_row(label, *(f"{ratio(result, *pair):.2f}" for pair in pairs))
    console.print(ratios)


def plot(everything: dict[int, dict[str, dict[str, list[float]]]], path: Path) -> None:
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
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", help="(used between the processes of a run)")
    options = parser.parse_args()
    if options.folder:
        rank_main(options.repeats, options.folder)
        return
    everything = {int(n): launch_ranks(int(n), options.repeats) for n in options.ranks.split(",")}
    for ranks, results in everything.items():
        show(ranks, results, Console(width=130))
    if options.plot:
        plot(everything, options.plot)
    if options.json:
        options.json.write_text(json.dumps(everything))


if __name__ == "__main__":
    main()
