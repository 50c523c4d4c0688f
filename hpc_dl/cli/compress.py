"""``hpc-dl compress``."""

import inspect
import json
from typing import Any

import click
from rich.table import Table

from hpc_dl.cli.output import console
from hpc_dl.compress import Unit, names
from hpc_dl.compress.registry import DECORATORS, REQUIRED, find, options_of

#: A matrix of this shape is what the ratio is given for, among as many ranks.
SHAPE, RANKS = (1024, 1024), 4


@click.group("compress")
def command() -> None:
    """Show the gradient compressors that there are.

    \b
    Examples:
      hpc-dl compress list
      hpc-dl compress list --json
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(as_json: bool) -> None:
    """Show all compressors: name, reduction class, ratio, options.

    The ratio is that of float32 bytes to the bytes of one rank's encoding of a matrix of 1024
    x 1024 among 4 ranks; none is shown where it depends on the data, or on an option that must be
    given. A compressor is chosen by its name and options: in a script with
    compression="topk:ratio=0.01", in a job with --compression topk:ratio=0.01.

    \b
    Examples:
      hpc-dl compress list
      hpc-dl compress list --json
    """
    found = [_facts(name) for name in names()]
    if as_json:
        click.echo(json.dumps(found, indent=2, default=str))
        return
    out = console()
    table = Table(show_edge=False)
    for title in ("name", "class", "ratio", "options and their defaults", "what it sends"):
        table.add_column(title, justify="right" if title == "ratio" else "left")
    for facts in found:
        options = ", ".join(f"{key}={value}" for key, value in facts["options"].items())
        ratio = "" if facts["ratio"] is None else f"{facts['ratio']:.1f}"
        table.add_row(facts["name"], facts["class"], ratio, options, facts["summary"])
    out.print(table)
    out.print("\noptions of each of them:")
    for key, said in DECORATORS.items():
        out.print(f"  {key:16}{said}")
    out.print("\ninstead of a name:")
    out.print("  auto            chooses after the first steps what pays, or nothing")


def _facts(name: str) -> dict[str, Any]:
    kind = find(name)
    options = options_of(kind)
    unit = Unit.single("matrix", SHAPE)
    ratio = None
    if getattr(kind, "fixed", True) and not any(value is REQUIRED for value in options.values()):
        ratio = 4 * unit.size / kind().payload_bytes(unit, RANKS)
    said = kind.summary or (inspect.getdoc(kind) or "").partition("\n")[0]
    return {
        "name": name,
        "class": kind.reduction.value,
        "ratio": ratio,
        "options": options,
        "error_feedback": kind.needs_feedback if isinstance(kind.needs_feedback, bool) else True,
        "summary": said,
    }
