"""1-bit Adam and 1-bit LAMB for Keras, on both backends; ``hpc_dl.torch.onebit`` says more.

Whether the variance is frozen is decided by the optimizer's own count of steps, within the
graph, and that count is what the reduction goes by.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from hpc_dl.compress import Policy
from hpc_dl.compress.shared_momentum import shared_momentum
from hpc_dl.errors import OptionError
from hpc_dl.keras.backend import dense, to_numpy
from hpc_dl.world.local import native


class SharedMomentum(keras.optimizers.Optimizer):
    """What both have in common; without ``DistributedOptimizer`` it takes the momentum itself."""

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        *,
        freeze_step: int,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        floor: float = 0.1,
        compression: Any = "onebit",
        **options: Any,
    ):
        """Check the options."""
        super().__init__(learning_rate=learning_rate, **options)
        self.floor = floor
        self.freeze_step = freeze_step
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        if not (0 <= beta_2 < 1 and floor >= 0):
            raise OptionError(f"beta_2={beta_2}, floor={floor}; give 0 <= beta_2 < 1, floor >= 0")
        if not isinstance(compression, str | Mapping):
            raise OptionError(
                f"compression={compression!r}: give a name such as 'onebit', name:key=value or a "
                "mapping, so that it can be saved with the model"
            )
        self.compression = compression if isinstance(compression, str) else dict(compression)
        self._received: frozenset[int] = frozenset()
        self.policy()

    def policy(self) -> Policy:
        """Say how ``DistributedOptimizer`` is to average gradients.

        Raises:
            OptionError: a bad option.
        """
        return shared_momentum(self.compression, self.beta_1, self.freeze_step)

    def receive_momentum(self, variables: Sequence[Any]) -> None:
        """Take for momentum, after ``freeze_step``, what comes as the gradients of these."""
        self._received = frozenset(id(native(variable)) for variable in variables)

    def momenta(self, variables: Sequence[Any]) -> list[Any]:
        """Return the momentum of each variable as an array; none before the first step."""
        if not self.built or not int(to_numpy(self.iterations)):
            return []
        known = {id(native(v)): m for v, m in zip(self._trainable_variables, self._m, strict=True)}
        return [to_numpy(known[id(native(variable))]) for variable in variables]

    def build(self, variables: Sequence[Any]) -> None:
        """Make momentum and variance."""
        if not self.built:
            super().build(variables)
            self._m, self._v = self.add_optimizer_variables(variables, ["momentum", "velocity"])

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Change one variable."""
        index, kind = self._get_variable_index(variable), variable.dtype
        m, v, before = self._m[index], self._v[index], ops.convert_to_tensor(self._m[index])
        gradient = ops.cast(dense(gradient), kind)
        frozen = ops.greater_equal(self.iterations, self.freeze_step)
        momentum = before + (gradient - before) * (1 - self.beta_1)
        if id(native(variable)) in self._received:
            momentum = ops.where(frozen, gradient, momentum)
        variance = ops.where(frozen, v, v + (ops.square(gradient) - v) * (1 - self.beta_2))
        self.assign(m, momentum)
        self.assign(v, variance)

        seen = ops.minimum(self.iterations + 1, self.freeze_step)
        deviation, eps = self._deviation(variance, seen)
        # Compression gives entries of little momentum that of their neighbours; what has no
        # deviation to divide that by stays as it is.
        least = self.floor * ops.sqrt(ops.mean(ops.square(deviation)))
        floored = ops.where(frozen, ops.maximum(deviation, least), deviation)
        unbiased = momentum / _bias(self.beta_1, self.iterations + 1, kind)
        direction = ops.where(floored == 0, 0, unbiased / (floored + eps))
        deviation = deviation + eps
        scale = self._scale(index, variable, direction, (before, momentum), variance, deviation)
        self.assign_sub(variable, ops.cast(learning_rate, kind) * scale * direction)

    def _deviation(self, variance: Any, steps: Any) -> tuple[Any, Any]:
        """Return the root of a running average of squares, without the bias of its beginning.

        And what is added to it, of which Keras' Adam takes away that bias too.
        """
        bias = ops.sqrt(_bias(self.beta_2, steps, variance.dtype))
        return ops.sqrt(variance) / bias, self.epsilon / bias

    def _scale(
        self,
        index: int,
        variable: Any,
        direction: Any,
        momenta: tuple[Any, Any],
        variance: Any,
        deviation: Any,
    ) -> Any:
        """Return a factor on the step of a variable."""
        return 1

    def get_config(self) -> dict[str, Any]:
        """Return the options."""
        return {
            **super().get_config(),
            "freeze_step": self.freeze_step,
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "floor": self.floor,
            "compression": self.compression,
        }


@keras.saving.register_keras_serializable(package="hpc_dl")
class OneBitAdam(SharedMomentum):
    """Adam whose ranks average compressed momentum after ``freeze_step`` steps.

    Until then it is Adam. Then the variance stays as it is. Wrap it in
    ``DistributedOptimizer``, which then takes no other compression. Tang et al., "1-bit
    Adam", ICML 2021.

    Args:
        learning_rate: a number or a schedule.
        freeze_step: steps of the warm-up; the paper takes 15 to 20 % of all, at least until the
            learning rate is at its largest.
        beta_1: of the momentum.
        beta_2: of the variance.
        epsilon: added to the deviation.
        floor: the least deviation after the warm-up, in root mean squares of those of the same
            variable; 0 is the paper's, which may diverge where inputs are often zero.
        compression: of the momentum: a spec string or a mapping.
        options: of all Keras optimizers, such as ``weight_decay``.

    Raises:
        OptionError: a bad option.

    >>> import hpc_dl.keras as hvd
    >>> hvd.init()
    >>> optimizer = hvd.DistributedOptimizer(hvd.OneBitAdam(1e-3, freeze_step=100))
    >>> hvd.shutdown()
    """

    def __init__(self, *args: Any, name: str = "onebit_adam", **options: Any):
        """Check the options."""
        super().__init__(*args, name=name, **options)


@keras.saving.register_keras_serializable(package="hpc_dl")
class OneBitLamb(SharedMomentum):
    """LAMB whose ranks average compressed momentum after ``freeze_step`` steps.

    In the warm-up each variable's step is scaled by its trust ratio. Then the ratio's running
    average stays, times the largest ratio of the deviation that was frozen and the one that
    goes on, which is estimated from two momenta. Li et al., "1-bit LAMB", 2021. Weight decay
    is that of all Keras optimizers, outside of the trust ratio.

    Args:
        learning_rate, freeze_step, beta_1, beta_2, epsilon, floor, compression, options: as
            for ``OneBitAdam``.
        ratio_range: the least and the largest trust ratio.
        ratio_beta: of the running average of trust ratios.
        factor_range: the least and the largest factor of the frozen ratio.
        factor_change: the part by which that factor may change in one step.

    Raises:
        OptionError: a bad option.
    """

    def __init__(
        self,
        *args: Any,
        ratio_range: Sequence[float] = (0.01, 10.0),
        ratio_beta: float = 0.9,
        factor_range: Sequence[float] = (0.5, 4.0),
        factor_change: float = 0.1,
        name: str = "onebit_lamb",
        **options: Any,
    ):
        """Check the options."""
        super().__init__(*args, name=name, **options)
        self.ratio_range, self.ratio_beta = tuple(ratio_range), ratio_beta
        self.factor_range, self.factor_change = tuple(factor_range), factor_change

    def build(self, variables: Sequence[Any]) -> None:
        """Make momentum, variances, ratios and factors."""
        if not self.built:
            super().build(variables)
            self._fresh = self.add_optimizer_variables(variables, "fresh_velocity")
            self._ratios = [self._number(v, "ratio") for v in variables]
            self._factors = [self._number(v, "factor") for v in variables]

    def _number(self, variable: Any, name: str) -> Any:
        return self.add_variable((), initializer="ones", dtype=variable.dtype, name=name)

    def _scale(
        self,
        index: int,
        variable: Any,
        direction: Any,
        momenta: tuple[Any, Any],
        variance: Any,
        deviation: Any,
    ) -> Any:
        frozen = ops.greater_equal(self.iterations, self.freeze_step)
        average, last = self._ratios[index], self._factors[index]
        trust = _trust(variable, direction, self.ratio_range)
        moved = average + (trust - average) * (1 - self.ratio_beta)
        moved = ops.where(ops.equal(self.iterations, 0), trust, moved)
        frozen_ratio = ops.where(frozen, average, moved)
        self.assign(average, frozen_ratio)

        before, now = momenta
        gradient = (now - self.beta_1 * before) / (1 - self.beta_1)
        fresh = self._fresh[index]
        estimate = fresh + (1 - self.beta_2) * (ops.square(gradient) - fresh)
        estimate = ops.where(frozen, estimate, variance)
        self.assign(fresh, estimate)
        fresh_deviation, eps = self._deviation(estimate, self.iterations + 1)
        ratios = deviation / (fresh_deviation + eps)
        change = self.factor_change
        factor = ops.max(ops.where(variance == 0, 0, ratios))
        factor = ops.clip(factor, last * (1 - change), last * (1 + change))
        factor = ops.clip(factor, *self.factor_range)
        factor = ops.where(frozen, factor, ops.ones_like(factor))
        self.assign(last, factor)
        return ops.where(frozen, frozen_ratio * factor, trust)

    def get_config(self) -> dict[str, Any]:
        """Return the options."""
        return {
            **super().get_config(),
            "ratio_range": list(self.ratio_range),
            "ratio_beta": self.ratio_beta,
            "factor_range": list(self.factor_range),
            "factor_change": self.factor_change,
        }


def _bias(beta: float, steps: Any, kind: Any) -> Any:
    """Return by what part a running average that began with 0 has filled up."""
    return 1 - ops.power(ops.cast(beta, kind), ops.cast(steps, kind))


def _trust(variable: Any, direction: Any, bounds: Sequence[float]) -> Any:
    """Return LAMB's trust ratio, 1 where there is none."""
    own, change = (ops.sqrt(ops.sum(ops.square(x))) for x in (variable, direction))
    there = ops.logical_and(own > 0, change > 0)
    ratio = ops.clip(own / ops.where(there, change, ops.ones_like(change)), *bounds)
    return ops.where(there, ratio, ops.ones_like(ratio))
