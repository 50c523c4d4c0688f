"""Does it learn as well? Compressors against the dense control, over several seeds.

    python benchmarks/convergence.py [--ranks 4] [--seeds 3] [--task digits ...] [--scheme SPEC ...]
                                     [--epochs 15] [--steps 2000] [--picture FILE]
                                     [--markdown FILE] [--json FILE]

Two tasks on real data: handwritten digits by a convolutional network, and the next character of
Python's help by a small transformer. All schemes see the same batches and begin with the same
weights; only how gradients travel differs. Prints accuracy (digits) and loss (characters) on
data to be tested on: means, with the deviation over the seeds where there are several, and how
far each is from the control, also in deviations of the control. The control is always trained.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import printing

from hpc_dl.compress import policy_of
from hpc_dl.launch.request import Request, launch

CONTROL = "none"
SCHEMES = (
    CONTROL,
    "fp16",
    "int8",
    "onebit",
    "topk:ratio=0.01",
    "powersgd:rank=4",
    "dgc:ratio=0.01,ramp=100",
)
TASKS = ("digits", "characters")
MOMENTUM = 0.9
EPOCHS, DIGITS_BATCH, DIGITS_RATE = 15, 16, 0.08
STEPS, CHARACTERS_BATCH, CHARACTERS_RATE, LOOK = 2000, 8, 0.2, 100
CONTEXT, WIDTH = 32, 64
#: task -> scheme -> for each seed, [(step, value on the data to be tested on), ...]
Curves = dict[str, dict[str, list[list[tuple[int, float]]]]]


def wrapped(model: Any, spec: str, rate: float, steps: int) -> tuple[Any, Any]:
    """Return the distributed optimizer and its schedule."""
    import torch

    import hpc_dl.torch as hvd
    from hpc_dl.cli.job import momentum_beside

    momentum = momentum_beside(spec, MOMENTUM)
    # Momentum that is taken before compression has no factor 1 / (1 - momentum) of its own to
    # lose: both forms take steps of equal length.
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), rate, momentum=momentum),
        named_parameters=model.named_parameters(),
        compression=spec,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def digits(spec: str, seed: int, epochs: int) -> list[tuple[int, float]]:
    """Train on digits; return the accuracy after each epoch."""
    import torch
    from torch.nn.functional import cross_entropy

    import hpc_dl.torch as hvd
    from hpc_dl.data import digits as load
    from hpc_dl.models.digits_torch import digits_cnn
    from hpc_dl.training import Plan

    torch.manual_seed(seed)
    model, data = digits_cnn(), load()
    plan = Plan(data.train, data.test, hvd.rank(), hvd.size(), epochs, DIGITS_BATCH, seed)
    optimizer, schedule = wrapped(model, spec, DIGITS_RATE, plan.epochs * plan.steps)
    curve = []
    for epoch in range(plan.epochs):
        for batch in plan.training_batches(epoch):
            optimizer.zero_grad()
            images, labels = torch.from_numpy(batch.images), torch.from_numpy(batch.labels)
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        right = torch.zeros(2)
        with torch.no_grad():
            for batch in plan.test_batches():
                found = model(torch.from_numpy(batch.images)).argmax(1).numpy()
                right += torch.tensor([(found == batch.labels).sum(), len(found)])
        right = hvd.allreduce(right, op=hvd.Sum)
        curve.append((epoch + 1, float(right[0] / right[1])))
    return curve


def characters(spec: str, seed: int, steps: int) -> list[tuple[int, float]]:
    """Train on text; return the loss now and then."""
    import torch
    from torch.nn.functional import cross_entropy

    import hpc_dl.torch as hvd
    from hpc_dl.data import python_help, windows
    from hpc_dl.models.characters_torch import CharacterTransformer

    torch.manual_seed(seed)
    text = python_help()
    model = CharacterTransformer(len(text.alphabet), CONTEXT, WIDTH)
    optimizer, schedule = wrapped(model, spec, CHARACTERS_RATE, steps)

    def loss_on(part: np.ndarray, count: int, step: int) -> Any:
        piece = torch.from_numpy(windows(part, count, CONTEXT, seed, step, hvd.rank()))
        logits = model(piece[:, :-1])
        return cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())

    curve = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_on(text.train, CHARACTERS_BATCH, step).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % LOOK == 0 or step + 1 == steps:
            with torch.no_grad():
                mine = loss_on(text.test, 64, steps)
            curve.append((step + 1, float(hvd.allreduce(mine, op=hvd.Average))))
    return curve


def rank_main(lengths: dict[str, int], schemes: list[str], seeds: int, result: Path) -> None:
    """Train on this rank, each task for so many epochs or steps; rank 0 writes the curves."""
    import torch

    import hpc_dl.torch as hvd

    torch.set_num_threads(1)
    hvd.init("mpi")
    curves: Curves = {task: {spec: [] for spec in schemes} for task in lengths}
    for seed in range(seeds):
        for task, length in lengths.items():
            for spec in schemes:
                curve = {"digits": digits, "characters": characters}[task](spec, seed, length)
                curves[task][spec].append(curve)
                if hvd.rank() == 0:
                    print(task, spec, seed, curve[-1], file=sys.stderr, flush=True)
                    result.write_text(json.dumps(curves))


def table(
    task: str, by_scheme: dict[str, list[list[tuple[int, float]]]], ranks: int
) -> printing.Results:
    """Write the table of a task."""
    last = {spec: np.array([curve[-1][1] for curve in found]) for spec, found in by_scheme.items()}
    control = last[CONTROL]
    seeds = len(control)
    deviation = float(control.std(ddof=1)) if seeds > 1 else 0.0
    rows = []
    for spec, values in last.items():
        difference = float(values.mean() - control.mean())
        rows.append(
            [
                spec,
                f"{values.mean():.4f}",
                f"{values.std(ddof=1):.4f}" if seeds > 1 else "",
                f"{difference:+.4f}",
                f"{difference / deviation:+.1f}" if deviation > 0 else "",
            ]
        )
    what = "accuracy" if task == "digits" else "loss"
    title = f"{task}: {what} at the end, {ranks} ranks, {seeds} seed{'s' * (seeds > 1)}"
    columns = ("compression", "mean", "deviation", "from the control", "in its deviations")
    return printing.Results(title, columns, rows)


def draw(curves: Curves, path: Path) -> None:
    """Draw the means over the seeds, and the range of the control."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(6 * len(curves), 4), squeeze=False)
    for axis, (task, by_scheme) in zip(axes[0], curves.items(), strict=True):
        for spec, found in by_scheme.items():
            steps = [step for step, _ in found[0]]
            values = np.array([[value for _, value in curve] for curve in found])
            style = {"color": "black", "linewidth": 2} if spec == CONTROL else {"linewidth": 1}
            axis.plot(steps, values.mean(axis=0), label=spec, **style)
            if spec == CONTROL:
                low, high = values.min(axis=0), values.max(axis=0)
                axis.fill_between(steps, low, high, color="black", alpha=0.15)
        axis.set_title(task)
        axis.set_xlabel("epoch" if task == "digits" else "step")
        axis.set_ylabel("test accuracy" if task == "digits" else "test loss")
        if task == "digits":
            axis.set_ylim(top=1.0)
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", action="append", choices=TASKS, help="may be repeated")
    parser.add_argument("--scheme", action="append", metavar="SPEC", help="may be repeated")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the digits")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the characters")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = options.scheme or SCHEMES
    schemes = [CONTROL, *(spec for spec in given if spec != CONTROL)]
    for spec in schemes:
        policy_of(spec)  # fails here and now if there is no such compression
    everything = {"digits": options.epochs, "characters": options.steps}
    lengths = {task: everything[task] for task in options.task or TASKS}
    if options.result:
        rank_main(lengths, schemes, options.seeds, options.result)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "curves.json")
        request = Request(
            script=__file__,
            arguments=[*sys.argv[1:], "--result", str(result)],
            ranks=options.ranks,
            environment={"OMP_NUM_THREADS": "1"},
        )
        code = launch(request, sys.stdout.buffer, sys.stderr.buffer).code
        if code:
            sys.exit(code)
        curves: Curves = json.loads(result.read_text())
    tables = [table(task, found, options.ranks) for task, found in curves.items()]
    for each in tables:
        printing.show(each)
    if options.markdown:
        options.markdown.write_text("\n".join(map(printing.markdown, tables)))
    if options.picture:
        draw(curves, options.picture)
    if options.json:
        options.json.write_text(json.dumps(curves))


if __name__ == "__main__":
    main()
