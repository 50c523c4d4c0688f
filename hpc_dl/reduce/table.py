"""The table of what is predicted of each compression: one for the command line and the log."""

from collections.abc import Sequence

from hpc_dl.reduce.cost import Prediction

#: What all are compared with, where it is among them: what one would do without compression.
CONTROLS = ("none", "fp16")
MARK = "<-"


def render(predictions: Sequence[Prediction], chosen: Prediction) -> str:
    """Write a line for each prediction, with a mark at the one that is chosen."""
    by_name = {p.name: p for p in predictions}
    controls = [by_name[name] for name in CONTROLS if name in by_name] or [predictions[0]]
    titles = ["compression", "MB sent", "network ms", "kernels ms", "step ms"]
    lines = [[*titles, *(f"than {control.name}" for control in controls)]]
    for p in predictions:
        figures = [p.sent / 1e6, p.network * 1e3, p.kernels * 1e3, p.step * 1e3]
        ratios = [f"{control.step / p.step:.2f} x" if p.step else "" for control in controls]
        name = f"{p.name} {MARK}" if p is chosen else p.name
        lines.append([name, f"{figures[0]:.2f}", *(f"{ms:.1f}" for ms in figures[1:]), *ratios])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )
