"""Reduce a model's gradients in fusion buckets while backward runs.

The buckets are planned in the first step, when it is known in which order gradients become
ready and which of them are sparse; that first step is reduced after backward. From then on a
hook moves each gradient into its bucket as soon as it is accumulated, and full buckets leave.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from hpc_dl.arrays import BFLOAT16, Layout, Parameter, host_view, torch_view
from hpc_dl.comm import Op
from hpc_dl.compress import Policy
from hpc_dl.compress.device import has_kernels
from hpc_dl.errors import HpcDlError, OptionError
from hpc_dl.reduce import Reducer, Saved, Traffic, make_reducer
from hpc_dl.reduce.compression import Clock
from hpc_dl.reduce.traffic import total
from hpc_dl.torch.sparse import allreduce_sparse
from hpc_dl.world import Call, Group
from hpc_dl.world.choice import CHOICE
from hpc_dl.world.compression import Compression
from hpc_dl.world.gradients import Names
from hpc_dl.world.parameters import Described, check_parameters
from hpc_dl.world.reducers import BUCKET_BYTES, BUCKET_BYTES_NEGOTIATED


class Options(NamedTuple):
    """How gradients are reduced."""

    op: Op
    policy: Policy
    predivide: float
    groups: tuple[Names, ...]
    sparse_as_dense: bool
    clock: Clock | None = None
    """Tells the optimizer's step, where it must be that of the compression."""


class _Place(NamedTuple):
    """Where a parameter's gradient lies: the bucket, and its view of it."""

    bucket: int
    view: torch.Tensor
    alone: bool
    """Whether the gradient may be reduced where it lies instead."""


class GradientReduction:
    """The gradients of one optimizer, over one group of ranks."""

    def __init__(
        self,
        named: Sequence[tuple[str, torch.nn.Parameter]],
        group: Group,
        options: Options,
        passes: int,
    ):
        """Compare the parameters over the ranks and hook their gradients.

        Args:
            named: the parameters that need gradients, in the same order on all ranks.
            passes: backward passes of one step.

        Raises:
            MismatchError: on all ranks, if names, shapes or types differ.
        """
        self._group, self._options = group, options
        self._named = list(named)
        self._names = {p: name for name, p in self._named}
        digest = check_parameters(group, self._described(options.policy))
        label = group.name("gradients", None)
        self._call = Call("reduce", f"{label}.{digest}", op=options.op.value)
        self.passes = passes
        self._count = dict.fromkeys(self._names, 0)
        self._order: list[str] = []
        self._planned = False
        self._moved: set[torch.nn.Parameter] = set()
        self._in_place: set[torch.nn.Parameter] = set()
        self._places: dict[torch.nn.Parameter, _Place] = {}
        self._sparse: list[torch.nn.Parameter] = []
        self._reducers: list[Reducer] = []
        self._reducer_by_device: dict[torch.device, Reducer] = {}
        self._rows = Traffic(0, 0, 0.0)
        self._generation = 0
        self._stepped, self._loaded = False, False
        self._compression = Compression(group, options.policy)
        hook = _hook(self)
        self._hooks = [p.register_post_accumulate_grad_hook(hook) for p in self._names]

    def _described(self, policy: Policy) -> list[Described]:
        return [
            Described(name, tuple(p.shape), policy.describe_type(p.dtype))
            for name, p in self._named
        ]

    # --- during backward ------------------------------------------------------------

    def _on_grad(self, p: torch.Tensor) -> None:
        assert isinstance(p, torch.nn.Parameter)
        self._count[p] += 1
        if self._count[p] > self.passes:
            raise HpcDlError(
                f"the gradient of {self._names[p]!r} was computed {self._count[p]} times since the "
                f"last step(); backward_passes_per_step is {self.passes}. Call step() after each "
                "backward(), or raise backward_passes_per_step"
            )
        if self._count[p] < self.passes:
            return
        self._compression.gradient()
        if not self._planned:
            self._order.append(self._names[p])
        elif p in self._places:
            self._move(p)

    @torch.no_grad()
    def _move(self, p: torch.nn.Parameter) -> None:
        """Move a gradient into its bucket; with no gradient the bucket gets zeros."""
        place, grad = self._places[p], p.grad
        view = place.view
        if grad is not None and place.alone and grad.is_contiguous() and grad.dtype == view.dtype:
            self._start_in_place(p, place, grad)
            return
        if grad is None:
            view.zero_()
        elif grad.is_sparse:
            view.copy_(grad.to_dense())
        elif grad.data_ptr() != view.data_ptr():
            view.copy_(grad)
        if self._options.predivide != 1.0:
            view.mul_(1.0 / self._options.predivide)
        same = view.dtype == p.dtype and view.device == p.device
        if same and not (grad is not None and grad.is_sparse):
            p.grad = view
        self._moved.add(p)
        self._reducer_of(place).ready(place.bucket)

    def _start_in_place(self, p: torch.nn.Parameter, place: _Place, grad: torch.Tensor) -> None:
        """Let a gradient that has a bucket for itself be reduced where it lies."""
        if self._options.predivide != 1.0:
            grad.mul_(1.0 / self._options.predivide)
        self._moved.add(p)
        self._in_place.add(p)
        flat = grad.view(-1)
        memory = flat if flat.is_cuda else host_view(flat)
        self._reducer_of(place).ready(place.bucket, memory)

    # --- at the end of backward -----------------------------------------------------

    def in_flight(self) -> bool:
        """Tell whether gradients wait for, or are in, a reduction."""
        return any(count > 0 for count in self._count.values())

    def finish(self) -> None:
        """Reduce what has not been reduced, wait, and leave the results in the gradients."""
        if not self._planned:
            self._plan()
        begin = time.perf_counter()
        for p in self._places:
            if p not in self._moved:
                self._move(p)
        for reducer in self._reducers:
            reducer.finish()
        waited = time.perf_counter() - begin
        decided = self._compression.decide(
            begin, waited, self._dense(), self._capacity(), self._device()
        )
        if self._compression.unpaid:
            self._pay()
        for p, place in self._places.items():
            if p not in self._in_place:
                self._take_out(p, place.view)
        for p in self._sparse:
            self._finish_sparse(p)
        self._rearm()
        self._stepped, self._loaded = True, False
        if decided:
            self._compression.settle_up()
            self._lay_out([self._names[p] for p in self._places])

    def _dense(self) -> Iterator[Parameter]:
        for name, p in self._named:
            if p in self._places:
                yield Parameter(name, tuple(p.shape), _numpy_dtype(p.dtype))

    def _device(self) -> torch.device | None:
        """Return the GPU on which gradients lie, if it is one."""
        devices = {p.device for p in self._places}
        device = devices.pop() if len(devices) == 1 else None
        return device if device is not None and device.type == "cuda" else None

    def _capacity(self) -> int:
        return BUCKET_BYTES_NEGOTIATED if self._group.comm.negotiates else BUCKET_BYTES

    def _pay(self) -> None:
        """Add what is owed of parameters that are not compressed any more."""
        results = {
            self._names[p]: p.grad if p in self._in_place else place.view
            for p, place in self._places.items()
        }
        self._compression.pay(results, self._options.op, self._options.predivide)

    def _take_out(self, p: torch.nn.Parameter, view: torch.Tensor) -> None:
        if p.grad is None:
            p.grad = view.to(p.device, p.dtype)
        elif p.grad.is_sparse:
            p.grad = view.to(p.device, p.dtype).to_sparse()
        elif p.grad.data_ptr() != view.data_ptr():
            p.grad.copy_(view)

    def _finish_sparse(self, p: torch.nn.Parameter) -> None:
        name = self._names[p]
        op, policy = self._options.op, self._compression.policy
        p.grad, sent = allreduce_sparse(p, p.grad, op, policy, name, self._group)
        self._rows = total([self._rows, sent])

    def abandon(self) -> None:
        """Give up a step under way: wait for what has begun to be reduced, and forget it."""
        if self._moved:
            for reducer in self._reducers:
                reducer.finish()
        self._rearm()

    def _rearm(self) -> None:
        self._count = dict.fromkeys(self._count, 0)
        self._moved.clear()
        self._in_place.clear()

    # --- the plan -------------------------------------------------------------------

    def _plan(self) -> None:
        """Agree on the buckets with all ranks, and move this step's gradients into them."""
        names, by_name = [name for name, _ in self._named], dict(self._named)
        sparse = [_is_sparse(by_name[n]) and not self._options.sparse_as_dense for n in names]
        seen = {name: number for number, name in enumerate(self._order)}
        order = [seen.get(name, len(names)) for name in names]
        self._planned = True
        self._group.agree(Call("plan", self._call.name))
        if self._options.policy.auto is not None:  # Of the state that was loaded, if any.
            check_parameters(self._group, self._described(self._compression.policy))
        table = self._group.comm.exchange(np.array([*sparse, *order], np.int64))
        is_sparse = np.atleast_1d(table[:, : len(names)].any(axis=0))
        rank_order = np.argsort(table[0, len(names) :], kind="stable")
        self._sparse = [by_name[names[i]] for i in range(len(names)) if is_sparse[i]]
        self._lay_out([names[i] for i in rank_order if not is_sparse[i]])

    def _lay_out(self, dense: list[str]) -> None:
        """Make the buckets of dense gradients, in this order."""
        by_name = dict(self._named)
        self._generation += 1
        self._reducers, self._places, self._reducer_by_device = [], {}, {}
        homes = {name: self._home(name, by_name[name]) for name in dense}
        for number, home in enumerate(dict.fromkeys(homes.values())):
            members = [(name, by_name[name]) for name in dense if homes[name] == home]
            self._add_reducer(number, home, members)

    def _add_reducer(
        self, number: int, device: torch.device, named: list[tuple[str, torch.nn.Parameter]]
    ) -> None:
        options = self._options
        parameters = [Parameter(n, tuple(p.shape), _numpy_dtype(p.dtype)) for n, p in named]
        on_host = device.type == "cpu"
        label = f"{self._call.name}.{self._generation}.{number}"
        call = self._call._replace(name=label)
        reducer = make_reducer(
            self._group.comm,
            parameters,
            options.op,
            self._capacity(),
            policy=self._compression.policy,
            groups=options.groups,
            scale=options.predivide,
            make_buffers=None if on_host else lambda layout: _buffers(layout, device),
            agree=lambda: self._group.agree(self._at(call)),
            name=call.name,
            clock=options.clock,
            device=None if on_host else device,
        )
        self._group.register(call.name, reducer)
        self._reducers.append(reducer)
        self._compression.add(call.name, reducer)
        self._compression.hold(reducer)
        views, place = reducer.views(), reducer.layout.place()
        for name, p in named:
            flat = torch_view(views[name]) if on_host else views[name]
            bucket = place[name][0]
            self._places[p] = _Place(bucket, flat.view(p.shape), reducer.takes_place_of(bucket))
        self._reducer_by_device[device] = reducer

    def _at(self, call: Call) -> Call:
        """Add to the call of a reducer where its compression stands."""
        return call._replace(state=self._compression.position(call.name))

    def _home(self, name: str, p: torch.nn.Parameter) -> torch.device:
        """Return where a gradient's bucket lies: where its compressor works."""
        scheme = self._compression.policy.travel(name, tuple(p.shape), _numpy_dtype(p.dtype)).scheme
        if scheme is None or (p.is_cuda and has_kernels(scheme.compressor)):
            return p.device
        return torch.device("cpu")

    def _reducer_of(self, place: _Place) -> Reducer:
        return self._reducer_by_device[place.view.device]

    # --- the record -----------------------------------------------------------------

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far."""
        return total([self._compression.traffic(), self._rows])

    def compression_state(self) -> Saved:
        """Return what compression keeps between steps, by parameter."""
        return self._compression.state()

    def load_compression_state(self, saved: Saved) -> None:
        """Replace that by what ``compression_state`` returned.

        Raises:
            OptionError: it is of other parameters.
        """
        known = {name for name, _ in self._named}
        other = next((name for name in saved if name not in known and name != CHOICE), None)
        if other is not None:
            raise OptionError(
                f"the state of compression is of a parameter {other!r}, which is none of the "
                f"{len(known)} here that need gradients (first: {self._named[0][0]!r}); load that "
                "of the same model, or leave out what does not learn any more"
            )
        self.begin_from(saved)
        self._stepped, self._loaded = False, bool(saved)

    def take_over(self, other: "GradientReduction") -> None:
        """Go on where another reduction stood, which has some of these parameters."""
        other.abandon()
        self._compression.take_over(other._compression, [name for name, _ in self._named])
        self._rows = other._rows
        self._stepped, self._loaded = other._stepped, other._loaded

    @property
    def is_new(self) -> bool:
        """Whether nothing has been loaded and no step taken since."""
        return not self._stepped and not self._loaded

    def begin_from(self, saved: Saved) -> None:
        """Begin with a state that follows from the optimizer's own."""
        self._compression.load(saved)
        for reducer in self._reducers:
            self._compression.hold(reducer)

    def forget_steps(self) -> bool:
        """Owe nothing of the steps that were taken; tell whether anything was owed.

        What was loaded since the last step stays.
        """
        if not self._stepped:
            return False
        owed = any(
            value.any()
            for state in self.compression_state().values()
            for key, value in state.items()
            if key in ("residual", "server", "momentum")
        )
        self.load_compression_state({})
        return owed

    def report_loss(self, loss: float) -> None:
        """Let the guard of compression see this rank's loss."""
        self._compression.report_loss(loss)

    def close(self) -> None:
        """Unhook the gradients."""
        for hook in self._hooks:
            hook.remove()


def _hook(reduction: GradientReduction) -> Callable[[torch.Tensor], None]:
    """Return a hook that does not keep the reduction.

    The garbage collector does not see what a parameter's hooks keep: the parameters and their
    reduction would keep each other for ever.
    """
    reference = weakref.ref(reduction)

    def on_grad(p: torch.Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive._on_grad(p)

    return on_grad


def _is_sparse(p: torch.nn.Parameter) -> bool:
    return p.grad is not None and p.grad.is_sparse


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[np.generic]:
    if dtype is torch.bfloat16:
        return BFLOAT16
    return torch.empty(0, dtype=dtype).numpy().dtype


def _buffers(layout: Layout, device: torch.device) -> list[torch.Tensor]:
    return [torch.zeros(b.size, dtype=_torch_dtype(b.dtype), device=device) for b in layout.buckets]


def _torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    found: torch.dtype = torch_view(np.empty(0, dtype)).dtype
    return found
