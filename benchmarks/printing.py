"""A table of results, on the screen and as Markdown for a document."""

from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Results(NamedTuple):
    """A table: the first column is text, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def show(results: Results, width: int = 120) -> None:
    """Print it."""
    table = Table(title=results.title)
    table.add_column(results.columns[0], no_wrap=True)
    for column in results.columns[1:]:
        table.add_column(column, justify="right")
    for row in results.rows:
        table.add_row(*row)
    Console(width=width).print(table)


def markdown(results: Results) -> str:
    """Write it as a table of a document, with its title as a line above it."""
    rule = ["---", *["---:"] * (len(results.columns) - 1)]
    lines = [results.columns, rule, *results.rows]
    return f"{results.title}:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
