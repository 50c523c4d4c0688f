"""Time of a training step on hosts with slow links: compression against float32 and float16.

    python benchmarks/throttled.py [--hosts 4] [--rate 1gbit ...] [--rounds 1] [--peer PEER ...]
                                   [--picture FILE] [--markdown FILE] [--json FILE]

Hosts are network namespaces of this machine (as root; hpc_dl/testing/hosts.py), one rank on
each. ``--rate`` may be repeated; by default 100mbit, 1gbit, 10gbit and none, which leaves links
as they are, in one run. The model is a stack of 2048 x 2048 layers, 25 million parameters in all.

Peers are hpc_dl over MPI with each compressor there is (any spec may be given), ``auto``, and
``alone``, without any reduction; raw Horovod (``horovod``, ``horovod fp16``); and torch's
DistributedDataParallel over gloo with its hooks (``ddp``, ``ddp fp16``, ``ddp powersgd:rank=4``).
Each peer trains by itself, one after the other, in every round; figures are medians with their
quartiles, of the slowest rank in each step.
"""

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import printing

from hpc_dl.compress import Auto, names, policy_of
from hpc_dl.launch.request import Request, launch
from hpc_dl.testing.hosts import Hosts

#: Layers, and values of each side: 25.2 million parameters.
LAYERS, SIDE, BATCH = 6, 2048, 2
#: The optimizer without any reduction: what a step costs where the network is free.
ALONE = "alone"
#: Compressors whose defaults are not for this model: it has small gradients.
OPTIONS = {"threshold": "threshold:value=0.0001"}
OURS = (ALONE, *(OPTIONS.get(name, name) for name in names()), "auto")
HOROVOD = ("horovod", "horovod fp16")
DDP = ("ddp", "ddp fp16", "ddp powersgd:rank=4")
RATES = ("100mbit", "1gbit", "10gbit", "none")
#: Peer -> seconds of each step, and bytes that a rank sent in one (0: not known).
Results = dict[str, tuple[list[float], float]]

#: Steps before measuring: buckets are planned, kernels compiled; `auto` has chosen, and has tried
#: all candidates at worst.
WARM, AUTO_STEPS = 4, 4
AUTO_WARM = WARM + (1 + len(Auto().candidates)) * (AUTO_STEPS + 1)
#: Steps are measured for so many seconds, within these numbers.
SECONDS, FEWEST, MOST = 4.0, 3, 20


def network(side: int) -> Any:
    """Build the model; the same on all ranks."""
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.Linear(side, side, bias=False) for _ in range(LAYERS)]
    return torch.nn.Sequential(*layers)


def stepper(model: Any, optimizer: Any) -> Callable[[], None]:
    """Return a function that makes a training step."""
    import torch

    first = next(model.parameters())
    x = torch.randn(BATCH, first.shape[1])

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def ours(peer: str, side: int) -> tuple[Callable[[], None], Callable[[], float]]:
    """Return a step through hpc_dl, and what counts the bytes sent."""
    import torch

    import hpc_dl.torch as hvd
    from hpc_dl.compress import unchecked

    model = network(side)
    if peer == ALONE:
        return stepper(model, torch.optim.SGD(model.parameters(), lr=1e-4)), lambda: 0.0
    compression = Auto(steps=AUTO_STEPS) if peer == "auto" else unchecked(peer)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4),
        named_parameters=model.named_parameters(),
        compression=compression,
        guard=False,
    )
    return stepper(model, optimizer), lambda: optimizer.traffic().bytes_sent


def horovod(peer: str, side: int) -> tuple[Callable[[], None], Callable[[], float]]:
    """Return a step through raw Horovod."""
    import horovod.torch as hvd
    import torch

    model = network(side)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4),
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if "fp16" in peer else hvd.Compression.none,
    )
    return stepper(model, optimizer), lambda: 0.0


def ddp(peer: str, side: int) -> tuple[Callable[[], None], Callable[[], float]]:
    """Return a step through torch's DistributedDataParallel."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
    from torch.nn.parallel import DistributedDataParallel

    # gloo has two threads, and the PowerSGD hook blocks one while it waits for the other: with
    # more than one bucket both block for ever.
    megabytes = 1000 if "powersgd" in peer else 25
    model = DistributedDataParallel(network(side), bucket_cap_mb=megabytes)
    if "fp16" in peer:
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    if "powersgd" in peer:
        state = powersgd.PowerSGDState(
            None, matrix_approximation_rank=4, start_powerSGD_iter=2, min_compression_rate=1
        )
        model.register_comm_hook(state, powersgd.powerSGD_hook)
    return stepper(model, torch.optim.SGD(model.parameters(), lr=1e-4)), lambda: 0.0


def rank_main(family: str, peers: list[str], side: int, address: str, result: Path) -> None:
    """Measure on this rank; rank 0 writes the results."""
    import torch
    from mpi4py import MPI

    import hpc_dl.torch as hvd

    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    make = {"ours": ours, "horovod": horovod, "ddp": ddp}[family]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hpc_dl.compress").setLevel(logging.INFO)  # the tables of `auto`
    hvd.init("horovod" if family == "horovod" else "mpi")
    if family == "ddp":
        os.environ.update(MASTER_ADDR=address, MASTER_PORT="29517", GLOO_SOCKET_IFNAME="eth0")
        torch.distributed.init_process_group("gloo", rank=world.rank, world_size=world.size)
    results: Results = {}
    for peer in peers:
        step, sent = make(peer, side)
        for _ in range(AUTO_WARM if peer == "auto" else WARM):
            step()
        before, taken = sent(), []
        while len(taken) < FEWEST or (sum(taken) < SECONDS and len(taken) < MOST):
            world.Barrier()
            start = time.perf_counter()
            step()
            taken.append(world.allreduce(time.perf_counter() - start, MPI.MAX))
        results[peer] = (taken, (sent() - before) / len(taken))
        del step, sent
        gc.collect()  # The model and its optimizer know each other.
        if world.rank == 0:
            print(f"{peer}: {np.median(taken) * 1e3:.0f} ms a step", file=sys.stderr, flush=True)
    if world.rank == 0:
        result.write_text(json.dumps(results))
    if family == "ddp":
        torch.distributed.destroy_process_group()


def measure(hosts: Hosts, family: str, peers: list[str], side: int) -> Results:
    """Run this program on the hosts and return what they measured."""
    if not peers:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "results.json")
        arguments = ["--family", family, "--side", str(side), "--result", str(result)]
        for peer in peers:
            arguments += ["--peer", peer]
        request = Request(
            script=__file__,
            arguments=[*arguments, "--address", hosts.address(0)],
            ranks=len(hosts.names),
            mpirun_options=hosts.mpirun_options(1),
            # All ranks share the cores of this machine: one that waits must not spin.
            environment={"OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"},
        )
        code = launch(request, sys.stdout.buffer, sys.stderr.buffer).code
        if code:
            sys.exit(code)
        found: Results = json.loads(result.read_text())
        return found


def table(rate: str, hosts: int, side: int, results: Results) -> printing.Results:
    """Write the table of one rate."""
    link = "links as they are" if rate == "none" else f"links of {rate}"
    millions = LAYERS * side**2 / 1e6
    medians = {peer: float(np.median(taken)) for peer, (taken, _) in results.items()}
    rows = []
    for peer, (taken, sent) in results.items():
        low, middle, high = np.percentile(np.array(taken) * 1e3, (25, 50, 75))
        ratios = [
            f"{medians[base] / medians[peer]:.2f} x" if base in medians else ""
            for base in ("none", "fp16")
        ]
        megabytes = f"{sent / 1e6:.2f}" if sent else ""
        rows.append([peer, f"{middle:.0f} ({low:.0f}-{high:.0f})", megabytes, *ratios])
    title = f"{hosts} hosts, {link}: a step of {millions:.3g} million parameters"
    columns = ("peer", "ms a step (quartiles)", "MB sent", "than none", "than fp16")
    return printing.Results(title, columns, rows)


def draw(everything: dict[str, Results], path: Path) -> None:
    """Draw the medians with their quartiles, a panel for each rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    most = max(len(results) for results in everything.values())
    size = (3.2 * len(everything) + 1.5, 0.28 * most + 1.2)
    figure, panels = plt.subplots(1, len(everything), figsize=size, sharey=True, squeeze=False)
    for panel, (rate, results) in zip(panels[0], everything.items(), strict=True):
        for peer, (taken, _) in results.items():
            low, middle, high = np.percentile(np.array(taken) * 1e3, (25, 50, 75))
            ours = peer not in (*HOROVOD, *DDP)
            color = "tab:orange" if peer == "auto" else "tab:blue" if ours else "0.6"
            panel.barh(
                peer, middle, xerr=[[middle - low], [high - middle]], color=color, height=0.7
            )
        panel.set_title("links as they are" if rate == "none" else rate, fontsize=10)
        panel.set_xlabel("ms a step")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and print one table for each rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument(
        "--rate", action="append", help=f"of links; may be repeated (default: {', '.join(RATES)})"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer", action="append", help="may be repeated (default: all)")
    parser.add_argument("--side", type=int, default=SIDE, help="of the layers (default: 2048)")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    for hidden in ("--family", "--address"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    peers, side = options.peer or [*DDP, *HOROVOD, *OURS], options.side
    if options.result:
        rank_main(options.family, peers, side, options.address, options.result)
        return
    families = {
        "ddp": [p for p in peers if p in DDP],
        "horovod": [p for p in peers if p in HOROVOD],
        "ours": [p for p in peers if p not in DDP + HOROVOD],
    }
    for peer in families["ours"]:
        if peer != ALONE:
            policy_of(peer)  # fails here and now if there is no such compression
    everything: dict[str, Results] = {}
    with Hosts(options.hosts) as hosts:
        for rate in options.rate or RATES:
            hosts.shape(None if rate == "none" else rate)
            results = everything[rate] = {}
            for _ in range(options.rounds):
                for family, members in families.items():
                    for peer, (taken, sent) in measure(hosts, family, members, side).items():
                        results[peer] = ([*results.get(peer, ([], 0))[0], *taken], sent)
            printing.show(table(rate, options.hosts, side, results))
            # After each rate: a run of hours may be cut off.
            if options.json:
                options.json.write_text(json.dumps(everything))
            if options.markdown:
                tables = [table(r, options.hosts, side, f) for r, f in everything.items()]
                options.markdown.write_text("\n".join(map(printing.markdown, tables)))
            if options.picture:
                draw(everything, options.picture)


if __name__ == "__main__":
    main()
