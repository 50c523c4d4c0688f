"""Entries of largest magnitude of a tensor, as ``compress.topk`` selects them."""

import functools
from collections.abc import Callable

import numpy as np
import torch

from hpc_dl.compress.base import Compressor, Sparse, Step
from hpc_dl.compress.dgc import Dgc
from hpc_dl.compress.threshold import Threshold
from hpc_dl.compress.topk import SAMPLE, TINY, TopK, count_of, is_sampled, offset_of, with_margin

#: (x, left, step): select from ``x``, or from ``x + left``, which becomes the rest. What is
#: selected is on the host.
Select = Callable[[torch.Tensor, torch.Tensor | None, Step], Sparse]

_Entries = tuple[torch.Tensor, torch.Tensor]


def select_of(compressor: Compressor) -> Select | None:
    """Return what selects the same entries of tensors, if there is such a function."""
    kind = type(compressor)
    if isinstance(compressor, TopK) and kind is TopK:
        return functools.partial(_top, compressor)
    if isinstance(compressor, Dgc) and kind is Dgc and not compressor.clip:
        # The norm that is clipped is a sum, whose order is that of a library on the host.
        return functools.partial(_dgc, compressor)
    if isinstance(compressor, Threshold) and kind is Threshold:
        return functools.partial(_threshold, compressor)
    return None


def _top(compressor: TopK, x: torch.Tensor, left: torch.Tensor | None, step: Step) -> Sparse:
    return largest(x, left, count_of(len(x), compressor.ratio), compressor.sample, step)


def _dgc(compressor: Dgc, x: torch.Tensor, left: torch.Tensor | None, step: Step) -> Sparse:
    return largest(x, left, compressor.count(len(x), step), True, step)


def _threshold(
    compressor: Threshold, x: torch.Tensor, left: torch.Tensor | None, step: Step
) -> Sparse:
    return _on_host(_above(_whole(x, left), left, compressor.value, len(x)))


def largest(
    x: torch.Tensor, left: torch.Tensor | None, count: int, sample: bool, step: Step
) -> Sparse:
    """Select the ``count`` largest entries; see ``topk.largest``."""
    x = _whole(x, left)
    if sample and is_sampled(len(x), count):
        wanted = with_margin(len(x), count)
        looked_at = x[offset_of(len(x), step) :: len(x) // SAMPLE].abs()
        rank = max(1, round(len(looked_at) * wanted / len(x)))
        indices, values = _above(x, left, float(_nth(looked_at, rank)), 2 * wanted)
        if len(values) > count:
            kept = _largest_mask(values.abs(), count)
            if left is not None:
                left[indices[~kept]] = values[~kept]
            indices, values = indices[kept], values[kept]
    else:
        magnitudes = x.abs()
        indices = (_largest_mask(magnitudes, count) & (magnitudes > 0)).nonzero()[:, 0]
        values = x[indices]
        if left is not None:
            left[indices] = 0
    return _on_host((indices, values))


def _whole(x: torch.Tensor, left: torch.Tensor | None) -> torch.Tensor:
    return x if left is None else left.add_(x)


def _above(x: torch.Tensor, left: torch.Tensor | None, threshold: float, room: int) -> _Entries:
    """Select entries of at least a threshold, the first ``room`` of them."""
    bound = float(np.float32(max(threshold, TINY)))
    indices = (x.abs() >= bound).nonzero()[:room, 0]
    values = x[indices]
    if left is not None:
        left[indices] = 0
    return indices, values


def _nth(magnitudes: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the ``rank``-th largest."""
    return magnitudes.topk(rank, sorted=False).values.amin()


def _largest_mask(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """Tell which are the ``count`` largest; of equal ones those that come first."""
    if count >= len(magnitudes):
        return torch.ones_like(magnitudes, dtype=torch.bool)
    threshold = _nth(magnitudes, count)
    kept = magnitudes >= threshold
    equal = (magnitudes == threshold).nonzero()[:, 0]
    surplus = int(kept.sum()) - count
    kept[equal[len(equal) - surplus :]] = False
    return kept


def _on_host(entries: _Entries) -> Sparse:
    """Copy entries to the host, in one go."""
    indices, values = entries
    both = torch.stack([indices.to(torch.int32), values.view(torch.int32)]).cpu().numpy()
    return Sparse(both[0], both[1].view(np.float32))
