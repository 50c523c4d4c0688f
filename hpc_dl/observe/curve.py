"""Draw how a run learned."""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpc_dl.errors import MissingComponentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN, _TEST = "#2a6fbb", "#d1495b"
_INK, _FAINT = "#333333", "#dddddd"


def check_matplotlib() -> None:
    """Find out before training whether a curve can be drawn after it.

    Raises:
        MissingComponentError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingComponentError(
            "the curve is drawn by matplotlib, which is not installed; "
            "run `pip install 'hpc_dl[jobs]'`"
        )


def curve(
    records: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw loss and accuracy against epochs into a PNG of 1500 x 630 pixels.

    Args:
        records: one for each epoch, with ``epoch`` and any of ``loss``, ``test_loss``,
            ``accuracy``, ``test_accuracy``; values that are None are left out.
        path: the file.
        title: a line above it.

    Raises:
        MissingComponentError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    _panel(loss, records, "loss")
    loss.set_ylim(bottom=0)
    _panel(accuracy, records, "accuracy")
    figure.suptitle(title, color=_INK, fontsize=12)
    figure.savefig(path, format="png")


def _panel(axes: "Axes", records: Sequence[Mapping[str, Any]], metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for key, label, colour in ((metric, "training", _TRAIN), (f"test_{metric}", "test", _TEST)):
        points = [(r["epoch"], r[key]) for r in records if _is_number(r.get(key))]
        if points:
            epochs, values = zip(*points, strict=True)
            text = f"{label}, {values[-1]:.4f} at the end"
            axes.plot(epochs, values, "o-", color=colour, label=text, markersize=4, linewidth=1.8)
            axes.legend(frameon=False)
    axes.set_title(metric, color=_INK, fontsize=11)
    axes.set_xlabel("epoch", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
