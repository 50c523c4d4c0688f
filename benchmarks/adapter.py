"""Images per second through hpc_dl.torch against raw horovod.torch, in one run.

    python benchmarks/adapter.py [--ranks 2] [--repeats 9] [--models digits,resnet50]

Every repetition trains a few steps with each peer in turn, so that a drift of the machine's
speed hits all alike; the ratios are medians of ratios within one repetition. ``alone`` is the
plain optimizer without any reduction: the limit. Also prints what the replica guard costs.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table


class Size(NamedTuple):
    """A model's input, its batch on each rank, and the steps of one repetition."""

    shape: tuple[int, int, int]
    classes: int
    batch: int
    steps: int


SIZES = {"digits": Size((1, 8, 8), 10, 32, 40), "resnet50": Size((3, 32, 32), 10, 16, 2)}
PEERS = ("alone", "horovod.torch", "hpc_dl over horovod", "hpc_dl over mpi")


def model_of(name: str) -> torch.nn.Module:
    """Build a model; all calls give the same parameters."""
    from hpc_dl.models.digits_torch import digits_cnn
    from hpc_dl.models.resnet50_torch import resnet50

    torch.manual_seed(0)
    return digits_cnn() if name == "digits" else resnet50(classes=SIZES[name].classes)


def peers_of(name: str) -> dict[str, Callable[[], None]]:
    """Return for each peer a function that makes one training step."""
    import horovod.torch as horovod

    import hpc_dl.torch as hvd
    from hpc_dl.comm import make
    from hpc_dl.world import Group

    class Over(hvd.ProcessSet):
        """All ranks, over a communicator of its own."""

        def __init__(self, spec: str):
            super().__init__()
            self._own = Group(make(spec, "torch")[0])

        def group(self) -> Group:
            return self._own

    over_horovod, over_mpi = Over("horovod"), Over("mpi")

    def stepper(wrap: Callable[..., torch.optim.Optimizer] | None, **options: object):
        model = model_of(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        if wrap is not None:
            named = list(model.named_parameters())
            optimizer = wrap(optimizer, named_parameters=named, **options)
        size = SIZES[name]
        x, y = torch.randn(size.batch, *size.shape), torch.randint(size.classes, (size.batch,))

        def step() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return step

    return {
        "alone": stepper(None),
        "horovod.torch": stepper(horovod.DistributedOptimizer),
        "hpc_dl over horovod": stepper(hvd.DistributedOptimizer, process_set=over_horovod),
        "hpc_dl over mpi": stepper(hvd.DistributedOptimizer, process_set=over_mpi),
    }


def measure(name: str, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of one step of each peer, a value for each repetition."""
    import hpc_dl.torch as hvd

    peers, steps = peers_of(name), SIZES[name].steps
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    for repeat in range(-2, repeats):
        order = list(peers)
        shift = repeat % len(order)
        for peer in order[shift:] + order[:shift]:
            hvd.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                peers[peer]()
            hvd.barrier()
            if repeat >= 0:
                seconds[peer].append((time.perf_counter() - start) / steps)
    return seconds


def guard_seconds(name: str, repeats: int) -> float:
    """Return the median seconds of one comparison of the replicas."""
    import hpc_dl.torch as hvd
    from hpc_dl.arrays import host_view
    from hpc_dl.reduce.guard import check_replicas
    from hpc_dl.world import current

    model, taken = model_of(name), []
    for _ in range(repeats):
        hvd.barrier()
        start = time.perf_counter()
        named = ((n, host_view(p.detach())) for n, p in model.named_parameters())
        check_replicas(current().comm, named, step=1)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def rank_main(models: list[str], repeats: int, out: str) -> None:
    """Measure on this rank; rank 0 writes the results."""
    import hpc_dl.torch as hvd

    torch.set_num_threads(1)
    hvd.init("mpi")
    results = {
        name: {"seconds": measure(name, repeats), "guard": guard_seconds(name, repeats)}
        for name in models
    }
    if hvd.rank() == 0:
        Path(out).write_text(json.dumps({"size": hvd.size(), "models": results}))


def show(results: dict[str, object], console: Console) -> None:
    """Print one table."""
    size = results["size"]
    table = Table(title=f"training steps on {size} ranks, medians (smallest .. largest)")
    for column in ("model", "peer", "images/s", "ms a step", "against horovod.torch"):
        table.add_column(column, justify="left" if column in ("model", "peer") else "right")
    for name, result in results["models"].items():
        reference = np.array(result["seconds"]["horovod.torch"])
        for peer, values in result["seconds"].items():
            taken = np.array(values)
            ratios, ms = reference / taken, taken * 1e3
            table.add_row(
                name,
                peer,
                f"{SIZES[name].batch * size / np.median(taken):.0f}",
                f"{np.median(ms):.2f} ({ms.min():.2f} .. {ms.max():.2f})",
                f"{np.median(ratios):.3f} x",
            )
    console.print(table)
    for name, result in results["models"].items():
        step = np.median(result["seconds"]["hpc_dl over mpi"])
        share = 14 * result["guard"] / (10_000 * step)
        console.print(
            f"{name}: one comparison of the replicas takes {result['guard'] / step:.2f} of a step; "
            f"14 in 10,000 steps are {share:.4%} of the time"
        )


def main() -> None:
    """Launch the ranks and print what they measured."""
    import tempfile

    from hpc_dl.launch.request import Request, launch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", default="digits,resnet50")
    parser.add_argument("--out", help="(used between the processes of a run)")
    options = parser.parse_args()
    models = options.models.split(",")
    if options.out:
        rank_main(models, options.repeats, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "results.json"))
        arguments = ["--models", options.models, "--repeats", str(options.repeats), "--out", out]
        # OMP_NUM_THREADS=1: each rank has one core, as on a node that is filled with ranks.
        request = Request(
            script=__file__,
            arguments=arguments,
            ranks=options.ranks,
            environment={"OMP_NUM_THREADS": "1"},
        )
        verdict = launch(request, sys.stdout.buffer, sys.stderr.buffer)
        if verdict.code:
            sys.exit(verdict.code)
        show(json.loads(Path(out).read_text()), Console(width=110))


if __name__ == "__main__":
    main()
