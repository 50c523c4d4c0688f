"""Time of a training step on hosts with slow links: compression against float32 and float16.

    python benchmarks/throttled.py [--hosts 4] [--rates 100mbit,1gbit,10gbit,none] [--rounds 1]
                                   [--peers none,fp16,onebit,...] [--json FILE]

Hosts are network namespaces of this machine (as root; hpc_dl/testing/hosts.py), one rank on
each. The model is a stack of 2048 x 2048 layers, 25 million parameters in all. Peers are
hpc_dl over MPI with each compressor, raw Horovod, and torch's DistributedDataParallel over gloo
with its hooks. Each peer trains by itself, one after the other, in every round; figures are
medians with their quartiles, of the slowest rank in each step.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hpc_dl.launch.request import Request, launch
from hpc_dl.testing.hosts import Hosts

#: Layers, and values of each side: 25.2 million parameters.
LAYERS, SIDE, BATCH = 6, 2048, 2
#: The optimizer without any reduction: what a step costs where the network is free.
ALONE = "alone"
OURS = (
    ALONE,
    "none",
    "fp16",
    "bf16",
    "fp8",
    "int8",
    "int4",
    "qsgd",
    "terngrad",
    "natural",
    "signsgd",
    "onebit",
    "topk",
    "topk:sample=false",
    "threshold:value=0.0001",
    "randomk",
    "dgc",
    "powersgd:rank=4",
    "sketch",
    "demo",
    "auto",
)
HOROVOD = ("horovod", "horovod fp16")
DDP = ("ddp", "ddp fp16", "ddp powersgd:rank=4")
#: Peer -> seconds of each step, and bytes that a rank sent in one (0: not known).
Results = dict[str, tuple[list[float], float]]

#: Steps before measuring: buckets are planned, kernels compiled, `auto` has chosen.
WARM, AUTO_STEPS = 4, 4
#: Steps are measured for so many seconds, within these numbers.
SECONDS, FEWEST, MOST = 4.0, 3, 20


def network() -> Any:
    """Build the model; the same on all ranks."""
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
    return torch.nn.Sequential(*layers)


def stepper(model: Any, optimizer: Any) -> Callable[[], None]:
    """Return a function that makes a training step."""
    import torch

    x = torch.randn(BATCH, SIDE)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def ours(peer: str) -> tuple[Callable[[], None], Callable[[], float]]:
    """Return a step through hpc_dl, and what counts the bytes sent."""
    import torch

    import hpc_dl.torch as hvd
    from hpc_dl.compress import Auto, unchecked

    model = network()
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


def horovod(peer: str) -> tuple[Callable[[], None], Callable[[], float]]:
    """Return a step through raw Horovod."""
    import horovod.torch as hvd
    import torch

    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4),
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if "fp16" in peer else hvd.Compression.none,
    )
    return stepper(model, optimizer), lambda: 0.0


def ddp(peer: str) -> tuple[Callable[[], None], Callable[[], float]]:
    """Return a step through torch's DistributedDataParallel."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
    from torch.nn.parallel import DistributedDataParallel

    # gloo has two threads, and the PowerSGD hook blocks one while it waits for the other: with
    # more than one bucket both block for ever.
    megabytes = 1000 if "powersgd" in peer else 25
    model = DistributedDataParallel(network(), bucket_cap_mb=megabytes)
    if "fp16" in peer:
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    if "powersgd" in peer:
        state = powersgd.PowerSGDState(
            None, matrix_approximation_rank=4, start_powerSGD_iter=2, min_compression_rate=1
        )
        model.register_comm_hook(state, powersgd.powerSGD_hook)
    return stepper(model, torch.optim.SGD(model.parameters(), lr=1e-4)), lambda: 0.0


def rank_main(family: str, peers: list[str], address: str, result: Path) -> None:
    """Measure on this rank; rank 0 writes the results."""
    import torch
    from mpi4py import MPI

    import hpc_dl.torch as hvd

    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    make = {"ours": ours, "horovod": horovod, "ddp": ddp}[family]
    hvd.init("horovod" if family == "horovod" else "mpi")
    if family == "ddp":
        os.environ.update(MASTER_ADDR=address, MASTER_PORT="29517", GLOO_SOCKET_IFNAME="eth0")
        torch.distributed.init_process_group("gloo", rank=world.rank, world_size=world.size)
    results: Results = {}
    for peer in peers:
        step, sent = make(peer)
        warm = WARM + AUTO_STEPS if peer == "auto" else WARM
        for _ in range(warm):
            step()
        before, taken = sent(), []
        while len(taken) < FEWEST or (sum(taken) < SECONDS and len(taken) < MOST):
            world.Barrier()
            start = time.perf_counter()
            step()
            taken.append(world.allreduce(time.perf_counter() - start, MPI.MAX))
        results[peer] = (taken, (sent() - before) / len(taken))
        del step, sent
        if world.rank == 0:
            print(f"{peer}: {np.median(taken) * 1e3:.0f} ms a step", file=sys.stderr, flush=True)
    if world.rank == 0:
        result.write_text(json.dumps(results))
    if family == "ddp":
        torch.distributed.destroy_process_group()


def measure(hosts: Hosts, family: str, peers: list[str]) -> Results:
    """Run this program on the hosts and return what they measured."""
    if not peers:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "results.json")
        arguments = ["--family", family, "--peers", ",".join(peers), "--result", str(result)]
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


def main() -> None:
    """Measure and print one table for each rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rates", default="100mbit,1gbit,10gbit,none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peers", default=";".join((*OURS, *HOROVOD, *DDP)).replace(";", ","))
    parser.add_argument("--json", type=Path)
    for hidden in ("--family", "--address"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    peers = options.peers.split(",")
    if options.result:
        rank_main(options.family, peers, options.address, options.result)
        return
    families = {
        "ddp": [p for p in peers if p in DDP],
        "horovod": [p for p in peers if p in HOROVOD],
        "ours": [p for p in peers if p not in DDP + HOROVOD],
    }
    everything: dict[str, Results] = {}
    with Hosts(options.hosts) as hosts:
        for rate in options.rates.split(","):
            hosts.shape(None if rate == "none" else rate)
            results: Results = {}
            for _ in range(options.rounds):
                for family, members in families.items():
                    for peer, (taken, sent) in measure(hosts, family, members).items():
                        results[peer] = ([*results.get(peer, ([], 0))[0], *taken], sent)
            everything[rate] = results
            show(rate, options.hosts, results)
            if options.json:
                options.json.write_text(json.dumps(everything))


def show(rate: str, hosts: int, results: Results) -> None:
    """Print the table of one rate."""
    link = "unshaped links" if rate == "none" else f"links of {rate}"
    table = Table(title=f"{hosts} hosts, {link}: a step of 25 million parameters")
    table.add_column("peer", no_wrap=True)
    for column in ("ms a step (quartiles)", "MB sent", "than none", "than fp16"):
        table.add_column(column, justify="right")
    medians = {peer: float(np.median(taken)) for peer, (taken, _) in results.items()}
    for peer, (taken, sent) in results.items():
        low, middle, high = np.percentile(np.array(taken) * 1e3, (25, 50, 75))
        ratios = [
            f"{medians[base] / medians[peer]:.2f} x" if base in medians else ""
            for base in ("none", "fp16")
        ]
        megabytes = f"{sent / 1e6:.2f}" if sent else ""
        table.add_row(peer, f"{middle:.0f} ({low:.0f}-{high:.0f})", megabytes, *ratios)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
