"""The fusion buckets of one optimizer or tape, for adapters that hand over lists of gradients.

The buckets are planned when a set of gradients is first seen; all ranks see it in the same
step, or learn there which gradient differs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from hpc_dl.arrays import Layout, Parameter
from hpc_dl.comm import Op
from hpc_dl.compress import Policy
from hpc_dl.reduce import Reducer, Saved, Traffic
from hpc_dl.reduce.build import DENSE, make_reducer
from hpc_dl.world.compression import Compression
from hpc_dl.world.gradients import Names
from hpc_dl.world.group import Call, Group
from hpc_dl.world.parameters import Described, check_parameters

#: Bytes at which a bucket is closed.
BUCKET_BYTES = 8 << 20
#: The same over Horovod, which fuses what is ready by itself: smaller ones leave sooner.
BUCKET_BYTES_NEGOTIATED = 256 << 10


class Place(NamedTuple):
    """Where a gradient lies: the number of its bucket, and its flat part of it."""

    bucket: int
    view: Any


@dataclass(frozen=True, eq=False)
class Buckets:
    """A reducer, and the places of the gradients it was made for, in their order."""

    reducer: Reducer
    places: tuple[Place, ...]
    compression: Compression

    def serve(self) -> None:
        """Reduce one bucket, in turn, with zeros: for a rank that has joined."""
        self.compression.hold(self.reducer)
        self.reducer.serve()


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
        self._op, self._scale = op, scale
        self._known: dict[tuple[Any, ...], Buckets] = {}
        self._agreed: set[tuple[Parameter, ...]] = set()
        self._number: int | None = None
        self.compression = Compression(group, policy)

    def agree(self, parameters: tuple[Parameter, ...]) -> str:
        """Make sure that all ranks reduce these gradients; return a digest of them.

        Raises:
            MismatchError: on all ranks; names the first that differs.
        """
        self.group.agree(Call("plan", self.label))
        self._agreed.add(parameters)
        policy = self.compression.policy
        described = [Described(p.name, p.shape, policy.describe_type(p.dtype)) for p in parameters]
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
            OptionError: the state that was loaded is of parameters of other sizes.
        """
        key = (parameters, groups, device)
        if key not in self._known:
            self._known[key] = self._make(parameters, groups, device, make_buffers)
        found = self._known[key]
        self.compression.hold(found.reducer)
        return found

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
            policy=self.compression.policy,
            groups=groups,
            scale=self._scale,
            make_buffers=make_buffers,
            agree=lambda: self.group.agree(self._at(call)),
            name=call.name,
            clock=None if self._number is None else lambda: int(self._number or 0),
            device=None if make_buffers is None else device,
        )
        self.compression.add(call.name, reducer)
        views, place = reducer.views(), reducer.layout.place()
        places = tuple(Place(place[p.name][0], views[p.name]) for p in parameters)
        buckets = Buckets(reducer, places, self.compression)
        self.group.register(call.name, buckets)
        return buckets

    def _at(self, call: Call) -> Call:
        """Add to the call of a reducer where its compression stands."""
        return call._replace(state=self.compression.position(call.name))

    def count(self, number: int | None) -> None:
        """Say which step of the optimizer comes; if never or None, they are counted here."""
        self._number = number

    def compression_state(self) -> Saved:
        """Return what compression keeps between steps on this rank, by parameter."""
        return self.compression.state()

    def load_compression_state(self, saved: Saved) -> None:
        """Take up what ``compression_state`` returned, now or as soon as there are buckets."""
        self.compression.load(saved)

    def report_loss(self, loss: float) -> None:
        """Let the guard of compression see this rank's loss."""
        self.compression.report_loss(loss)

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far."""
        return self.compression.traffic()

    def finish(self, reducer: Reducer) -> None:
        """Let a reducer reduce what its buckets hold, and wait for it.

        With ``compression="auto"`` all reducers are made anew after the step that decides.
        """
        begin = time.perf_counter()
        reducer.finish()
        waited = time.perf_counter() - begin
        if self.compression.unpaid:
            self.compression.pay(reducer.views(), self._op, self._scale)
        parameters = [p for bucket in reducer.layout.buckets for p in bucket.parameters]
        if self.compression.decide(begin, waited, parameters, BUCKET_BYTES):
            self.compression.settle_up()
            self._known.clear()
