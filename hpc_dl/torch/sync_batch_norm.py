"""Batch normalisation over the batches of all ranks."""

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hpc_dl.comm import Op
from hpc_dl.torch.allreduce import allreduce
from hpc_dl.world import ProcessSet, global_process_set, is_initialized


class SyncBatchNorm(_BatchNorm):
    """Normalise with mean and variance over the batches of all ranks.

    The same parameters and buffers as ``torch.nn.BatchNorm*d``. Each rank contributes its
    own number of samples, so batches may differ in size. Outside training, and with one
    rank, it does exactly what BatchNorm does.

    Input: (N, C, ...), N and the rest may differ between ranks, C must not.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_set: ProcessSet = global_process_set,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_set = process_set

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"SyncBatchNorm needs an input of 2 dimensions or more, got {input.dim()}"
            )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise ``input``."""
        self._check_input_dim(input)
        use_batch = self.training or self.running_mean is None
        if not use_batch or not is_initialized() or self.process_set.size() == 1:
            return super().forward(input)
        mean, variance, count = self._moments(input)
        if self.training and self.track_running_stats:
            self._track(mean.detach(), variance.detach(), count)
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale = torch.rsqrt(variance + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return (input * scale.view(shape) + shift.view(shape)).to(input.dtype)

    def _moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return mean and biased variance by channel, and the count, over all ranks.

        Two sums, of the values and then of the squared distances from the mean, because the
        difference of large squares would lose the variance in float32.
        """
        axes = [axis for axis in range(x.dim()) if axis != 1]
        wide = x.float() if x.dtype.itemsize < 4 else x
        count = wide.new_full((1,), x.numel() / x.shape[1])
        sums = torch.cat([wide.sum(axes), count])
        sums = allreduce(sums, op=Op.SUM, process_set=self.process_set)
        total = float(sums[-1].detach())
        mean = sums[:-1] / total
        shape = [1, -1] + [1] * (x.dim() - 2)
        squares = (wide - mean.view(shape)).square().sum(axes)
        variance = allreduce(squares, op=Op.SUM, process_set=self.process_set) / total
        return mean, variance, total

    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: float) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = self.momentum
        if factor is None:
            factor = 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)

    @classmethod
    def convert_sync_batchnorm(
        cls, module: Any, process_set: ProcessSet = global_process_set
    ) -> torch.nn.Module:
        """Return ``module`` with every ``BatchNorm*d`` inside replaced by this class."""
        if isinstance(module, _BatchNorm) and not isinstance(module, cls):
            new = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_set,
            )
            # The parameters themselves, so that an optimizer made before keeps training them.
            new._parameters.update(module._parameters)
            new._buffers.update(module._buffers)
            new.training = module.training
            return new
        for name, child in module.named_children():
            setattr(module, name, cls.convert_sync_batchnorm(child, process_set))
        result: torch.nn.Module = module
        return result
