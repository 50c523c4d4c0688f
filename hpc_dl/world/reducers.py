"""The fusion buckets of one optimizer or tape, for adapters that hand over lists of gradients.

The buckets are planned when a set of gradients is first seen; all ranks see it in the same
step, or learn there which gradient differs.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from operator import add
from typing import Any, NamedTuple

from hpc_dl.arrays import Layout, Parameter
from hpc_dl.comm import Op
from hpc_dl.compress import Policy, pairs, policy_of
from hpc_dl.errors import OptionError
from hpc_dl.reduce import Reducer, Saved, Traffic
from hpc_dl.reduce.build import DENSE, check_op, make_reducer
from hpc_dl.reduce.choose import Chooser
from hpc_dl.reduce.reducer import load_state, report_loss, state_of
from hpc_dl.reduce.traffic import total
from hpc_dl.world.group import Call, Group
from hpc_dl.world.local import native
from hpc_dl.world.parameters import Described, check_parameters
from hpc_dl.world.process_sets import ProcessSet

#: Bytes at which a bucket is closed.
BUCKET_BYTES = 8 << 20
#: The same over Horovod, which fuses what is ready by itself: smaller ones leave sooner.
BUCKET_BYTES_NEGOTIATED = 256 << 10

Names = tuple[str, ...]


class Gradient(NamedTuple):
    """A gradient, the name under which ranks compare it, and what it belongs to."""

    name: str
    value: Any
    """A tensor of the framework, dense or sparse, or None where there is none."""
    source: Any
    """A variable, or a tensor."""


def unique(names: Sequence[str]) -> list[str]:
    """Number names that occur more than once."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        number = seen[name] = seen.get(name, 0) + 1
        result.append(name if number == 1 else f"{name}#{number}")
    return result


def gradient_compression(given: Any, casts: Mapping[Any, str]) -> Any:
    """Read what the user gives as ``compression`` of gradients.

    Args:
        given: what ``policy_of`` reads; or a class with ``compress`` and ``decompress``.
        casts: classes that stand for compressors by name.

    Returns:
        A ``Policy``, or the class.

    Raises:
        OptionError: something else, or a bad name or option.
    """
    if isinstance(given, type) and given in casts:
        return policy_of(casts[given])
    if hasattr(given, "compress") and hasattr(given, "decompress"):
        return given
    return policy_of(given)


def on_host(compression: Any) -> Policy:
    """Return what compressors do on the host beyond a cast that the framework can do."""
    if isinstance(compression, Policy) and compression.cast is None:
        return compression
    return DENSE


class GradientOptions(NamedTuple):
    """How an optimizer or a tape combines gradients; see ``gradient_options``."""

    op: Op
    compression: Any
    predivide: float
    sparse_as_dense: bool
    groups: int | tuple[tuple[Any, ...], ...]
    """A number of groups, or the variables of each group."""
    process_set: ProcessSet
    guard: bool


def gradient_options(
    op: Op | str,
    compression: Any,
    predivide: float,
    sparse_as_dense: bool,
    groups: Any,
    process_set: ProcessSet,
    guard: bool,
) -> GradientOptions:
    """Check the options of Horovod's ``DistributedOptimizer`` and ``DistributedGradientTape``.

    Raises:
        OptionError: one that is not allowed, or two that do not go together.
    """
    try:
        op = Op(op)
    except ValueError:
        raise OptionError.unknown("op", op, [o.value for o in Op]) from None
    if isinstance(compression, Policy) and op is not Op.ADASUM:
        pairs.check(compression)
        if compression.lossy:
            check_op(op)
    if predivide <= 0:
        raise OptionError(f"gradient_predivide_factor={predivide}; give a number > 0")
    if predivide != 1.0 and op is not Op.AVERAGE:
        raise OptionError(
            f"gradient_predivide_factor={predivide} goes with op=Average only; got op={op.value}"
        )
    return GradientOptions(
        op, compression, predivide, sparse_as_dense, _groups(groups), process_set, guard
    )


def _groups(groups: Any) -> int | tuple[tuple[Any, ...], ...]:
    if groups is None:
        return 0
    if isinstance(groups, int) and groups >= 0:
        return groups
    if (
        isinstance(groups, list | tuple)
        and all(isinstance(g, list | tuple) for g in groups)
        and not any(isinstance(member, str) for g in groups for member in g)
    ):
        return tuple(tuple(group) for group in groups)
    raise OptionError(
        f"groups={groups!r}: give a number of groups, 0 or more, or a list of lists of variables "
        "(not of their names)"
    )


def group_names(
    groups: int | tuple[tuple[Any, ...], ...], names: Sequence[str], variables: Sequence[Any]
) -> tuple[Names, ...]:
    """Say by name which gradients travel together.

    Args:
        groups: a number of groups, or the variables of each.
        names: of ``variables``, whose gradients are reduced.

    Raises:
        OptionError: a variable that is in two groups.
    """
    if isinstance(groups, int):
        if groups == 0:
            return ()
        count = min(groups, len(names))
        bounds = [len(names) * i // max(count, 1) for i in range(count + 1)]
        return tuple(tuple(names[a:b]) for a, b in itertools.pairwise(bounds))
    name_of = {id(native(v)): name for name, v in zip(names, variables, strict=True)}
    resolved = tuple(
        tuple(name_of[id(native(v))] for v in group if id(native(v)) in name_of) for group in groups
    )
    flat = [name for group in resolved for name in group]
    twice = next((name for name in flat if flat.count(name) > 1), None)
    if twice is not None:
        raise OptionError(f"groups: {twice!r} is in two groups; a variable goes in one")
    return resolved


class Place(NamedTuple):
    """Where a gradient lies: the number of its bucket, and its flat part of it."""

    bucket: int
    view: Any


class Buckets(NamedTuple):
    """A reducer, and the places of the gradients it was made for, in their order."""

    reducer: Reducer
    places: tuple[Place, ...]


class Reducers:
    """The reducers of one optimizer or tape: one for each set of gradients it has met."""

    def __init__(
        self, group: Group, label: str, op: Op, scale: float = 1.0, policy: Policy = DENSE
    ):
        """Begin with none.

        Args:
            label: names the optimizer, the same on all ranks and different for each.
            scale: a factor on the result.
            policy: which gradients are compressed how.
        """
        self.group = group
        self.label = group.name(label, None)
        self._op, self._scale, self._policy = op, scale, policy
        self._known: dict[tuple[Any, ...], Buckets] = {}
        self._agreed: set[tuple[Parameter, ...]] = set()
        self._saved: Saved = {}
        self._number: int | None = None
        self._past = Traffic(0, 0, 0.0)
        self._chooser = (
            None if policy.auto is None else Chooser(policy.auto, group.counter("compression.auto"))
        )

    def agree(self, parameters: tuple[Parameter, ...]) -> str:
        """Make sure that all ranks reduce these gradients; return a digest of them.

        Raises:
            MismatchError: on all ranks; names the first that differs.
        """
        self.group.agree(Call("plan", self.label))
        self._agreed.add(parameters)
        described = [
            Described(p.name, p.shape, self._policy.describe_type(p.dtype)) for p in parameters
        ]
        return check_parameters(self.group, described)

    def agree_once(self, parameters: tuple[Parameter, ...]) -> None:
        """Like ``agree``, the first time that these gradients are met."""
        if parameters not in self._agreed:
            self.agree(parameters)

    def find(
        self,
        parameters: tuple[Parameter, ...],
        groups: tuple[Names, ...] = (),
        device: Any = None,
        make_buffers: Callable[[Layout], list[Any]] | None = None,
    ) -> Buckets:
        """Return the buckets for these gradients; all ranks call this alike.

        Args:
            groups: names of gradients that travel together.
            device: of torch, on which the gradients are; with ``make_buffers``, buckets are
                compressed there.
            make_buffers: makes a flat buffer for each bucket of a layout; by default they
                are in the memory in which the communicator reduces fastest.

        Raises:
            MismatchError: on all ranks, the first time that they pass different gradients.
        """
        key = (parameters, groups, device)
        if key not in self._known:
            self._known[key] = self._make(parameters, groups, device, make_buffers)
        return self._known[key]

    def _make(
        self,
        parameters: tuple[Parameter, ...],
        groups: tuple[Names, ...],
        device: Any,
        make_buffers: Callable[[Layout], list[Any]] | None,
    ) -> Buckets:
        digest = self.agree(parameters)
        number = len(self._known)
        call = Call("reduce", f"{self.label}.{number}.{digest}", op=self._op.value)
        reducer = make_reducer(
            self.group.comm,
            parameters,
            self._op,
            BUCKET_BYTES,
            policy=self._policy,
            groups=groups,
            scale=self._scale,
            make_buffers=make_buffers,
            agree=lambda: self.group.agree(call),
            name=call.name,
            clock=None if self._number is None else lambda: int(self._number or 0),
            device=None if make_buffers is None else device,
        )
        self.group.register(call.name, reducer)
        load_state([reducer], self._saved)
        views, place = reducer.views(), reducer.layout.place()
        return Buckets(reducer, tuple(Place(place[p.name][0], views[p.name]) for p in parameters))

    def count(self, number: int | None) -> None:
        """Say which step of the optimizer comes; if never or None, they are counted here."""
        self._number = number

    def compression_state(self) -> Saved:
        """Return what compression keeps between steps on this rank, by parameter."""
        if not self._known or self._chooser is not None:
            return self._saved
        return state_of(buckets.reducer for buckets in self._known.values())

    def load_compression_state(self, saved: Saved) -> None:
        """Take up what ``compression_state`` returned, now or as soon as there are buckets."""
        self._saved = saved
        load_state((buckets.reducer for buckets in self._known.values()), saved)

    def report_loss(self, loss: float) -> None:
        """Let the guard of compression see this rank's loss."""
        report_loss((buckets.reducer for buckets in self._known.values()), loss)

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far."""
        now = total(buckets.reducer.traffic() for buckets in self._known.values())
        return Traffic(*map(add, now, self._past))

    def finish(self, reducer: Reducer) -> None:
        """Let a reducer reduce what its buckets hold, and wait for it.

        With ``compression="auto"`` all reducers are made anew after the step that decides.
        """
        begin = time.perf_counter()
        reducer.finish()
        if self._chooser is None:
            return
        self._chooser.step(begin, time.perf_counter() - begin)
        if self._chooser.due() and self.group.all_present():
            everything = [p for bucket in reducer.layout.buckets for p in bucket.parameters]
            chosen = self._chooser.choose(self.group.comm, everything, BUCKET_BYTES)
            self._policy = self._policy._replace(rules=chosen.rules, auto=None)
            self._past, self._chooser = self.traffic(), None
            self._known.clear()
