"""``hpc-dl doctor``."""

import json
import sys
from dataclasses import asdict

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hpc_dl.cli.checkup import Finding, findings

_MARKS = {"ok": "[green]ok[/green]", "absent": "[dim]-[/dim]", "broken": "[red]!![/red]"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show what is installed, what works, and what to repair.

    Frameworks, MPI, Horovod and GPUs; the communicator that a job would use, and why; and an
    all-reduce on two ranks that are really started. The exit code is 1 if something is broken.

    \b
    Examples:
      hpc-dl doctor
      hpc-dl doctor --json
    """
    console = Console(stderr=True)
    found: list[Finding] = []
    with console.status("looking around") as status:
        for finding in findings():
            found.append(finding)
            status.update(f"looked at {finding.name}")
    broken = [finding for finding in found if finding.state == "broken"]
    if as_json:
        report = {"healthy": not broken, "findings": [asdict(finding) for finding in found]}
        click.echo(json.dumps(report, indent=2))
    else:
        _show(found, broken)
    sys.exit(1 if broken else 0)


def _show(found: list[Finding], broken: list[Finding]) -> None:
    console = Console(highlight=False)
    table = Table(show_edge=False)
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in found:
        value = escape(finding.value)
        if finding.state == "absent" and finding.remedy:
            value += f"\n[dim]{escape(finding.remedy)}[/dim]"
        table.add_row(_MARKS[finding.state], escape(finding.name), value)
    console.print(table)
    if not broken:
        console.print("\n[green]all is well[/green]")
    for finding in broken:
        said = escape(f"{finding.name}: {finding.value}")
        console.print(f"\n[red]{said}[/red]", soft_wrap=True)
        console.print(f"  to repair it: {escape(finding.remedy)}", soft_wrap=True)
