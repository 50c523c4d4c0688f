"""Plan the buckets of a set of gradients, and make the reducer that serves them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hpc_dl.arrays import Layout, Parameter, plan
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Policy, Scheme
from hpc_dl.errors import OptionError
from hpc_dl.reduce.compression import BucketCompression, Clock
from hpc_dl.reduce.reducer import Reducer

#: Nothing is compressed.
DENSE = Policy(())


class Division(NamedTuple):
    """The buckets of a set of gradients, and how each travels."""

    layout: Layout
    schemes: tuple[Scheme | None, ...]
    """For each bucket; None for an all-reduce."""
    casts: tuple[bool, ...]
    """For each bucket, whether gradients of it come in another type than its own."""


def divide(
    parameters: Sequence[Parameter],
    capacity: int,
    policy: Policy,
    groups: Sequence[Sequence[str]] = (),
) -> Division:
    """Decide which gradients travel together, and how.

    Args:
        parameters: with the types of their gradients, in the order in which these become
            ready.
        capacity: bytes at which a bucket is closed.
        groups: names of gradients that travel together.
    """
    travels = {p.name: policy.travel(p.name, p.shape, p.dtype) for p in parameters}
    sent = [p._replace(dtype=travels[p.name].dtype) for p in parameters]
    kinds = {name: travel.scheme for name, travel in travels.items()}
    layout = plan(sent, capacity, groups, kinds)
    changed = {p.name for p in parameters if travels[p.name].dtype != p.dtype}
    return Division(
        layout,
        tuple(kinds[bucket.parameters[0].name] for bucket in layout.buckets),
        tuple(any(p.name in changed for p in bucket.parameters) for bucket in layout.buckets),
    )


def make_reducer(
    comm: Communicator,
    parameters: Sequence[Parameter],
    op: Op,
    capacity: int,
    *,
    policy: Policy = DENSE,
    groups: Sequence[Sequence[str]] = (),
    scale: float = 1.0,
    make_buffers: Callable[[Layout], list[Any]] | None = None,
    agree: Callable[[], object] | None = None,
    name: str | None = None,
    clock: Clock | None = None,
    device: Any = None,
) -> Reducer:
    """Make a reducer; all ranks call this alike.

    Args:
        parameters: with the types of their gradients, in the order in which these become
            ready.
        capacity: bytes at which a bucket is closed.
        policy: which gradients are compressed how; they lie in buckets of their own.
        groups: names of gradients that travel together.
        make_buffers: makes a flat buffer for each bucket of a layout.
        scale, agree, name: as for ``Reducer``.
        clock, device: as for ``BucketCompression``.

    Raises:
        OptionError: compression of anything but an average or a sum.
    """
    layout, schemes, _ = divide(parameters, capacity, policy, groups)
    compression = None
    if any(scheme is not None for scheme in schemes):
        check_op(op)
        compression = BucketCompression(
            comm, layout, schemes, op, scale, policy.limits, policy.seed, clock, device
        )
    return Reducer(
        comm,
        layout,
        op,
        scale,
        None if make_buffers is None else make_buffers(layout),
        agree,
        name,
        compression,
        dense_bytes=sum(parameter.nbytes for parameter in parameters),
    )


def check_op(op: Op) -> None:
    """Refuse to compress what is no mean.

    Raises:
        OptionError: another op than AVERAGE and SUM.
    """
    if op not in (Op.AVERAGE, Op.SUM):
        raise OptionError(f"compression goes with op=Average or Sum; got op={op.value}")
