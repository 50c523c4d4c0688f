"""Images per second through hpc_dl.torch against raw horovod.torch, in one run.

    python benchmarks/adapter.py [--ranks 2] [--repeats 9] [--models digits,resnet50]

Every repetition trains a few steps with each peer in turn, so that a drift of the machine's
speed hits all alike. ``alone`` is the plain optimizer without any reduction: the limit.

Horovod's thread wakes every millisecond and spins in MPI, which takes cores from whatever else
runs in its process. So jobs with Horovod and jobs without take turns, with ``alone`` in both,
which shows what that thread alone costs. Also prints what the replica guard costs.
"""

import argparse
import json
import sys
import tempfile
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
#: The peers of a job with Horovod, and of one without.
FAMILIES = ("horovod", "mpi")
#: How often the two kinds of job take turns.
ROUNDS = 2


def model_of(name: str) -> torch.nn.Module:
    """Build a model; all calls give the same parameters."""
    from hpc_dl.models.digits_torch import digits_cnn
    from hpc_dl.models.resnet50_torch import resnet50

    torch.manual_seed(0)
    return digits_cnn() if name == "digits" else resnet50(classes=SIZES[name].classes)


def peers_of(name: str, family: str) -> dict[str, Callable[[], None]]:
    """Return for each peer a function that makes one training step."""
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

    peers = {"alone": stepper(None)}
    ours = stepper(hvd.DistributedOptimizer, process_set=Over(family))
    if family == "horovod":
        import horovod.torch as horovod

        peers["horovod.torch"] = stepper(horovod.DistributedOptimizer)
    return peers | {f"hpc_dl over {family}": ours}


def measure(name: str, family: str, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of one step of each peer, a value for each repetition."""
    import hpc_dl.torch as hvd

    peers, steps = peers_of(name, family), SIZES[name].steps
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
        check_replicas(current().comm, named, when=1)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def rank_main(models: list[str], family: str, repeats: int, out: str) -> None:
    """Measure on this rank; rank 0 writes the results."""
    import hpc_dl.torch as hvd

    torch.set_num_threads(1)
    hvd.init("mpi")
    results = {
        name: {"seconds": measure(name, family, repeats), "guard": guard_seconds(name, repeats)}
        for name in models
    }
    if hvd.rank() == 0:
        Path(out).write_text(json.dumps({"size": hvd.size(), "models": results}))


def over_alone(seconds: dict[str, list[float]], peer: str) -> np.ndarray:
    """Return a peer's time over that of ``alone``, for each repetition."""
    return np.array(seconds[peer]) / np.array(seconds["alone"])


def show(results: dict[str, list[dict]], ranks: int, console: Console) -> None:
    """Print one table from the jobs of each family."""
    table = Table(title=f"training steps on {ranks} ranks, medians (quartiles)")
    for column in ("model", "peer", "images/s", "ms a step", "over alone", "than horovod.torch"):
        table.add_column(column, justify="left" if column in ("model", "peer") else "right")
    for name in results["mpi"][0]:
        merged = {
            (family, peer): np.concatenate([job[name]["seconds"][peer] for job in jobs])
            for family, jobs in results.items()
            for peer in jobs[0][name]["seconds"]
        }
        relative = {
            (family, peer): np.concatenate([over_alone(job[name]["seconds"], peer) for job in jobs])
            for family, jobs in results.items()
            for peer in jobs[0][name]["seconds"]
        }
        reference = np.median(merged["horovod", "horovod.torch"]) * 1e3
        for (family, peer), taken in merged.items():
            low, middle, high = np.percentile(taken * 1e3, [25, 50, 75])
            ratio = float(np.median(relative[family, peer]))
            table.add_row(
                name,
                f"{peer} ({family} job)" if peer == "alone" else peer,
                f"{SIZES[name].batch * ranks / middle * 1e3:.0f}",
                f"{middle:.2f} ({low:.2f}-{high:.2f})",
                f"{ratio:.3f}",
                f"{reference / middle:.2f} x as fast",
            )
    console.print(table)
    for name in results["mpi"][0]:
        jobs = [job[name] for job in results["mpi"]]
        share = np.median([j["guard"] / np.median(j["seconds"]["hpc_dl over mpi"]) for j in jobs])
        console.print(
            f"{name}: one comparison of the replicas takes {share:.2f} of a step; 14 in 10,000 "
            f"steps are {14 * share / 10_000:.4%} of the time"
        )


def run_job(options: argparse.Namespace, family: str) -> dict:
    """Launch the ranks of one job and return what they measured."""
    from hpc_dl.launch.request import Request, launch

    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "results.json"))
        request = Request(
            script=__file__,
            arguments=[
                *("--models", options.models, "--repeats", str(options.repeats)),
                *("--family", family, "--out", out),
            ],
            ranks=options.ranks,
            # One thread: each rank has one core, as on a node that is filled with ranks.
            environment={"OMP_NUM_THREADS": "1"},
        )
        code = launch(request, sys.stdout.buffer, sys.stderr.buffer).code
        if code:
            sys.exit(code)
        results: dict = json.loads(Path(out).read_text())["models"]
        return results


def main() -> None:
    """Launch the jobs and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", default="digits,resnet50")
    parser.add_argument("--family", choices=FAMILIES, help="(used between the processes of a run)")
    parser.add_argument("--out", help="(used between the processes of a run)")
    options = parser.parse_args()
    if options.out:
        rank_main(options.models.split(","), options.family, options.repeats, options.out)
        return
    results: dict[str, list[dict]] = {family: [] for family in FAMILIES}
    for _ in range(ROUNDS):
        for family in FAMILIES:
            results[family].append(run_job(options, family))
    show(results, options.ranks, Console(width=110))


if __name__ == "__main__":
    main()
