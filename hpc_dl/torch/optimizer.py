"""Wrap an optimizer so that each step uses gradients combined over the ranks."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hpc_dl.arrays import host_view
from hpc_dl.comm import Op
from hpc_dl.compress import Policy, pairs
from hpc_dl.errors import HpcDlError, OptionError
from hpc_dl.reduce import ReplicaGuard, Saved, Traffic
from hpc_dl.torch.adasum import AdasumReduction
from hpc_dl.torch.allreduce import allreduce
from hpc_dl.torch.compression import Compression, of_gradients, resolve
from hpc_dl.torch.gradients import GradientReduction, Options
from hpc_dl.torch.names import Named, check_names
from hpc_dl.torch.onebit import SharedMomentum
from hpc_dl.torch.unfused import UnfusedReduction
from hpc_dl.world import ProcessSet, current, global_process_set
from hpc_dl.world.compression import warn_of_unused
from hpc_dl.world.gradients import gradient_options, group_names
from hpc_dl.world.pairing import check_shared, fitting

log = logging.getLogger("hpc_dl")

Reduction = GradientReduction | UnfusedReduction | AdasumReduction


class _Distributed(torch.optim.Optimizer):
    """What a wrapped optimizer does differently; mixed into its class."""

    _reduction: Reduction | None
    _guard: ReplicaGuard
    _named: Named
    _remake: Callable[[Named], Reduction | None]
    _check_fit: Callable[[float], None]
    _passes: int
    _average_loss: Callable[[torch.Tensor], torch.Tensor]
    _wait_in_step: bool
    _synchronized: bool

    def synchronize(self) -> None:
        """Reduce all gradients now, so that they can be clipped or inspected before ``step``."""
        if self._reduction is not None:
            self._reduction.finish()
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Keep ``step`` from reducing again after ``synchronize``."""
        self._wait_in_step = False
        try:
            yield
        finally:
            self._wait_in_step = True

    def step(self, closure: Any = None) -> Any:
        """Reduce the gradients, then take the optimizer's own step.

        Args:
            closure: recomputes the loss; its gradients are reduced each time it is called.
        """
        if closure is not None:
            result = self._own_step(self._reducing(closure))
        else:
            if self._wait_in_step:
                self._reduce_in_step()
            result = self._own_step(None)
        self._synchronized = False
        self._guard.after_step()
        return result

    # torch wraps `step` to run the hooks of the optimizer, and the own step is wrapped already.
    step.hooked = True  # type: ignore[attr-defined]

    def _reduce_in_step(self) -> None:
        if self._synchronized:
            warnings.warn(
                "step() reduces gradients that synchronize() has reduced already; write "
                "`with optimizer.skip_synchronize(): optimizer.step()`",
                stacklevel=3,
            )
        self.synchronize()

    def _own_step(self, closure: Any) -> Any:
        if isinstance(self._reduction, AdasumReduction):
            return self._reduction.step(lambda: super(_Distributed, self).step(closure))
        return super().step(closure)

    def _reducing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def reduced() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.synchronize()
            # An optimizer that branches on the loss must take the same branch on all ranks.
            if self._reduction is not None and isinstance(loss, torch.Tensor):
                loss = self._average_loss(loss.detach())
            return loss

        return reduced

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clear the gradients.

        Raises:
            HpcDlError: they are being reduced.
        """
        if self._reduction is not None and self._reduction.in_flight():
            raise HpcDlError(
                "zero_grad() was called between backward() and step(), while gradients are being "
                "reduced; call step() or synchronize() first"
            )
        super().zero_grad(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load the optimizer's own state; a step under way is forgotten, on all ranks alike.

        So is what compression owes of the steps before, unless ``load_compression_state`` came
        since the last of them.
        """
        if self._reduction is not None:
            self._reduction.abandon()
        self._synchronized = False
        super().load_state_dict(*args, **kwargs)
        if isinstance(self._reduction, GradientReduction) and self._reduction.forget_steps():
            log.warning(
                "load_state_dict(): what compression owed of the steps before is dropped, as it "
                "is not of the state that was loaded; give load_compression_state() what was "
                "saved beside that"
            )
        self._give_momentum()

    def _give_momentum(self) -> None:
        """Let compression that has no state go on from the momentum of the optimizer's state."""
        reduction = self._reduction
        if not isinstance(self, SharedMomentum) or not isinstance(reduction, GradientReduction):
            return
        if reduction.is_new:
            momenta = [(name, self.momentum(p)) for name, p in self._named]
            reduction.begin_from(
                {
                    name: {"shared": host_view(m.cpu().float().contiguous()).reshape(-1)}
                    for name, m in momenta
                    if m is not None
                }
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; all ranks add the same ones. Their names are made up.

        Raises:
            OptionError: options with which the compression is known not to converge.
        """
        if "_check_fit" in self.__dict__:
            self._check_fit(float({**self.defaults, **param_group}.get("momentum") or 0))
        super().add_param_group(param_group)
        if "_named" in self.__dict__:
            number = len(self.param_groups) - 1
            added = [
                (f"group{number}.{i}", p) for i, p in enumerate(self.param_groups[-1]["params"])
            ]
            self._named = [*self._named, *added]
            before = self._reduction
            if before is not None:
                before.close()
            self._reduction = self._remake(self._named)
            if self._reduction is not None:
                self._reduction.passes = self._passes
            if isinstance(self._reduction, GradientReduction):
                assert isinstance(before, GradientReduction)
                self._reduction.take_over(before)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change the number of backward passes of a step."""
        _check_passes(passes)
        self._passes = passes
        if self._reduction is not None:
            self._reduction.passes = passes

    def compression_state(self) -> Saved:
        """Return what compression keeps between steps on this rank, by parameter.

        Save it on each rank beside ``state_dict()``. Of a world of another size, give
        ``load_compression_state`` what ``hpc_dl.reduce.reshard`` makes of all ranks' states.
        """
        reduction = self._reduction
        return reduction.compression_state() if isinstance(reduction, GradientReduction) else {}

    def load_compression_state(self, saved: Saved) -> None:
        """Replace that by what ``compression_state`` returned; ``{}``: nothing is owed.

        Raises:
            OptionError: it is of other parameters, or of other sizes.
        """
        if isinstance(self._reduction, GradientReduction):
            self._reduction.load_compression_state(saved)
        else:
            warn_of_unused(saved)

    def report_loss(self, loss: float) -> None:
        """Let the guard of compression see this rank's loss; it suspends on a jump."""
        if isinstance(self._reduction, GradientReduction):
            self._reduction.report_loss(float(loss))

    def traffic(self) -> Traffic:
        """Return the steps, the bytes this rank sent, and the seconds it waited so far."""
        return Traffic(0, 0, 0.0) if self._reduction is None else self._reduction.traffic()


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: Op = Op.AVERAGE,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
    guard: bool = True,
) -> Any:
    """Wrap an optimizer so that it steps with gradients combined over the ranks.

    Gradients leave in fusion buckets while ``backward`` runs; ``step`` waits for them. The
    wrapped optimizer shares parameters, options and state with the one given, and is an
    instance of its class, so learning-rate schedulers work on it.

    Args:
        optimizer: any torch optimizer.
        named_parameters: ``model.named_parameters()``; by default names are made up.
        compression: how gradients travel: a name such as ``"fp16"`` or ``"topk:ratio=0.01"``
            (``hpc-dl compress list`` shows all), a mapping, an object of ``hpc_dl.compress``,
            a list of rules (pattern, compression); or a class with ``compress`` and
            ``decompress`` as Horovod has them.
        backward_passes_per_step: gradients of so many passes are added up before they are
            reduced, once.
        op: Average, Sum, Min, Max, Product; Adasum over Horovod combines the steps.
        gradient_predivide_factor: with Average, divide by this before the sum and by the
            rest after it.
        num_groups: Horovod's older name of ``groups``.
        groups: a number of groups, or lists of parameters that travel together.
        sparse_as_dense: reduce sparse gradients as dense ones instead of gathering rows.
        process_set: reduce over these ranks only.
        guard: compare the parameters of the ranks after the first steps and now and then.

    Raises:
        OptionError: a bad option, duplicate names, parameters without a name, or a
            compression with which this optimizer is known not to converge.
        MismatchError: on all ranks, if they have different parameters.

    >>> import hpc_dl.torch as hvd
    >>> hvd.init()
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    >>> hvd.shutdown()
    """
    _check_passes(backward_passes_per_step)
    if num_groups:
        warnings.warn("num_groups is now called groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    named = check_names(optimizer, named_parameters)
    compressor = of_gradients(compression)
    wanted = gradient_options(
        op,
        compressor,
        gradient_predivide_factor,
        sparse_as_dense,
        groups,
        process_set,
        guard,
    )
    op = wanted.op
    shares = optimizer if isinstance(optimizer, SharedMomentum) else None
    if shares is not None:
        check_shared(type(optimizer).__name__, compressor, op, gradient_predivide_factor)
        compressor = shares.policy()
    if op is not Op.ADASUM:
        compressor = fitting(_described(optimizer), compressor)

    def check_fit(momentum: float) -> None:
        described = _described(optimizer)
        described = described._replace(momentum=max(described.momentum, momentum))
        if op is not Op.ADASUM and fitting(described, compressor) != compressor:
            raise OptionError(
                f"parameters with momentum={momentum:g} leave compression='auto' fewer candidates "
                "than it has begun with; add them before the optimizer is wrapped"
            )

    def reduction(everything: Named) -> Reduction | None:
        named = [(name, p) for name, p in everything if p.requires_grad]
        alone = current().comm.size == 1
        if not process_set.included() or (alone and not wanted.takes_momentum):
            return None
        group = process_set.group()
        if op is Op.ADASUM:
            adasum = resolve(compression)
            return AdasumReduction(named, group, adasum, backward_passes_per_step)
        if not isinstance(compressor, Policy):
            return UnfusedReduction(named, group, compressor, op, backward_passes_per_step)
        options = Options(
            op,
            compressor,
            gradient_predivide_factor,
            group_names(wanted.groups, [name for name, _ in named], [p for _, p in named]),
            sparse_as_dense,
            None if shares is None else lambda: int(wrapped.steps),
        )
        return GradientReduction(named, group, options, backward_passes_per_step)

    kind = type(optimizer)
    wrapped: Any = object.__new__(type(kind.__name__, (_Distributed, kind), {}))
    # A scheduler made before has replaced `step` on the instance; ours must not be hidden.
    wrapped.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
    wrapped._named, wrapped._remake, wrapped._check_fit = named, reduction, check_fit
    wrapped._passes = backward_passes_per_step
    wrapped._average_loss = lambda loss: allreduce(loss, op=Op.AVERAGE, process_set=process_set)
    wrapped._wait_in_step, wrapped._synchronized = True, False
    wrapped._reduction = reduction(named)
    if shares is not None:
        wrapped.receives_momentum = wrapped._reduction is not None
        wrapped.sparse_as_dense = sparse_as_dense
        wrapped._give_momentum()
    included = process_set.included()
    group = process_set.group() if included else current().group
    wrapped._guard = ReplicaGuard(
        group.comm,
        lambda: ((name, host_view(p.detach().cpu())) for name, p in wrapped._named),
        enabled=guard and included,
        all_present=group.all_present,
        count=group.counter("steps"),
    )
    return wrapped


def _described(optimizer: torch.optim.Optimizer) -> pairs.Optimizer:
    """Say of an optimizer what a compression must fit."""
    shared = optimizer.policy() if isinstance(optimizer, SharedMomentum) else None
    return pairs.Optimizer(
        type(optimizer).__name__,
        pairs.family_of(kind.__name__ for kind in type(optimizer).__mro__),
        max(float(group.get("momentum") or 0) for group in optimizer.param_groups),
        shared.rules[0].scheme.shared_momentum if shared is not None else 0.0,
    )


def _check_passes(passes: int) -> None:
    if passes < 1:
        raise OptionError(f"backward_passes_per_step={passes}; give 1 or more")
