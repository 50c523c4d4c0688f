"""Everything one training run shows and leaves behind."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from hpc_dl.observe.curve import check_matplotlib, curve
from hpc_dl.observe.folder import CURVE, METRICS, SUMMARY
from hpc_dl.observe.metrics import MetricsWriter
from hpc_dl.observe.progress import Progress, Values
from hpc_dl.observe.screen import own_console
from hpc_dl.observe.stopwatch import Stopwatch
from hpc_dl.observe.summary import write_summary
from hpc_dl.observe.table import result_table


class Run:
    """Records a run into its folder and shows its progress; on rank 0 only.

    The other ranks make the same calls with ``folder=None``, which do next to nothing.

    >>> with Run(folder, epochs=5, steps=100) as run:  # doctest: +SKIP
    ...     for epoch in range(5):
    ...         run.resume()
    ...         for batch in batches:
    ...             run.step(images=64, values=lambda: {"loss": train(batch)})
    ...         run.pause()
    ...         run.record({"loss": loss, "accuracy": accuracy})
    ...     run.finish({"job": "my job"})
    """

    def __init__(
        self, folder: Path | None, epochs: int, steps: int, console: Console | None = None
    ):
        """Prepare to record ``epochs`` epochs of ``steps`` steps.

        Args:
            folder: from `make_run_folder`; None: on other ranks than 0.
            epochs: how many times the data are gone through.
            steps: batches in an epoch, on each rank.
            console: where to show progress; by default the standard output.

        Raises:
            MissingComponentError: matplotlib, for the curve at the end, is not installed.
        """
        self.epoch = 0
        """Epochs recorded so far."""
        self._folder = folder
        self._console = console or own_console()
        self._watch = Stopwatch()
        self._images = 0
        #: (images, seconds) where the rate of the run, and of the epoch, is measured from.
        self._begin = self._since = (0, 0.0)
        self._records: list[dict[str, Any]] = []
        self._open = ExitStack()
        if folder is not None:
            check_matplotlib()
            self._metrics = self._open.enter_context(MetricsWriter(folder / METRICS))
            self._progress = Progress(epochs, steps, self._console)

    def resume(self) -> None:
        """Start the clock of training: at the begin of an epoch."""
        self._watch.resume()

    def pause(self) -> None:
        """Stop the clock of training: before an evaluation."""
        self._watch.pause()

    def step(self, images: int, values: Callable[[], Values]) -> None:
        """Count a training step.

        Args:
            images: images in it, over all ranks.
            values: returns ``loss``, ``accuracy`` or others so far; called now and then, on
                rank 0 alone: it must not call a collective.
        """
        first = self._images == 0
        self._images += images
        if self._folder is not None:
            self._progress.step(
                self.epoch + 1,
                lambda: {**values(), "images_per_second": self._rate(self._since)},
            )
        if first:  # it compiles, allocates and warms up; that is no speed
            self._begin = self._since = (self._images, self._watch.seconds)

    def record(self, values: Values) -> None:
        """End an epoch: write its metrics and show them.

        Args:
            values: ``loss``, ``accuracy``, ``test_loss``, ``test_accuracy`` or others, over all
                ranks.
        """
        self.epoch += 1
        if self._folder is None:
            return
        rate = self._rate(self._since)
        self._since = (self._images, self._watch.seconds)
        record = {
            "epoch": self.epoch,
            **values,
            "images_per_second": rate,
            "seconds": self._watch.seconds,
        }
        self._metrics.write(record)
        self._records.append(record)
        self._progress.epoch(self.epoch, {**values, "images_per_second": rate})

    def finish(self, facts: Mapping[str, Any]) -> None:
        """End the run: write summary.json and curve.png, and print a table.

        Args:
            facts: what summary.json says besides ``seconds``, ``images_per_second`` and
                ``finished``.
        """
        self.close()
        if self._folder is None:
            return
        summary = {
            **facts,
            "seconds": self._watch.seconds,
            "images_per_second": self._rate(self._begin),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        curve(self._records, self._folder / CURVE, str(facts.get("job", "")))
        write_summary(self._folder / SUMMARY, summary)
        self._console.print(result_table(summary, self._folder))

    def close(self) -> None:
        """Take the bar off the screen and close the metrics; again does nothing."""
        self._open.close()

    def __enter__(self) -> Self:
        if self._folder is not None:
            self._open.enter_context(self._progress)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _rate(self, since: tuple[int, float]) -> float | None:
        """Images per second since then; None: no images."""
        images, seconds = since
        elapsed = self._watch.seconds - seconds
        return (self._images - images) / elapsed if self._images > images and elapsed else None
