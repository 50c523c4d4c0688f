"""Show how far training is: one bar on a terminal, one line per epoch elsewhere."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import rich.progress
from rich.console import Console
from rich.text import Text

from hpc_dl.observe.screen import own_console

#: Seconds between two looks at the metrics; each may have to wait for a GPU.
INTERVAL = 0.1

#: What has room beside the bar; a line has room for all.
BESIDE_BAR = ("loss", "accuracy", "images_per_second")

Values = Mapping[str, Any]


def describe(values: Values) -> str:
    """Write metrics on one line; those that are None are left out.

    >>> describe({"loss": 0.25, "accuracy": 0.9, "images_per_second": 12345.6})
    'loss 0.2500  accuracy 0.9000  12,346 images/s'
    """
    parts = []
    for name, value in values.items():
        if value is None:
            continue
        if name == "images_per_second":
            parts.append(f"{value:,.0f} images/s" if value >= 100 else f"{value:.3g} images/s")
        else:
            parts.append(f"{name.replace('_', ' ')} {value:.4f}")
    return "  ".join(parts)


class Progress:
    """The progress of one run, for a person to watch."""

    def __init__(self, epochs: int, steps: int, console: Console | None = None):
        """Prepare to show ``epochs`` epochs of ``steps`` steps each."""
        self._epochs, self._steps = epochs, steps
        self._console = console or own_console()
        self._shown = 0.0
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[metrics]}", markup=False),
            rich.progress.TimeRemainingColumn(compact=True),
            console=self._console,
            expand=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(self._title(1), total=epochs * steps, metrics="")

    def step(self, epoch: int, values: Callable[[], Values]) -> None:
        """Count one step of ``epoch`` (from 1).

        Args:
            epoch: the number of the epoch.
            values: returns the metrics; called some times a second at most.
        """
        self._bar.advance(self._task)
        now = time.monotonic()
        if self._console.is_terminal and now - self._shown >= INTERVAL:
            self._shown = now
            self._bar.update(self._task, description=self._title(epoch), metrics=describe(values()))

    def epoch(self, epoch: int, values: Values) -> None:
        """Show the metrics at the end of ``epoch`` (from 1)."""
        if self._console.is_terminal:
            self._update(epoch, values, completed=epoch * self._steps)
        else:
            line = Text(f"{self._title(epoch)}  {describe(values)}")
            self._console.print(line, soft_wrap=True)

    def _update(self, epoch: int, values: Values, completed: int | None = None) -> None:
        shown = {name: values[name] for name in BESIDE_BAR if name in values}
        self._bar.update(
            self._task,
            completed=completed,
            description=self._title(epoch),
            metrics=describe(shown),
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def _title(self, epoch: int) -> str:
        return f"epoch {epoch:{len(str(self._epochs))}}/{self._epochs}"
