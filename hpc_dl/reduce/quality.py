"""The guard of compression: look now and then at what it does to gradients, and suspend it.

All ranks see the same figures, so all suspend it on the same step: they flush their
residuals once, send bfloat16 for a while, and try again a few times.
"""

import logging
import math

import numpy as np

from hpc_dl.comm import Communicator
from hpc_dl.compress import Limits
from hpc_dl.reduce.exchange import Health

log = logging.getLogger("hpc_dl.compress")

_NOTHING = Health(0, 0, 0, 0, 0, 0)
#: Weight of a new loss in the running average.
_NEW = 0.1
#: The step until which compression is suspended for good.
_NEVER = 2**62


class Quality:
    """Decides, alike on all ranks, whether compression goes on."""

    def __init__(self, comm: Communicator, limits: Limits):
        """Begin with compression on."""
        self._comm, self._limits = comm, limits
        self._seen: list[Health] = []
        self._overflows = 0
        self._until = 0
        self._average_loss = math.nan
        self.loss: float | None = None
        """What this rank has reported since the guard looked at losses."""
        self.reasons: list[str] = []
        """Why compression was suspended, each time."""

    def looks(self, step: int) -> bool:
        """Tell whether this step is watched."""
        every = self._limits.every
        return every > 0 and step % every == every - 1

    def suspended(self, step: int) -> bool:
        """Tell whether gradients are sent uncompressed in this step."""
        return step < self._until

    def add(self, health: Health, overflowed: bool = False) -> None:
        """Take note of one bucket.

        Args:
            overflowed: what came out of the exchange is not finite.
        """
        self._seen.append(health)
        self._overflows += overflowed

    def judge(self, step: int) -> None:
        """Agree with all ranks, at the end of a watched step, whether to go on."""
        if not self.looks(step) or self.suspended(step):
            return
        seen, self._seen = self._seen, []
        overflows, self._overflows = self._overflows, 0
        # All ranks must take this path alike, so what is not finite is counted, not raised.
        mine = Health(*(sum(figures) for figures in zip(*seen, strict=True))) if seen else _NOTHING
        reported, self.loss = (0.0, 0.0) if self.loss is None else (1.0, self.loss), None
        rows = self._comm.exchange(np.array([*mine, overflows, *reported], np.float64))
        together = Health(*rows[:, :-3].sum(axis=0).tolist())
        loss = _mean(rows[rows[:, -2] > 0, -1].tolist())
        reason = None
        if seen:  # else nothing is compressed in this step
            reason = self._of_gradients(together, rows[:, -3].sum()) or self._of_loss(loss)
        if reason is not None:
            self._suspend(step, reason)
        elif loss is None or not math.isfinite(loss):
            return
        elif math.isnan(self._average_loss):
            self._average_loss = loss
        else:
            self._average_loss += _NEW * (loss - self._average_loss)

    def _of_gradients(self, seen: Health, overflows: float) -> str | None:
        if seen.not_finite:  # This step is no matter of compression, and tells nothing.
            return None
        if overflows:
            return "finite gradients come out as not finite"
        both = math.sqrt(seen.whole * seen.sent)
        cosine = seen.product / both if both > 0 else 1.0
        if cosine < self._limits.min_cosine:
            return f"the cosine of a gradient and what is sent of it is {cosine:.3g}"
        ratio = math.sqrt(seen.left / seen.gradient) if seen.gradient > 0 else 0.0
        if ratio > self._limits.max_residual:
            return f"what is left of the steps before is {ratio:.3g} times the gradient"
        return None

    def _of_loss(self, loss: float | None) -> str | None:
        if loss is None:
            return None
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if loss > self._limits.max_loss * self._average_loss > 0:
            return f"the loss is {loss:.4g}, and was {self._average_loss:.4g}"
        return None

    def state(self) -> np.ndarray:
        """Return what must be saved."""
        loss = -1.0 if math.isnan(self._average_loss) else self._average_loss
        return np.array([self._until, len(self.reasons), loss], np.float64)

    def load(self, saved: np.ndarray) -> None:
        """Take up what ``state`` returned; of several, the longest suspension counts."""
        self._until = max(self._until, int(saved[0]))
        missing = int(saved[1]) - len(self.reasons)
        self.reasons += ["suspended before this run"] * missing
        if saved[2] >= 0:
            self._average_loss = float(saved[2])

    def _suspend(self, step: int, reason: str) -> None:
        self.reasons.append(reason)
        final = len(self.reasons) >= self._limits.tries
        self._until = _NEVER if final else step + 1 + self._limits.pause
        if self._comm.rank == 0:
            log.warning(
                "step %d: compression is suspended %s, gradients travel as bfloat16: %s",
                step,
                "for good" if final else f"for {self._limits.pause} steps",
                reason,
            )


def _mean(losses: list[float]) -> float | None:
    """Return the mean of what was reported, not finite if one is not; None for nothing."""
    return sum(losses) / len(losses) if losses else None
