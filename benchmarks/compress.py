"""Speed of the compression kernels on one core, as a ratio to a copy of the same memory.

    python benchmarks/compress.py [--elements 25000000] [--repeats 5] [--numpy-repeats 1]
                                  [--scheme SPEC ...] [--wire] [--markdown FILE] [--json FILE]

Each compressor encodes with error feedback where it has it, so its kernel reads the gradient and
updates the residual. Beside it stand its kernels in NumPy, and below what torch and NumPy offer
for the same purpose. All take turns in every repetition; figures are medians. ``--wire`` prints
instead what travels in theory and what was sent in truth, among 4 ranks.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from printing import Results, markdown, show

from hpc_dl.compress import AllReduced, Codec, Scheme, Sparsifier, Step, Unit, make, names
from hpc_dl.compress.kernels.compile import Kernel
from hpc_dl.compress.kernels.topk import scatter_add
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing import run_threads

COPY = "copy"
Calls = dict[str, Callable[[], object]]
Seconds = dict[str, list[float]]
#: What is measured beside each compressor with default options.
VARIANTS = ("topk:sample=false", "int8:error_feedback=fp32")


def calls_of(spec: str, x: np.ndarray) -> Calls:
    """Return what encodes ``x`` with a compressor, and what decodes it."""
    scheme = make(spec)
    compressor, side = scheme.compressor, int(len(x) ** 0.5)
    unit = Unit.single("x", (side, side))
    x = x[: unit.size]
    left, out = np.zeros_like(x), np.empty_like(x)
    state, step = compressor.init(unit), Step(1 << 20)
    keep = scheme.residual != "off"
    if isinstance(compressor, Codec):
        payload = compressor.encode(x, 0)
        return {
            f"{spec} encode": lambda: (
                compressor.encode_with_residual(x, left, 0) if keep else compressor.encode(x, 0)
            ),
            f"{spec} decode": lambda: compressor.decode(payload, out),
        }
    if isinstance(compressor, Sparsifier):
        chosen, total = compressor.select(x, state, unit, step), np.zeros_like(x)

        def decode() -> None:
            scatter_add(*chosen, total)
            compressor.restore(total, out, unit)

        return {
            f"{spec} encode": lambda: compressor.select_with_residual(x, left, state, unit, step),
            f"{spec} decode": decode,
        }
    assert isinstance(compressor, AllReduced)
    rest = left if keep else None
    return {
        f"{spec} both": lambda: [None for _ in compressor.rounds(x, out, rest, state, unit, step)]
    }


def peers_of(x: np.ndarray) -> Calls:
    """Return a copy, and what torch and NumPy offer."""
    out, tensor, count = np.empty_like(x), torch.from_numpy(x), len(x) // 100
    half = np.dtype(np.float16)
    return {
        COPY: lambda: np.copyto(out, x),
        "torch.topk 1 %": lambda: torch.topk(tensor.abs(), count),
        "numpy.argpartition 1 %": lambda: np.argpartition(np.abs(x), len(x) - count),
        "numpy.packbits of signs": lambda: np.packbits(x < 0),
        "numpy float16": lambda: x.astype(half),
        "torch float16": lambda: tensor.to(torch.float16),
        "torch bfloat16": lambda: tensor.to(torch.bfloat16),
        "torch 8 bits": lambda: (tensor * 20).round_().clamp_(-128, 127).to(torch.int8),
    }


def in_turns(calls: Calls, repeats: int) -> Seconds:
    """Return the seconds of each call, a value for each repetition after one to begin with."""
    seconds: Seconds = {name: [] for name in calls}
    for repeat in range(-1, repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(elements: int, repeats: int, in_numpy: int, specs: list[str]) -> dict[str, Seconds]:
    """Measure all that is called, and the compressors once more with NumPy's kernels."""
    x = np.random.default_rng(0).standard_normal(elements, np.float32)
    calls, peers = {}, peers_of(x)
    for spec in specs:
        calls |= calls_of(spec, x)
    seconds = {"fastest": in_turns({COPY: peers.pop(COPY)} | calls | peers, repeats)}
    with patch.object(Kernel, "__call__", lambda kernel, *args: kernel.reference(*args)):
        seconds["numpy"] = in_turns(calls, in_numpy) if in_numpy else {}
    return seconds


def table(seconds: dict[str, Seconds], elements: int) -> Results:
    """Write gigabytes a second, and the ratio to the copy in the same repetition."""
    copy = np.array(seconds["fastest"][COPY])
    rows = []
    for name, taken in seconds["fastest"].items():
        ratio = float(np.median(copy / np.array(taken)))
        slow = seconds["numpy"].get(name)
        numpy = f"{4e-9 * elements / np.median(slow):.2f}" if slow else ""
        rows.append([name, f"{4e-9 * elements / np.median(taken):.2f}", f"{ratio:.2f}", numpy])
    columns = ("kernel", "GB/s read", "of a copy", "GB/s in NumPy")
    return Results(f"{elements:,} elements of float32, one core", columns, rows)


def wire(specs: list[str], ranks: int = 4, elements: int = 1 << 20) -> list[dict[str, object]]:
    """Compare bytes in theory with bytes that the exchanges count, among some ranks."""
    side = int(elements**0.5)
    unit = Unit.single("x", (side, side))
    rows: list[dict[str, object]] = []
    for spec in specs:
        scheme = make(spec)

        def main(comm, scheme: Scheme = scheme) -> int:  # type: ignore[no-untyped-def]
            exchange = make_exchange(comm, unit, scheme)
            bucket = np.random.default_rng(comm.rank).standard_normal(unit.size, np.float32)
            return exchange.run(bucket, 1 << 20)

        sent = max(run_threads(ranks, main))
        # What one rank contributes: a gather sends it to each of the others, a ring, or two
        # phases, send 2 (n - 1) / n of it.
        gathered = isinstance(scheme.compressor, Sparsifier)
        payload = sent / (ranks - 1) if gathered else sent * ranks / (2 * (ranks - 1))
        theory = scheme.compressor.payload_bytes(unit, ranks)
        rows.append(
            {
                "compression": spec,
                "theory": 4 * unit.size / theory,
                "sent": 4 * unit.size / payload,
                "part": theory / payload,
            }
        )
    return rows


def wire_table(rows: list[dict[str, object]]) -> Results:
    """Write the wire ratios."""
    cells = [
        [
            str(row["compression"]),
            f"{row['theory']:.2f}",
            f"{row['sent']:.2f}",
            f"{100 * row['part']:.1f} %",  # type: ignore[operator]
        ]
        for row in rows
    ]
    columns = ("compression", "theory", "sent", "of theory")
    return Results("float32 bytes over bytes sent, 4 ranks, 1024 x 1024", columns, cells)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--numpy-repeats", type=int, default=1, help="0: leave NumPy's kernels out")
    parser.add_argument(
        "--scheme", action="append", metavar="SPEC", help="instead of all; may be repeated"
    )
    parser.add_argument("--wire", action="store_true")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    specs = options.scheme or [*names(), *VARIANTS]
    torch.set_num_threads(1)
    found: object
    if options.wire:
        found = rows = wire(specs)
        results = wire_table(rows)
    else:
        found = seconds = measure(options.elements, options.repeats, options.numpy_repeats, specs)
        results = table(seconds, options.elements)
    show(results)
    if options.markdown:
        options.markdown.write_text(markdown(results))
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
