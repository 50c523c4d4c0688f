"""Process sets: named groups of ranks that reduce among themselves."""

from collections.abc import Sequence

import numpy as np

from hpc_dl.comm.base import BaseCommunicator
from hpc_dl.errors import MismatchError, NotInitializedError, OptionError
from hpc_dl.world.group import Call, Group
from hpc_dl.world.state import World, current


class ProcessSet:
    """A set of ranks. It works once it is registered by ``init`` or ``add_process_set``."""

    def __init__(self, ranks: Sequence[int] | None = None):
        """Describe the set by its ranks; None: all ranks."""
        self._given = None if ranks is None else sorted({int(rank) for rank in ranks})
        self.process_set_id: int | None = 0 if ranks is None else None
        self._group: Group | None = None

    @property
    def ranks(self) -> list[int]:
        """The ranks of the job that are in the set, ascending."""
        return list(range(current().comm.size)) if self._given is None else self._given

    def group(self) -> Group:
        """Return the group of this set.

        Raises:
            NotInitializedError: it is not registered.
            OptionError: this rank is not in it.
        """
        if self.process_set_id == 0:
            return current().group
        if self.process_set_id is None:
            raise NotInitializedError(
                f"{self} is not registered; pass it to init(process_sets=[...]) or "
                "add_process_set() on all ranks"
            )
        if self._group is None:
            raise OptionError(
                f"rank {current().comm.rank} is not in {self}; call collectives of a process set "
                "only on its ranks (`if process_set.included():`)"
            )
        return self._group

    def size(self) -> int:
        """Return the number of ranks in the set."""
        return len(self.ranks)

    def rank(self) -> int:
        """Return the number of this rank within the set."""
        return self.group().comm.rank

    def included(self) -> bool:
        """Tell whether this rank is in the set."""
        return current().comm.rank in self.ranks

    def __repr__(self) -> str:
        ranks = "all" if self._given is None else self._given
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={ranks})"


#: All ranks.
global_process_set = ProcessSet()


def start(world: World, wanted: Sequence[ProcessSet | Sequence[int]] | str | None) -> None:
    """Register the sets given to ``init``; ``"dynamic"`` is accepted, sets always are."""
    if isinstance(wanted, str):
        if wanted != "dynamic":
            raise OptionError.unknown("value for init(process_sets=...)", wanted, ["dynamic"])
        return
    for process_set in wanted or ():
        add_process_set(process_set)


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Register a set of ranks; all ranks of the job call this with the same ranks.

    Raises:
        OptionError: no such ranks, or a set of these ranks is registered already.
        MismatchError: the ranks do not agree on the set.
    """
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    world = current()
    ranks = process_set.ranks
    if not ranks or ranks[0] < 0 or ranks[-1] >= world.comm.size:
        raise OptionError(f"process set {ranks}: valid ranks are 0..{world.comm.size - 1}")
    for known in [global_process_set, *world.process_sets.values()]:
        if ranks == known.ranks:
            raise OptionError(f"a process set of these ranks is registered already: {known}")
    world.group.agree(Call("add_process_set", "add_process_set"))
    _agree_on(world, ranks)
    included = world.comm.rank in ranks
    part = world.comm.split(0 if included else None)
    if isinstance(part, BaseCommunicator) and isinstance(world.comm, BaseCommunicator):
        part.watch.warn_seconds = world.comm.watch.warn_seconds
        part.watch.abort_seconds = world.comm.watch.abort_seconds
    process_set._group = Group(part) if part is not None else None
    process_set.process_set_id = world.next_set_id()
    world.process_sets[process_set.process_set_id] = process_set
    return process_set


def _agree_on(world: World, ranks: Sequence[int]) -> None:
    mask = np.zeros(world.comm.size, np.uint8)
    mask[list(ranks)] = 1
    masks = world.comm.exchange(mask)
    if (masks != masks[0]).any():
        sets = [np.flatnonzero(row).tolist() for row in masks]
        raise MismatchError(
            f"add_process_set: ranks 0..{len(sets) - 1} gave different sets: {sets}"
        )


def remove_process_set(process_set: ProcessSet) -> bool:
    """Forget a registered set; all ranks of the job call this. False if it was not registered."""
    number = process_set.process_set_id
    world = current()
    if number is None or number not in world.process_sets:
        return False
    world.comm.barrier()
    del world.process_sets[number]
    if process_set._group is not None:
        process_set._group.comm.close()
    process_set._group, process_set.process_set_id = None, None
    return True


def forget_all(world: World) -> None:
    """Drop every registered set, when the world ends."""
    for process_set in world.process_sets.values():
        if process_set._group is not None:
            process_set._group.comm.close()
        process_set._group, process_set.process_set_id = None, None
    world.process_sets.clear()
