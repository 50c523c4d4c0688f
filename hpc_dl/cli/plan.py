"""``hpc-dl plan``."""

import contextlib
import importlib
import json
import math

import click
import numpy as np

from hpc_dl.arrays import Parameter
from hpc_dl.cli import quantities
from hpc_dl.compress import make, policy_of
from hpc_dl.reduce.build import Division, divide
from hpc_dl.reduce.cost import Costs, Load, Network, best, network_of_link, predict
from hpc_dl.reduce.measure import casts_of, elements_of, measure_cast, measure_work, schemes_of
from hpc_dl.reduce.table import render

#: Those that change gradients least first.
CANDIDATES = (
    "none",
    "fp16",
    "int8",
    "int4",
    "powersgd:rank=4",
    "topk:ratio=0.01",
    "onebit",
    "dgc:ratio=0.001",
)
#: Elements of a side of the square matrices that a model is taken to be made of, at most.
SIDE = 1024
#: Bytes of a bucket.
BUCKET_BYTES = 8 << 20


@click.command("plan")
@click.option(
    "--params", type=quantities.count, required=True, help="Parameters of the model, as in 25M."
)
@click.option("--ranks", type=click.IntRange(min=2), required=True, help="Ranks, one on a node.")
@click.option(
    "--bandwidth", type=quantities.bandwidth, required=True, help="Of a node's link, as in 10Gbit."
)
@click.option(
    "--latency", type=quantities.duration, default="20us", show_default=True, help="As in 20us."
)
@click.option(
    "--compute",
    type=quantities.duration,
    default="300ms",
    show_default=True,
    help="A step without communication; two thirds of it is taken to be backward.",
)
@click.option(
    "--compression",
    "specs",
    multiple=True,
    metavar="SPEC",
    help="A candidate, instead of the usual ones; may be given several times.",
)
@click.option("--busy-cores", is_flag=True, help="Encoding takes its time from the computation.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    params: float,
    ranks: int,
    bandwidth: float,
    latency: float,
    compute: float,
    specs: tuple[str, ...],
    busy_cores: bool,
    as_json: bool,
) -> None:
    """Predict what compression would gain on a cluster that one does not have.

    The model is taken to be square matrices of up to 1024 x 1024. What a rank does beside the
    network is measured on this machine; the network is a link of each node, with the latency of a
    message. compression="auto" logs the same table, with the network measured too.

    \b
    Examples:
      hpc-dl plan --params 25M --ranks 64 --bandwidth 10Gbit --latency 20us
      hpc-dl plan --params 1.3B --ranks 8 --bandwidth 1Gbit --compute 2s
      hpc-dl plan --params 25M --ranks 4 --bandwidth 100Mbit --compression topk:ratio=0.001
    """
    parameters = _parameters(int(params))
    specs = specs or CANDIDATES
    divisions = [divide(parameters, BUCKET_BYTES, policy_of(make(spec))) for spec in specs]
    costs = _measure(divisions, network_of_link(ranks, bandwidth, latency))
    load = Load(compute, compute * 2 / 3, spare_core=not busy_cores)
    found = [predict(s, d, load, costs) for s, d in zip(specs, divisions, strict=True)]
    chosen = best(found)
    if as_json:
        rows = [
            {"compression": p.name, **p._asdict(), "scheme": make(p.name).describe()}
            | {"best": p is chosen}
            for p in found
        ]
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo(render(found, chosen))


def _parameters(params: int) -> list[Parameter]:
    matrices = max(1, math.ceil(params / SIDE**2))
    side = max(1, round((params / matrices) ** 0.5))
    return [Parameter(f"matrix{i}", (side, side), np.dtype(np.float32)) for i in range(matrices)]


def _measure(divisions: list[Division], network: Network) -> Costs:
    """Measure on this machine what is not given."""
    elements = elements_of(divisions)
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")  # whose casts are used where it is loaded
    return Costs(
        network,
        {s: measure_work(s, network.size, elements) for s in schemes_of(divisions)},
        {name: measure_cast(name, elements) for name in casts_of(divisions)},
    )
