"""Make a Keras optimizer combine gradients over the ranks before it applies them.

Keras 3 trains by ``optimizer.apply(gradients, variables)``, from ``fit``, from custom loops
and from other optimizers. So ``apply`` of the one optimizer object is wrapped; its class and
configuration stay what they were, and what is saved loads wherever Keras does.
"""

import sys
import warnings
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import keras

from hpc_dl.comm import Op
from hpc_dl.compress import pairs
from hpc_dl.errors import OptionError, UnsupportedError
from hpc_dl.keras.accumulation import Accumulator
from hpc_dl.keras.backend import adapter, as_written, compressor, is_sparse, is_traced
from hpc_dl.keras.combination import Combination, names_of
from hpc_dl.keras.onebit import SharedMomentum
from hpc_dl.world import ProcessSet, global_process_set
from hpc_dl.world.gradients import Gradient, GradientOptions, gradient_options
from hpc_dl.world.local import LocalVariables, local_weights
from hpc_dl.world.pairing import check_shared, fitting


class Passes(NamedTuple):
    """How many backward passes make one step, and what becomes of their gradients."""

    number: int
    average: bool


#: What a distributed optimizer has beside its own attributes.
_ADDED = (
    "apply",
    "register_local_var",
    "traffic",
    "compression_state",
    "load_compression_state",
    "report_loss",
    "distribution",
)


class Distribution:
    """What makes one optimizer distributed; it is the optimizer's attribute ``distribution``."""

    def __init__(
        self,
        optimizer: Any,
        options: GradientOptions,
        passes: Passes,
        local: LocalVariables,
        label: str,
    ):
        """Wrap ``optimizer.apply``."""
        _check_momentum(optimizer)
        self._optimizer, self._options, self._passes = optimizer, options, passes
        self._local, self._label = local, label
        self._own_apply = optimizer.apply
        self._accumulator: Accumulator | None = None
        self._combination = combination = Combination(optimizer, options, label)
        self._caller_is_known = False
        optimizer.apply = self.apply
        optimizer.register_local_var = local.add
        optimizer.traffic = combination.traffic
        optimizer.compression_state = combination.compression_state
        optimizer.load_compression_state = combination.load_compression_state
        optimizer.report_loss = combination.report_loss
        optimizer.distribution = self

    def apply(self, grads: Sequence[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Combine gradients over the ranks, then let the optimizer apply them.

        Args:
            grads: tensors or None, one for each variable.
            trainable_variables: by default those the optimizer was built with.

        Raises:
            MismatchError: on all ranks, if they have different variables.
            ReplicaDivergenceError: on all ranks, if the values of their variables differ.
            OptionError: with backward_passes_per_step, other variables than before.
            UnsupportedError: called by a LossScaleOptimizer around this optimizer.
        """
        self._check_caller(sys._getframe(1))
        optimizer, gradients = self._optimizer, list(grads)
        if not gradients:
            return
        if trainable_variables is None:
            self._own_check(gradients)
            variables = list(optimizer._trainable_variables)
        else:
            variables = list(trainable_variables)
        if self._passes.number == 1:
            self._step(gradients, variables)
            return
        if not optimizer.built:
            with keras.name_scope(optimizer.name):
                optimizer.build(variables)
        if self._accumulator is None:
            self._accumulator = Accumulator(variables, *self._passes)
        self._accumulator.check(variables)
        self._accumulator.add(gradients, lambda sums: self._step(sums, variables))

    def move_to(self, optimizer: Any) -> "Distribution":
        """Stop wrapping this optimizer and wrap another one alike."""
        for name in _ADDED:
            delattr(self._optimizer, name)
        moved = Distribution(optimizer, self._options, self._passes, self._local, self._label)
        moved._combination.load_compression_state(self._combination.compression_state())
        return moved

    # --- one step -------------------------------------------------------------------

    def _step(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        self._own_apply(self._combined(gradients, variables), variables)

    def _combined(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        names = names_of(variables)
        flat = [Gradient(*entry) for entry in zip(names, gradients, variables, strict=True)]
        local = self._local
        results = {
            g.name: local.scaled(g.value) if g.source in local else g.value
            for g in flat
            if g.value is not None
        }
        shared = [g for g in flat if g.source not in local]
        if isinstance(self._optimizer, SharedMomentum):
            self._check_dense(shared)
        if shared and self._options.combines:
            reduced = as_written(self._combination.combine)(shared)
            results.update(zip([g.name for g in shared], reduced, strict=True))
        elif isinstance(self._optimizer, SharedMomentum):
            self._optimizer.receive_momentum([])  # there may have been other ranks before
        return [results.get(name) for name in names]

    # --- checks ---------------------------------------------------------------------

    def _check_dense(self, gradients: Sequence[Gradient]) -> None:
        sparse = next((g.name for g in gradients if is_sparse(g.value)), None)
        if sparse is not None and not self._options.sparse_as_dense:
            raise UnsupportedError(
                f"{type(self._optimizer).__name__} got a sparse gradient ({sparse!r}), whose "
                "momentum is dense all the same; give DistributedOptimizer sparse_as_dense=True"
            )

    def _own_check(self, gradients: Sequence[Any]) -> None:
        optimizer = self._optimizer
        if not optimizer.built or len(gradients) != len(optimizer._trainable_variables):
            self._own_apply(gradients)  # Keras explains what is missing.

    def _check_caller(self, frame: FrameType | None) -> None:
        """Refuse to be the inner optimizer of Keras' loss scaling.

        It looks for overflow in this rank's gradients only, so the ranks would disagree
        whether to call this at all.
        """
        if self._caller_is_known and not is_traced():
            return
        self._caller_is_known = True
        while frame is not None:
            caller = frame.f_locals.get("self")
            if (
                isinstance(caller, keras.optimizers.LossScaleOptimizer)
                and caller.inner_optimizer is self._optimizer
            ):
                raise UnsupportedError(
                    "this DistributedOptimizer is inside a LossScaleOptimizer, which each rank "
                    "steps or skips by its own gradients. Wrap the other way round: "
                    "DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer)); with "
                    "model.fit() the callback BroadcastGlobalVariablesCallback does it for you"
                )
            frame = frame.f_back


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = adapter.Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Op = Op.AVERAGE,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    guard: bool = True,
) -> Any:
    """Make an optimizer apply gradients combined over the ranks; return it.

    Clipping, weight decay, loss scaling, moving averages and Keras' own gradient
    accumulation come after the combination, as for one rank with the whole batch.

    Args:
        optimizer: a Keras 3 optimizer. It is changed, and keeps its state.
        name: says whose gradients they are, in error messages.
        device_dense: accepted for Horovod's sake, like ``device_sparse``.
        compression: how gradients travel: a name such as ``"fp16"`` or ``"topk:ratio=0.01"``
            (``hpc-dl compress list`` shows all), a mapping, an object of ``hpc_dl.compress``,
            a list of rules (pattern, compression); or a class with ``compress`` and
            ``decompress`` as Horovod has them.
        sparse_as_dense: reduce sparse gradients (of embeddings) as dense ones instead of
            gathering rows.
        gradient_predivide_factor: with Average, divide by this before the sum and by the
            rest after it.
        op: Average, Sum, Min, Max or Product.
        backward_passes_per_step: add up the gradients of so many calls before they are
            combined and applied, once.
        average_aggregated_gradients: divide these sums by their number.
        num_groups: Horovod's older name of ``groups``.
        groups: a number of groups, or lists of variables, that travel together.
        process_set: combine over these ranks only.
        scale_local_gradients: divide the gradients of local variables
            (``optimizer.register_local_var``) by the number of ranks.
        guard: compare the variables of the ranks after the first steps and now and then.

    Raises:
        OptionError: no Keras 3 optimizer, one that is distributed already, or a bad option.

    >>> import keras, hpc_dl.keras as hvd
    >>> hvd.init()
    >>> optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    >>> type(optimizer) is type(keras.optimizers.SGD(0.1))
    True
    >>> hvd.shutdown()
    """
    _check_optimizer(optimizer)
    if backward_passes_per_step < 1:
        raise OptionError(f"backward_passes_per_step={backward_passes_per_step}; give 1 or more")
    if num_groups:
        warnings.warn("num_groups is now called groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    options = gradient_options(
        op,
        compressor(compression),
        gradient_predivide_factor,
        sparse_as_dense,
        groups,
        process_set,
        guard,
    )
    if options.op is Op.ADASUM:
        raise OptionError(
            "op=Adasum is not available for Keras optimizers (nor is it in Horovod); valid: "
            "average, sum, min, max, product. DistributedGradientTape takes it over Horovod"
        )
    if isinstance(optimizer, SharedMomentum):
        check_shared(
            type(optimizer).__name__, options.compression, options.op, gradient_predivide_factor
        )
        options = options._replace(compression=optimizer.policy())
    compression = fitting(_described(optimizer), options.compression)
    options = options._replace(compression=compression)
    process_set.included()  # fails here and now if init() is missing
    passes = Passes(backward_passes_per_step, average_aggregated_gradients)
    local = LocalVariables(process_set, scale_local_gradients)
    label = name or f"Distributed{type(optimizer).__name__}"
    Distribution(optimizer, options, passes, local, label)
    return optimizer


def PartialDistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: Any, *args: Any, local_layers: Any = None, **options: Any
) -> Any:
    """Like ``DistributedOptimizer``, but leave the gradients of some layers alone.

    Args:
        local_layers: built Keras layers, or one, that each rank trains by itself.
        options: of ``DistributedOptimizer``.

    Raises:
        OptionError: what is no layer, or has no variables yet.
    """
    layers = [] if local_layers is None else local_layers
    layers = list(layers) if isinstance(layers, list | tuple | set) else [layers]
    weights = [weight for layer in layers for weight in local_weights(layer)]
    wrapped = DistributedOptimizer(optimizer, *args, **options)
    for weight in weights:
        wrapped.register_local_var(weight)
    return wrapped


def is_distributed(optimizer: Any) -> bool:
    """Tell whether an optimizer combines gradients over the ranks."""
    return isinstance(getattr(optimizer, "distribution", None), Distribution)


def _described(optimizer: Any) -> pairs.Optimizer:
    """Say of an optimizer what a compression must fit."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    kinds = type(inner).__mro__
    shares = isinstance(inner, SharedMomentum)
    return pairs.Optimizer(
        type(inner).__name__,
        pairs.family_of(kind.__name__ for kind in kinds),
        float(getattr(inner, "momentum", 0) or 0),
        inner.beta_1 if shares else 0.0,
    )


def _check_momentum(optimizer: Any) -> None:
    """Refuse what would come between the steps of the reduction and of the optimizer."""
    inner = getattr(optimizer, "inner_optimizer", None)
    if isinstance(inner, SharedMomentum):
        raise OptionError(
            f"{type(inner).__name__} in a LossScaleOptimizer: the momentum that the ranks share "
            "would change with the scale; use the policy mixed_bfloat16, which needs none"
        )
    if isinstance(optimizer, SharedMomentum) and optimizer.gradient_accumulation_steps:
        raise OptionError(
            f"{type(optimizer).__name__} with gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps} would accumulate momentum; give "
            "DistributedOptimizer backward_passes_per_step instead"
        )


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise OptionError(
            f"got {type(optimizer).__module__}.{type(optimizer).__name__}; give a Keras 3 "
            "optimizer such as keras.optimizers.SGD(0.1). Optimizers of TensorFlow 1 and of "
            "tf_keras (Keras 2) are not served: use DistributedGradientTape with them"
        )
    if is_distributed(optimizer):
        raise OptionError("this optimizer is distributed already; wrap it once")
    inner = getattr(optimizer, "inner_optimizer", None)
    if is_distributed(inner):
        raise OptionError(
            "the optimizer inside this one is distributed already; wrap only the outer one: "
            "DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))"
        )
