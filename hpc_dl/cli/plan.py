"""``hpc-dl plan``."""

import json
import math

import click
from rich.table import Table

from hpc_dl.cli import quantities
from hpc_dl.cli.output import console
from hpc_dl.compress import Segment, Unit, make
from hpc_dl.reduce.cost import Load, Prediction, best, network_of_link, predict
from hpc_dl.reduce.measure import measure_kernel

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
#: Matrices of a bucket.
BUCKET = 2


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
@click.option("--busy-cores", is_flag=True, help="Kernels take their time from the computation.")
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

    The model is taken to be square matrices of up to 1024 x 1024. Kernels are measured on this
    machine, on one core; the network is a link of each node, with the latency of a message.

    \b
    Examples:
      hpc-dl plan --params 25M --ranks 64 --bandwidth 10Gbit --latency 20us
      hpc-dl plan --params 1.3B --ranks 8 --bandwidth 1Gbit --compute 2s
      hpc-dl plan --params 25M --ranks 4 --bandwidth 100Mbit --compression topk:ratio=0.001
    """
    units = _units(int(params))
    load = Load(units, compute, compute * 2 / 3, spare_core=not busy_cores)
    network = network_of_link(ranks, bandwidth, latency)
    specs = specs or CANDIDATES
    found = [predict(s, load, network, measure_kernel(s)) for s in map(make, specs)]
    chosen = best(found)
    if as_json:
        rows = [
            {"compression": spec, **p._asdict(), "scheme": p.scheme.describe(), "best": p is chosen}
            for spec, p in zip(specs, found, strict=True)
        ]
        click.echo(json.dumps(rows, indent=2))
    else:
        _show(specs, found, chosen)


def _units(params: int) -> tuple[Unit, ...]:
    matrices = max(1, math.ceil(params / SIDE**2))
    side = max(1, round((params / matrices) ** 0.5))
    segments = [
        Segment(f"matrix{i}", (side, side), (i % BUCKET) * side**2) for i in range(matrices)
    ]
    parts = [tuple(segments[i : i + BUCKET]) for i in range(0, matrices, BUCKET)]
    return tuple(Unit(part, sum(segment.size for segment in part)) for part in parts)


def _show(specs: tuple[str, ...], found: list[Prediction], chosen: Prediction) -> None:
    by_spec = dict(zip(specs, found, strict=True))
    # What all are compared with: what one would do without, where that is among them.
    controls: list[str] = [spec for spec in ("none", "fp16") if spec in by_spec]
    controls = controls or [specs[0]]
    table = Table(show_edge=False)
    table.add_column("compression", no_wrap=True)
    titles = ["MB sent", "network ms", "kernels ms", "step ms"]
    for title in titles + [f"than {spec}" for spec in controls]:
        table.add_column(title, justify="right")
    for spec, p in zip(specs, found, strict=True):
        row = [
            f"[bold]{spec} <-[/bold]" if p is chosen else spec,
            f"{p.sent / 1e6:.2f}",
            f"{p.network * 1e3:.1f}",
            f"{p.kernels * 1e3:.1f}",
            f"{p.step * 1e3:.1f}",
        ]
        table.add_row(*row, *(f"{by_spec[spec].step / p.step:.2f} x" for spec in controls))
    console().print(table)
