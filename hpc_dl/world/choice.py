"""What ``compression="auto"`` has chosen: alike on all ranks, and again when a run is resumed."""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from hpc_dl.arrays import Parameter
from hpc_dl.compress import Policy, policy_of
from hpc_dl.errors import MismatchError
from hpc_dl.reduce import Saved
from hpc_dl.reduce.choose import Chooser
from hpc_dl.world.group import Group

log = logging.getLogger("hpc_dl.compress")

#: Under this name, which no parameter has, a state holds what was chosen.
CHOICE = "compression=auto"


class Choice:
    """The policy of one optimizer; with ``auto``, how it comes to it."""

    def __init__(self, group: Group, policy: Policy):
        """Begin to watch, if there is something to choose; all ranks call this alike."""
        self.policy = policy
        self._group, self._auto = group, policy.auto
        self._chosen: str | None = None
        self._loaded: str | None = None
        self._seen_steps = False
        self._chooser: Chooser | None = None
        if policy.auto is not None:
            self._chooser = Chooser(policy.auto, group.counter("compression.auto"))
            self._known = {_spec(p): p for p in map(policy_of, policy.auto.candidates)}

    @property
    def automatic(self) -> bool:
        """Whether the policy is, or was, for ``auto`` to choose."""
        return self._auto is not None

    @property
    def deciding(self) -> bool:
        """Whether steps are still watched, to choose or to choose again."""
        return self._chooser is not None

    def gradient(self) -> None:
        """Say that a gradient is ready."""
        if self._chooser is not None:
            self._chooser.gradient()

    def decide(
        self,
        began: float,
        waited: float,
        parameters: Iterable[Parameter],
        capacity: int,
        device: Any = None,
    ) -> bool:
        """Say that a step has been reduced; return whether the rules are others from now on.

        Args, Raises: as for ``Compression.decide``.
        """
        self._seen_steps = True
        chooser = self._chooser
        if chooser is None:
            return False
        chooser.step(began, waited)
        if not (chooser.due() and self._group.all_present()):
            return False
        before, loaded = self.policy.rules, self._loaded_anywhere()
        if loaded is None:
            comm = self._group.comm
            self._take(chooser.choose(comm, list(parameters), capacity, device), chooser.settled)
        else:
            self._take(self._known[loaded])
        return self.policy.rules != before

    def state(self) -> Saved:
        """Return what must be saved of the choice."""
        chosen = self._chosen or self._loaded
        return {} if chosen is None else {CHOICE: {"chosen": np.array(chosen)}}

    def load(self, saved: Saved) -> None:
        """Take up what was chosen: before the first step at once, later when it is decided."""
        if self._auto is None or CHOICE not in saved:
            return
        loaded = str(saved[CHOICE]["chosen"])
        if loaded not in self._known:
            log.warning(
                "the state of compression=auto was saved with the choice %s, which is not among "
                "the candidates now (%s); it is chosen anew",
                loaded,
                "; ".join(self._known),
            )
        elif self._chosen is not None:
            if loaded != self._chosen:
                log.warning(
                    "the state of compression=auto was saved with the choice %s; this run has "
                    "chosen %s before, and goes on with that",
                    loaded,
                    self._chosen,
                )
        elif self._seen_steps:
            self._loaded = loaded
        else:
            self._take(self._known[loaded])

    def _take(self, policy: Policy, settled: bool = True) -> None:
        self.policy = self.policy._replace(rules=policy.rules, auto=None)
        self._chosen, self._loaded = _spec(policy), None
        if settled:
            self._chooser = None

    def _loaded_anywhere(self) -> str | None:
        """Agree on what the ranks have loaded since the first step."""
        specs = list(self._known)
        mine = -1 if self._loaded is None else specs.index(self._loaded)
        everyone = self._group.comm.exchange(np.array([mine], np.int64)).reshape(-1).tolist()
        found = sorted({index for index in everyone if index >= 0})
        if len(found) > 1:
            raise MismatchError(
                "ranks have loaded states of compression=auto with different choices: "
                f"{' and '.join(specs[index] for index in found)}; load those of the same step"
            )
        return specs[found[0]] if found else None


def _spec(policy: Policy) -> str:
    return policy.rules[0].scheme.describe() if policy.rules else "none"
