"""What compression of one optimizer's gradients keeps beside its reducers.

That is the policy, which ``auto`` chooses after some steps, and what each parameter owes. It
belongs to the parameter: where the sets of gradients change from step to step, several reducers
know a parameter, and one of them holds its state, the one that reduced it last.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from operator import add
from typing import Any

from hpc_dl.arrays import Parameter
from hpc_dl.comm import Op
from hpc_dl.compress import Floats, Policy
from hpc_dl.reduce import Reducer, Saved, Traffic
from hpc_dl.reduce.reducer import report_loss
from hpc_dl.reduce.traffic import total
from hpc_dl.world.choice import CHOICE, Choice
from hpc_dl.world.group import Group
from hpc_dl.world.owed import (
    COMMON,
    State,
    compressed_by,
    fits,
    nothing_in,
    parameters_of,
    settled,
    state_of,
)

log = logging.getLogger("hpc_dl.compress")

#: What is true under any scheme.
_OWED = ("residual", *COMMON)


class Compression:
    """The policy in force, the state of each parameter, and the traffic so far."""

    def __init__(self, group: Group, policy: Policy):
        """Begin without reducers; all ranks call this alike."""
        self._group = group
        self._choice = Choice(group, policy)
        self._policies: dict[Reducer, Policy] = {}
        self._holder: dict[str, Reducer] = {}
        self._waiting: Saved = {}
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
            True if the policy is another one from now on: add to the gradients what
            ``settle_up`` returns, and make reducers anew.

        Raises:
            MismatchError: on all ranks, which have taken up states with different choices.
        """
        return self._choice.decide(began, waited, parameters, capacity, device)

    def settle_up(self, present: Collection[str], op: Op, scale: float) -> dict[str, Floats]:
        """Part with the reducers; all ranks call this alike after ``decide``.

        Args:
            present: names of the gradients of this step.
            op: how they were combined, like ``scale``.

        Returns:
            What the ranks owe together of those that are not compressed any more, to be added
            to what came out.
        """
        owed: dict[str, Floats] = {}
        for reducer in self._policies:
            parameters = parameters_of(reducer)
            for name, state in self._settled(reducer, self._held(reducer)).items():
                compressed = self.policy.travel(*parameters[name]).scheme is not None
                if compressed or name not in present:
                    # The rest is of the scheme that is left.
                    self._waiting[name] = {k: v for k, v in state.items() if k in _OWED}
                elif "residual" in state:
                    owed[name] = state["residual"]
                    self._group.comm.allreduce(owed[name], op, scale)
        self._past = self.traffic()
        self._policies.clear()
        self._holder.clear()
        return owed

    # --- the reducers ---------------------------------------------------------------

    def add(self, reducer: Reducer) -> None:
        """Take note of a new reducer."""
        self._policies[reducer] = self.policy
        if self._loss is not None:
            report_loss([reducer], self._loss)
        if self.policy.auto is None:
            covered = set(compressed_by(reducer))
            dense = parameters_of(reducer).keys() - covered
            self._drop({name: state for name, state in self._waiting.items() if name in dense})

    def hold(self, reducer: Reducer) -> None:
        """Move to a reducer what its parameters owe, before it reduces them.

        It stays on each rank: what this rank owes of sums becomes part of what it owes.

        Raises:
            OptionError: the state that was loaded is of parameters of other sizes.
        """
        elsewhere = [n for n in compressed_by(reducer) if self._holder.get(n) is not reducer]
        if not elsewhere:
            return
        moved: Saved = {n: self._waiting[n] for n in elsewhere if n in self._waiting}
        for other in self._policies:
            moved |= self._settled(other, set(self._held(other)).intersection(elsewhere))
        self._install(reducer, moved)
        for name in elsewhere:
            self._holder[name] = reducer
            self._waiting.pop(name, None)

    def _held(self, reducer: Reducer) -> list[str]:
        """Return the names of the parameters of which a reducer holds the state."""
        return [name for name in compressed_by(reducer) if self._holder.get(name) is reducer]

    def _settled(self, reducer: Reducer, names: Collection[str]) -> Saved:
        """Return states in which what this rank owes of sums is part of its residual.

        For those lie elsewhere in other buckets.
        """
        if not names:
            return {}
        state, parameters = state_of(reducer), parameters_of(reducer)
        policy = self._policies[reducer]
        return {
            name: settled(state[name], parameters[name], policy, self._group.comm.size)
            for name in names
        }

    # --- the state ------------------------------------------------------------------

    def state(self) -> Saved:
        """Return what is kept between steps on this rank, by parameter; and auto's choice."""
        saved = dict(self._waiting)
        known = Counter(name for reducer in self._policies for name in compressed_by(reducer))
        for reducer in self._policies:
            names = self._held(reducer)
            # What lies in several sets may well be loaded into other buckets.
            moving = {name for name in names if known[name] > 1}
            saved |= self._settled(reducer, moving)
            if len(moving) < len(names):
                state = state_of(reducer)
                saved |= {name: state[name] for name in names if name not in moving}
        return saved | self._choice.state()

    def load(self, saved: Saved) -> None:
        """Replace the state by what ``state`` returned, now or as soon as there are reducers.

        What is not in ``saved`` owes nothing from now on.

        Raises:
            OptionError: a state of parameters of other sizes.
        """
        self._choice.load(saved)
        self._waiting = {name: state for name, state in saved.items() if name != CHOICE}
        for reducer in self._policies:
            names = self._held(reducer)
            self._install(
                reducer, {name: self._waiting.get(name, {}) for name in names}, clear=True
            )
            for name in names:
                self._waiting.pop(name, None)

    def _install(self, reducer: Reducer, saved: Saved, clear: bool = False) -> None:
        """Load states of parameters into a reducer, and tell of what has no place there."""
        if reducer.compression is None or not saved:
            return
        now = state_of(reducer)
        useless: Saved = {}
        fitting: Saved = {}
        for name, state in saved.items():
            places = now[name]
            used = {k: v for k, v in state.items() if k in places and fits(name, k, v, places[k])}
            rest = {k: v for k, v in state.items() if k not in used}
            if rest:
                useless[name] = rest
            fitting[name] = {**(nothing_in(places) if clear else {}), **used}
        reducer.compression.load_state_dict(fitting)
        self._drop(useless)

    def _drop(self, useless: Mapping[str, State]) -> None:
        """Forget states, and tell of them."""
        lost = {
            name: kinds
            for name, state in useless.items()
            if (kinds := sorted(k for k, v in state.items() if k not in COMMON and v.any()))
        }
        for name in list(useless):
            self._waiting.pop(name, None)
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
        report_loss(self._policies, loss)

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far."""
        now = total(reducer.traffic() for reducer in self._policies)
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
