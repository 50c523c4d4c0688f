"""What codecs on tensors share: many shards in one go, and their bytes on the host.

A GPU wants few large operations, so the shards of a bucket are encoded together; each then
gets its part of the numbers of all blocks and of the codes of all values.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from hpc_dl.arrays import torch_view
from hpc_dl.compress.base import Bytes
from hpc_dl.compress.kernels.lanes import LANES
from hpc_dl.compress.random import GOLDEN, MIX

_MASK = 0xFFFFFFFF


class Piece(NamedTuple):
    """A part of a flat tensor that has an encoding of its own."""

    start: int
    stop: int
    key: int = 0


class Encoded(NamedTuple):
    """What a flat tensor becomes."""

    numbers: torch.Tensor
    """float32, of shape (numbers of a block, blocks)."""
    codes: torch.Tensor
    """Bytes."""


class DeviceCodec(ABC):
    """Does for tensors what a ``Codec`` does for arrays, to the same bytes.

    A payload is the blocks' numbers, kind by kind, and then the codes.
    """

    #: Values that share their numbers; a multiple of 8. Pieces begin at multiples of it.
    block: int
    #: Bits of a code.
    width: int
    #: Float32 numbers for each block.
    numbers: int = 0
    #: Whether random numbers are needed.
    random: bool = False
    #: Values that share a random number.
    drawn_for: int = 1

    @abstractmethod
    def _encode(self, values: torch.Tensor, draws: torch.Tensor) -> Encoded:
        """Encode; ``draws`` holds 24 random bits for each value or group of them, or is empty."""

    @abstractmethod
    def _decode(self, encoded: Encoded, size: int) -> torch.Tensor:
        """Return ``size`` values."""

    def encode(
        self, x: torch.Tensor, left: torch.Tensor | None, pieces: Sequence[Piece]
    ) -> list[Bytes]:
        """Encode ``x``, or ``x + left``, and ``left`` becomes the rest.

        Args:
            pieces: all of ``x``, in order; none is empty.

        Returns:
            The payloads of the pieces.
        """
        values = x if left is None else left.add_(x)
        draws = _draws(pieces, self.drawn_for, x.device) if self.random else x.new_empty(0)
        encoded = self._encode(values, draws)
        if left is not None:
            left.sub_(self._decode(encoded, len(left)))
        return list(self._cut(encoded, pieces))

    def decode(
        self, payloads: Sequence[Bytes], sizes: Sequence[int], out: torch.Tensor, add: bool
    ) -> None:
        """Write or add what the pieces hold that ``out`` consists of, each of its size."""
        values = self._decode(self._join(payloads, sizes, out.device), len(out))
        if add:
            out.add_(values)
        else:
            out.copy_(values)

    def _cut(self, encoded: Encoded, pieces: Sequence[Piece]) -> Iterator[Bytes]:
        """Copy to the host, all at once, and divide."""
        header = encoded.numbers.numel() * 4
        both = torch.cat([encoded.numbers.reshape(-1).view(torch.uint8), encoded.codes])
        host: Bytes = both.cpu().numpy()
        numbers, codes = host[:header], host[header:]
        rows = numbers.reshape(self.numbers, header // max(1, self.numbers))
        for piece in pieces:
            first, last = piece.start // self.block, -(-piece.stop // self.block)
            a, b = piece.start * self.width // 8, -(-piece.stop * self.width // 8)
            yield np.concatenate([*(row[4 * first : 4 * last] for row in rows), codes[a:b]])

    def _join(
        self, payloads: Sequence[Bytes], sizes: Sequence[int], device: torch.device
    ) -> Encoded:
        """Put payloads together and copy them to the device, all at once."""
        parts: list[Bytes] = []
        rows = [4 * -(-size // self.block) for size in sizes]
        for kind in range(self.numbers):
            parts += [
                payload[kind * row : (kind + 1) * row]
                for payload, row in zip(payloads, rows, strict=True)
            ]
        header = self.numbers * sum(rows)
        parts += [
            payload[self.numbers * row :] for payload, row in zip(payloads, rows, strict=True)
        ]
        whole = torch_view(np.concatenate(parts)).to(device)
        numbers = whole[:header].view(torch.float32).view(self.numbers, sum(rows) // 4)
        return Encoded(numbers, whole[header:])


def rows_of(x: torch.Tensor, block: int) -> list[torch.Tensor]:
    """View the whole blocks as rows of a matrix, and the last, shorter block as another."""
    whole = len(x) // block * block
    parts = [x[:whole].view(-1, block), x[whole:].view(1, -1)]
    return [part for part in parts if part.numel()]


def spread(numbers: torch.Tensor, block: int, size: int) -> torch.Tensor:
    """Repeat each block's number for each of its values."""
    return numbers[:, None].expand(-1, block).reshape(-1)[:size]


def quotient(a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    """Divide, rounding once; numbers are such as float32 holds exactly.

    Where one side is a number, torch multiplies by a reciprocal, which rounds twice.
    """
    if not isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        a = torch.full_like(b, a)
    if not isinstance(b, torch.Tensor):
        b = torch.full_like(a, b)
    return torch.div(a, b)


def root(x: torch.Tensor) -> torch.Tensor:
    """Take the square root of float32, rounded once.

    On the CPU torch takes it from a library that is a bit off. In float64 such an error does no
    harm: the root of a float32 is nowhere so near to the middle of two others.
    """
    return x.double().sqrt().float()


def sum_in_lanes(rows: torch.Tensor) -> torch.Tensor:
    """Sum rows of values of which none is below zero, in the order of ``kernels.lanes``.

    The reductions of torch have an order of their own, another one on each device; an operation
    for each term has none.
    """
    short = -rows.shape[1] % LANES
    if short:
        rows = torch.nn.functional.pad(rows, (0, short))
    rows = rows.view(len(rows), -1, LANES)
    lanes = rows[:, 0].clone()
    for i in range(1, rows.shape[1]):
        lanes += rows[:, i]
    while lanes.shape[1] > 1:
        fold = lanes.shape[1] // 2
        lanes = lanes[:, :fold] + lanes[:, fold:]
    return lanes[:, 0]


def _draws(pieces: Sequence[Piece], shared_by: int, device: torch.device) -> torch.Tensor:
    """Return 24 random bits for so many values: those of ``compress.random`` for a piece's key.

    In int64, as torch has few operations on uint32; no product is beyond that.
    """
    bounds = [(p.start // shared_by, -(-p.stop // shared_by), p.key) for p in pieces]
    table = np.array([(a, key, b - a) for a, b, key in bounds], np.int64).T.copy()
    starts, keys, sizes = torch.from_numpy(table).to(device)
    count = bounds[-1][1]
    if len(pieces) > 1:
        starts = torch.repeat_interleave(starts, sizes, output_size=count)
        keys = torch.repeat_interleave(keys, sizes, output_size=count)
    h = torch.arange(count, device=device)
    h.sub_(starts).mul_(int(GOLDEN)).add_(keys).bitwise_and_(_MASK)
    for _ in range(2):
        h.bitwise_xor_(h >> 16).mul_(int(MIX)).bitwise_and_(_MASK)
    return h.bitwise_xor_(h >> 16).bitwise_right_shift_(8)
