"""Reduce lists of gradients of the torch backend."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hpc_dl.arrays import Layout, Parameter, host_view, torch_view
from hpc_dl.compress import Policy
from hpc_dl.compress.device import has_kernels
from hpc_dl.reduce import Traffic
from hpc_dl.reduce.build import DENSE
from hpc_dl.torch.compression import NoneCompressor
from hpc_dl.world import Group
from hpc_dl.world.gradients import Gradient, GradientOptions, group_names
from hpc_dl.world.reducers import Place, Reducers
from hpc_dl.world.replicas import ReplicaWatch


class GradientReduction:
    """Combines the gradients of one optimizer over the ranks, step after step."""

    def __init__(self, group: Group, options: GradientOptions, label: str):
        """Begin; the ranks agree on the gradients in the first step.

        Args:
            label: says whose gradients they are, in error messages.
        """
        self._options = options
        given = options.compression
        self._policy = given if isinstance(given, Policy) else DENSE
        self._compressor = NoneCompressor if isinstance(given, Policy) else given
        self.reducers = Reducers(group, label, options.op, options.predivide, self._policy)

    def __call__(
        self, gradients: Sequence[Gradient], watch: ReplicaWatch, number: Any = None
    ) -> list[Any]:
        """Return the combined gradients, None where there was none.

        They lie in the buckets, where the next step overwrites them.

        Args:
            number: of the optimizer's step, where it must be that of the compression.

        Raises:
            MismatchError: on all ranks, if they reduce different gradients.
            ReplicaDivergenceError: on all ranks, if their variables differ.
        """
        self.reducers.count(None if number is None else int(number))
        results: dict[str, Any] = {}
        present = [g for g in gradients if g.value is not None]
        for device in dict.fromkeys(g.value.device for g in present):
            self._reduce([g for g in present if g.value.device == device], device, results)
        if watch.due():
            watch.compare((g.name, host_view(_tensor(g.source).detach().cpu())) for g in gradients)
        return [results.get(g.name) for g in gradients]

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far."""
        return self.reducers.traffic()

    def _reduce(
        self, gradients: Sequence[Gradient], device: torch.device, results: dict[str, Any]
    ) -> None:
        names = [g.name for g in gradients]
        groups = group_names(self._options.groups, names, [g.source for g in gradients])
        pairs = [self._compressor.compress(self._prepared(g.value)) for g in gradients]
        sent = [tensor for tensor, _ in pairs]
        parameters = tuple(
            Parameter(name, tuple(t.shape), host_view(t.new_empty(0, device="cpu")).dtype)
            for name, t in zip(names, sent, strict=True)
        )
        on_host = device.type == "cpu" or not self._compresses_on_device()
        found = self.reducers.find(
            parameters, groups, device, None if on_host else lambda x: _buffers(x, device)
        )
        reducer, places = found.reducer, found.places
        for tensor, place in zip(sent, places, strict=True):
            _view(place).copy_(tensor.reshape(-1))
            reducer.ready(place.bucket)
        self.reducers.finish(reducer)
        for name, tensor, place, (_, context) in zip(names, sent, places, pairs, strict=True):
            combined = _view(place).view(tensor.shape)
            own = combined.to(tensor.device, tensor.dtype)
            results[name] = self._compressor.decompress(own, context)

    def _compresses_on_device(self) -> bool:
        """Tell whether all compressors work there; which ``auto`` chooses is not known."""
        rules = self._policy.rules
        return self._policy.auto is None and all(
            has_kernels(rule.scheme.compressor) for rule in rules
        )

    def _prepared(self, gradient: torch.Tensor) -> torch.Tensor:
        tensor = gradient.detach()
        if tensor.is_sparse:
            tensor = tensor.to_dense()
        return tensor if self._options.predivide == 1 else tensor / self._options.predivide


def _view(place: Place) -> torch.Tensor:
    tensor: torch.Tensor = (
        place.view if isinstance(place.view, torch.Tensor) else torch_view(place.view)
    )
    return tensor


def _buffers(layout: Layout, device: torch.device) -> list[torch.Tensor]:
    return [
        torch_view(np.empty(0, bucket.dtype)).new_zeros(bucket.size, device=device)
        for bucket in layout.buckets
    ]


def _tensor(variable: Any) -> torch.Tensor:
    """Return the torch parameter inside a Keras variable."""
    tensor: torch.Tensor = variable if isinstance(variable, torch.Tensor) else variable.value
    return tensor
