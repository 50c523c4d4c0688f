"""What compression of one optimizer's gradients keeps beside its reducers.

That is the policy, which ``auto`` chooses after some steps, and what each parameter owes. It
belongs to the parameter: where the sets of gradients change from step to step, several reducers
know a parameter, and one of them holds its state, the one that reduced it last.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import add
from typing import Any

import numpy as np

from hpc_dl.arrays import Parameter
from hpc_dl.comm import Op
from hpc_dl.compress import Policy
from hpc_dl.reduce import Reducer, Saved, Traffic
from hpc_dl.reduce.reducer import report_loss
from hpc_dl.reduce.traffic import total
from hpc_dl.world.choice import CHOICE, Choice
from hpc_dl.world.group import Group
from hpc_dl.world.owed import (
    COMMON,
    State,
    add_to,
    check_size,
    compressed_by,
    fits,
    is_finite,
    left_dense_by,
    nothing_in,
    parameters_of,
    residual_of,
    settled,
)

log = logging.getLogger("hpc_dl.compress")

#: What is true under any scheme.
_OWED = ("residual", *COMMON)
#: Parts of a state with one value for each of the parameter's.
_FLAT = frozenset({"residual", "server", "momentum", "shared"})


class Compression:
    """The policy in force, the state of each parameter, and the traffic so far."""

    def __init__(self, group: Group, policy: Policy):
        """Begin without reducers; all ranks call this alike."""
        self._group = group
        self._choice = Choice(group, policy)
        self._reducers: dict[str, Reducer] = {}
        self._holder: dict[str, Reducer] = {}
        self._waiting: Saved = {}
        self._unpaid: set[str] = set()
        self._past = Traffic(0, 0, 0.0)
        self._loss: float | None = None

    # --- the policy -----------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """Which gradients are compressed how, at present."""
        return self._choice.policy

    @property
    def deciding(self) -> bool:
        """Whether ``auto`` still watches steps, to choose or to choose again."""
        return self._choice.deciding

    @property
    def settled_cast(self) -> str | None:
        """The name of the cast that all gradients travel as from now on, if it is no more."""
        return None if self.deciding else self.policy.cast

    def gradient(self) -> None:
        """Say that a gradient is ready, for ``auto``."""
        self._choice.gradient()

    def decide(
        self,
        began: float,
        waited: float,
        parameters: Iterable[Parameter],
        capacity: int,
        device: Any = None,
    ) -> bool:
        """Say that a step has been reduced; all ranks call this alike.

        Args:
            began: when backward was over and waiting began; ``time.perf_counter``.
            waited: seconds of waiting.
            parameters: all dense gradients, in their order.
            capacity: bytes of a bucket.
            device: of torch, where gradients lie; by default on the host.

        Returns:
            True if the policy is another one from now on: ``settle_up``, and make reducers
            anew.

        Raises:
            MismatchError: on all ranks, which have taken up states with different choices.
        """
        return self._choice.decide(began, waited, parameters, capacity, device)

    def settle_up(self) -> None:
        """Part with the reducers, whose policy is not in force any more."""
        for reducer in self._reducers.values():
            held = settled(reducer, self._held(reducer), self._group.comm.size)
            for name, state in held.items():
                # The rest is of the scheme that is left.
                self._waiting[name] = {k: v for k, v in state.items() if k in _OWED}
        self._past = self.traffic()
        self._reducers.clear()
        self._holder.clear()
        self._unpaid.clear()

    @property
    def unpaid(self) -> bool:
        """Whether anything is owed of parameters that ``auto`` has left, alike on all ranks."""
        return bool(self._unpaid)

    def pay(self, results: Mapping[str, Any], op: Op, scale: float) -> None:
        """Add to the results of a step what is owed of those that are not compressed any more.

        All ranks call this alike. What came out spoiled is paid later, and so is all while some
        ranks have joined.

        Args:
            results: by name, the same on all ranks; changed in place.
            op: how they were combined, like ``scale``.
        """
        due = [name for name in results if name in self._unpaid and is_finite(results[name])]
        if not (due and self._group.all_present()):
            return
        for name in due:
            owed = residual_of(self._waiting.pop(name, {}), results[name])
            self._group.comm.allreduce(owed, op, scale)
            add_to(results[name], owed)
        self._unpaid.difference_update(due)

    # --- the reducers ---------------------------------------------------------------

    def add(self, name: str, reducer: Reducer) -> None:
        """Take note of a new reducer; all ranks call this alike.

        Raises:
            OptionError: the state that was loaded is of parameters of other sizes.
        """
        self._reducers[name] = reducer
        if self._loss is not None:
            report_loss([reducer], self._loss)
        if self.policy.auto is not None:
            return
        dense = left_dense_by(reducer)
        if self._choice.automatic and dense:
            self._find_unpaid(reducer, dense)
        self._drop_waiting(dense)

    def _find_unpaid(self, reducer: Reducer, dense: Sequence[str]) -> None:
        """Agree with all ranks on the parameters of which any owes something."""
        parameters, mine = parameters_of(reducer), np.zeros(len(dense), np.int64)
        for number, name in enumerate(dense):
            owed = self._waiting.get(name, {}).get("residual")
            if owed is not None:
                check_size(name, "residual", owed, parameters[name].size)
                mine[number] = owed.any()
        everyone = self._group.comm.exchange(mine).reshape(-1, len(dense))
        self._unpaid |= {dense[number] for number in np.flatnonzero(everyone.any(axis=0)).tolist()}

    def _drop_waiting(self, dense: Iterable[str]) -> None:
        """Forget the states of parameters that are not compressed, but for what will be paid."""
        useless: Saved = {}
        for name in self._waiting.keys() & set(dense):
            kept = _OWED if name in self._unpaid else ()
            state = self._waiting.pop(name)
            useless[name] = {k: v for k, v in state.items() if k not in kept}
            if kept:
                self._waiting[name] = {k: v for k, v in state.items() if k in kept}
        self._tell(useless)

    def position(self, name: str) -> str:
        """Say of the reducer of that name what must be the same on all ranks."""
        compression = self._reducers[name].compression
        return "" if compression is None else compression.position()

    def hold(self, reducer: Reducer) -> None:
        """Move to a reducer what its parameters owe, before it reduces them; also what was loaded.

        It stays on each rank: what this rank owes of sums becomes part of what it owes.

        Raises:
            OptionError: the state that was loaded is of parameters of other sizes.
        """
        elsewhere = [n for n in compressed_by(reducer) if self._holder.get(n) is not reducer]
        if not elsewhere:
            return
        moved: Saved = {n: self._waiting[n] for n in elsewhere if n in self._waiting}
        for other in self._reducers.values():
            names = set(self._held(other)).intersection(elsewhere)
            moved |= settled(other, names, self._group.comm.size)
        self._install(reducer, {name: moved.get(name, {}) for name in elsewhere})
        for name in elsewhere:
            self._holder[name] = reducer
            self._waiting.pop(name, None)

    def _held(self, reducer: Reducer) -> list[str]:
        """Return the names of the parameters of which a reducer holds the state."""
        return [name for name in compressed_by(reducer) if self._holder.get(name) is reducer]

    # --- the state ------------------------------------------------------------------

    def state(self, moving: bool = False) -> Saved:
        """Return what is kept between steps on this rank, by parameter; and auto's choice.

        Args:
            moving: it will be loaded into other buckets.
        """
        saved = dict(self._waiting)
        reducers = self._reducers.values()
        known = Counter(name for reducer in reducers for name in compressed_by(reducer))
        for reducer in reducers:
            names = self._held(reducer)
            # What lies in several sets may well be loaded into other buckets.
            leaving = {name for name in names if moving or known[name] > 1}
            saved |= settled(reducer, leaving, self._group.comm.size)
            if reducer.compression is not None:
                saved |= reducer.compression.state_dict(set(names) - leaving)
        return saved | self._choice.state()

    def load(self, saved: Saved) -> None:
        """Replace the state by what ``state`` returned, now or as soon as there are reducers.

        What is not in ``saved`` owes nothing from now on. All ranks load states of the same
        step, or none; where they differ, the next step is a ``MismatchError`` on all.
        ``hold`` moves the state to the reducers that are there already.

        Raises:
            OptionError: a state of parameters of other sizes.
        """
        for reducer in self._reducers.values():
            for name, parameter in parameters_of(reducer).items():
                for key in _FLAT.intersection(saved.get(name, {})):
                    check_size(name, key, saved[name][key], parameter.size)
        self._choice.load(saved)
        self._waiting = {name: state for name, state in saved.items() if name != CHOICE}
        has_steps = any("step" in state for state in saved.values())
        for reducer in self._reducers.values():
            if reducer.compression is not None and has_steps:
                reducer.compression.begin_again()
            owes_nothing = [name for name in self._held(reducer) if name not in saved]
            self._install(reducer, {name: {} for name in owes_nothing})
        for name in saved:
            self._holder.pop(name, None)
        if self.policy.auto is None:
            self._drop_waiting(name for r in self._reducers.values() for name in left_dense_by(r))

    def take_over(self, other: "Compression", names: Collection[str]) -> None:
        """Go on where another one stood, whose parameters lay in other buckets.

        Args:
            names: of the parameters that there are now.
        """
        saved = other.state(moving=True)
        self.load({name: s for name, s in saved.items() if name in names or name == CHOICE})
        self._past, self._loss = other.traffic(), other._loss

    def _install(self, reducer: Reducer, saved: Saved) -> None:
        """Replace states of parameters in a reducer, and tell of what has no place there."""
        if reducer.compression is None or not saved:
            return
        now = reducer.compression.state_dict(saved)
        useless: Saved = {}
        fitting: Saved = {}
        for name, state in saved.items():
            places = now[name]
            used = {k: v for k, v in state.items() if fits(name, k, v, places.get(k))}
            useless[name] = {k: v for k, v in state.items() if k not in used}
            fitting[name] = {**nothing_in(places), **used}
        reducer.compression.load_state_dict(fitting)
        self._tell(useless)

    def _tell(self, useless: Mapping[str, State]) -> None:
        """Tell of states that are dropped."""
        lost = {
            name: kinds
            for name, state in useless.items()
            if (kinds := sorted(k for k, v in state.items() if k not in COMMON and v.any()))
        }
        if lost:
            first = next(iter(lost))
            log.warning(
                "the state of compression of %d parameters (first %r: %s) has no place under the "
                "compression that they have now (%s), and is dropped; load it under the one with "
                "which it was saved",
                len(lost),
                first,
                ", ".join(lost[first]),
                self.policy.describe() or "none",
            )

    def report_loss(self, loss: float) -> None:
        """Let the guard see this rank's loss, also that of reducers to come."""
        self._loss = loss
        report_loss(self._reducers.values(), loss)

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far."""
        now = total(reducer.traffic() for reducer in self._reducers.values())
        return Traffic(*map(add, now, self._past))


def warn_of_unused(saved: Saved) -> None:
    """Tell of a state that comes where nothing is compressed."""
    if any(state for name, state in saved.items() if name != CHOICE):
        log.warning(
            "the state of compression of %d parameters is dropped: this optimizer compresses "
            "nothing (there is one rank, or op or compression have no state); what was left to "
            "be sent is lost",
            len(saved),
        )
