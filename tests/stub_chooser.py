"""Stands for what ``compression="auto"`` measures and predicts: the choices are given."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from hpc_dl.compress import Policy


class Stub:
    """Chooses one policy after the other, each after so many steps."""

    settled = False

    def __init__(self, policies: Sequence[Policy], every: int):
        self._policies, self._every, self._steps = list(policies), every, 0

    def gradient(self) -> None:
        """Take no note."""

    def step(self, began: float, waited: float) -> None:
        """Count."""
        self._steps += 1

    def due(self) -> bool:
        """Tell whether to choose now."""
        return self._steps % self._every == 0

    def choose(self, comm: Any, parameters: Any, capacity: int, device: Any = None) -> Policy:
        """Return the next one."""
        chosen = self._policies.pop(0)
        self.settled = not self._policies
        return chosen


def let_auto_choose(
    monkeypatch: pytest.MonkeyPatch, policies: Callable[[], Sequence[Policy]], every: int = 1
) -> None:
    """Let each optimizer from now on choose the policies that it is given."""
    stub = "hpc_dl.world.choice.Chooser"
    monkeypatch.setattr(stub, lambda auto, count: Stub(policies(), every))
