"""The result of a run as a table for a person."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table


def result_table(summary: Mapping[str, Any], folder: Path) -> Table:
    """Build the table of the facts that ``summary`` has.

    Args:
        summary: what goes into summary.json.
        folder: where it lies.
    """
    table = Table(title=str(summary.get("job", "run")), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in _rows(summary):
        table.add_row(label, text)
    table.add_row("written to", str(folder))
    return table


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if summary.get("test_accuracy") is not None:
        found.append(("test accuracy", f"{summary['test_accuracy']:.4f}"))
    if "world_size" in summary:
        ranks = f"{summary['world_size']} (communicator {summary.get('comm', '?')})"
        found.append(("ranks", ranks))
    if "framework" in summary:
        found.append(("framework", str(summary["framework"])))
    found.append(("training", f"{summary['seconds']:.2f} s"))
    if summary.get("images_per_second") is not None:
        found.append(("speed", f"{summary['images_per_second']:,.1f} images/s"))
    if "bytes_sent" in summary:
        sent, dense = summary["bytes_sent"], summary.get("bytes_dense", 0)
        less = f", {dense / sent:.1f} times less than float32" if 0 < sent < dense else ""
        found.append(("sent by each rank", f"{sent / 1e6:,.1f} MB of gradients{less}"))
    if "weights_digest" in summary:
        found.append(("weights", str(summary["weights_digest"])[:16]))
    return found
