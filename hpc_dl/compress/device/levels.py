"""Evenly spaced levels; see ``kernels.levels``."""

import torch

from hpc_dl.compress.blocks import Levels
from hpc_dl.compress.device.codec import (
    DeviceCodec,
    Encoded,
    quotient,
    root,
    rows_of,
    sum_in_lanes,
)
from hpc_dl.compress.kernels.levels import (
    L2,
    LARGEST,
    LIMIT,
    MIN_MAX,
    TINY,
)

_LIMIT, _LARGEST, _TINY = float(LIMIT), float(LARGEST), float(TINY)
_MAGNITUDE = 0x7FFFFFFF


class DeviceLevels(DeviceCodec):
    """Codes between the ends of each block."""

    def __init__(self, codec: Levels):
        self.block, self.width, self.random = codec.block, codec.width, codec.random
        self.numbers = 1 + codec.has_middle
        self._kind, self._has_middle = codec.kind, codec.has_middle
        self._per = 8 // codec.width
        self._half = ((1 << codec.width) - 1 - (codec.kind != MIN_MAX)) / 2

    def _encode(self, values: torch.Tensor, draws: torch.Tensor) -> Encoded:
        middles, steps, codes = [], [], []
        drawn = draws.view(-1)
        for rows in rows_of(values, self.block):
            count = rows.numel()
            middle, step, reach = self._range(rows)
            inverse = torch.where(step > _TINY, quotient(1.0, step), 0.0)
            step = torch.where(step > _TINY, step, 0.0)
            v = (rows - middle[:, None]).mul_(inverse[:, None]).add_(self._half)
            ends = self._half - reach[:, None], self._half + reach[:, None]
            v = torch.minimum(torch.maximum(v, ends[0]), ends[1])
            floor = v.floor()
            if self.random:
                bound = drawn[:count].view_as(rows).to(torch.float32).mul_(2.0**-24)
                drawn = drawn[count:]
                up = bound < v.sub_(floor)
            else:
                up = v.sub_(floor) > 0.5
            coded = floor.to(torch.uint8).add_(up)
            middles.append(middle)
            steps.append(step)
            codes.append(self._pack(coded))
        kinds = [middles, steps] if self._has_middle else [steps]
        return Encoded(torch.stack([torch.cat(kind) for kind in kinds]), torch.cat(codes))

    def _range(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return each block's middle, step, and how many steps are in reach on both sides."""
        # As integers in the same order, since torch does not say which of two zeros is less.
        places = _order(rows.view(torch.int32))
        least = _order(places.amin(1)).view(torch.float32).clamp(min=-_LIMIT)
        largest = _order(places.amax(1)).view(torch.float32).clamp(max=_LIMIT)
        if self._kind == MIN_MAX:
            middle = largest * 0.5 + least * 0.5
            step = quotient(largest * 0.5 - least * 0.5, self._half)
            return middle, step, torch.full_like(step, self._half)
        largest = torch.maximum(largest, -least)
        step = quotient(largest, self._half)
        reach = torch.full_like(step, self._half)
        if self._kind == L2:
            scaled = rows * quotient(1.0, largest)[:, None]
            ratio = quotient(root(sum_in_lanes(scaled * scaled)), self._half)
            beyond = (ratio > 1) & (largest > quotient(_LIMIT, ratio))
            wide = torch.where(beyond, _LIMIT, largest * ratio)
            within = quotient(_LARGEST, wide).floor().clamp(max=self._half)
            reach = torch.where(step > _TINY, within, reach)
            step = torch.where(step > _TINY, wide, step)
        return torch.zeros_like(step), step, reach

    def _pack(self, coded: torch.Tensor) -> torch.Tensor:
        short = -coded.shape[1] % self._per
        if short:
            coded = torch.nn.functional.pad(coded, (0, short))
        pieces = coded.view(len(coded), self._per, -1)
        packed = pieces[:, 0]
        for k in range(1, self._per):
            packed = packed | (pieces[:, k] << (k * self.width))
        return packed.reshape(-1)

    def _decode(self, encoded: Encoded, size: int) -> torch.Tensor:
        whole = size // self.block
        values = []
        for blocks, count in ((slice(whole), self.block), (slice(whole, None), size % self.block)):
            steps = encoded.numbers[-1, blocks]
            if count == 0 or len(steps) == 0:
                continue
            start = 0 if blocks.start is None else whole * self.block // self._per
            part = -(-count // self._per)
            packed = encoded.codes[start : start + len(steps) * part].view(-1, 1, part)
            shifts = torch.arange(self._per, device=packed.device).to(torch.uint8) * self.width
            coded = (packed >> shifts[:, None]) & ((1 << self.width) - 1)
            decoded = coded.view(len(steps), -1)[:, :count].to(torch.float32).sub_(self._half)
            decoded.mul_(steps[:, None])
            # Also without a middle: a zero that is added takes the sign from another.
            decoded.add_(encoded.numbers[0, blocks, None] if self._has_middle else 0.0)
            values.append(decoded.view(-1))
        return torch.cat(values)


def _order(words: torch.Tensor) -> torch.Tensor:
    """Map floats' bits to integers in the same order, and back."""
    return words ^ ((words >> 31) & _MAGNITUDE)
