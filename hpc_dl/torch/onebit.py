"""Adam and LAMB that send their momentum, compressed, once the variance is known.

Dividing by the variance is what error feedback does not survive. So these optimizers begin with
plain gradients, keep the variance they have after ``freeze_step`` steps, and are linear in the
gradient from then on: the momentum can be compressed as hard as that of SGD.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from hpc_dl.compress import Policy
from hpc_dl.compress.shared_momentum import shared_momentum
from hpc_dl.errors import OptionError, UnsupportedError

log = logging.getLogger("hpc_dl")

State = dict[str, Any]
Group = dict[str, Any]


class SharedMomentum(torch.optim.Optimizer, ABC):
    """What both have in common; without ``DistributedOptimizer`` it takes the momentum itself."""

    #: Whether gradients are momentum after ``freeze_step``; ``DistributedOptimizer`` sees to it.
    receives_momentum = False
    #: Whether sparse gradients travel as dense ones, and so are momentum like all others.
    sparse_as_dense = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        freeze_step: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        floor: float = 0.1,
        compression: Any = "onebit",
        others: Mapping[str, Any] | None = None,
    ):
        """Check the options.

        Args:
            others: options of groups of parameters that only one of the two has.
        """
        self.freeze_step, self._compression = freeze_step, compression
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "floor": floor,
            "steps": 0,
            **(others or {}),
        }
        super().__init__(params, defaults)
        self.policy()

    def policy(self) -> Policy:
        """Say how ``DistributedOptimizer`` is to average gradients.

        Raises:
            OptionError: groups of parameters with several betas, or a bad compression.
        """
        beta = _check_beta(self.param_groups)
        return shared_momentum(self._compression, beta, self.freeze_step)

    @property
    def steps(self) -> int:
        """The number of steps taken; a step that a GradScaler skips is none."""
        return int(self.param_groups[0]["steps"])

    def momentum(self, p: torch.Tensor) -> torch.Tensor | None:
        """Return a parameter's momentum, None before its first step."""
        found: torch.Tensor | None = self.state.get(p, {}).get("exp_avg")
        return found

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, before the first step.

        Raises:
            OptionError: later, when their variance would never be known; or bad options, such
                as another first beta.
        """
        if self.param_groups and self.steps:
            raise OptionError(
                f"{type(self).__name__} has taken {self.steps} steps; add parameters before the "
                "first one, as the variance of all is frozen together"
            )
        options = {**self.defaults, **param_group}
        _check(options)
        _check_beta([*self.param_groups, options])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Raises:
            UnsupportedError: a sparse or a complex gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        frozen = self.steps >= self.freeze_step
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, self._dense(p.grad), group, frozen)
            group["steps"] += 1
        if self.steps == self.freeze_step:
            self._warn_of_unseen()
        return loss

    def _dense(self, grad: torch.Tensor) -> torch.Tensor:
        if torch.is_complex(grad):
            raise UnsupportedError(
                f"{type(self).__name__} takes real parameters only; this gradient is {grad.dtype}"
            )
        if not grad.is_sparse:
            return grad
        if not self.sparse_as_dense:
            raise UnsupportedError(
                f"{type(self).__name__} got a sparse gradient, whose momentum is dense all the "
                "same; make the embedding with sparse=False, or give DistributedOptimizer "
                "sparse_as_dense=True"
            )
        return grad.to_dense()

    def _step_one(self, p: torch.Tensor, grad: torch.Tensor, group: Group, frozen: bool) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, variance_step=0)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        before = state["exp_avg"].clone() if frozen and self._looks_back else None
        if frozen and self.receives_momentum:
            state["exp_avg"].copy_(grad)
        else:
            state["exp_avg"].lerp_(grad, 1 - beta1)
        if not frozen:
            state["variance_step"] += 1
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        self._apply(p, state, group, before)

    #: Whether ``_apply`` needs the momentum of the step before, after the warm-up.
    _looks_back = False

    @abstractmethod
    def _apply(
        self, p: torch.Tensor, state: State, group: Group, before: torch.Tensor | None
    ) -> None:
        """Change a parameter, whose momentum and variance are those of this step."""

    def _direction(self, state: State, group: Group) -> torch.Tensor:
        """Return momentum by deviation, both without the bias of their beginning.

        Compression gives entries of little momentum that of their neighbours, for a step or
        two; a deviation that is frozen near zero would make of that an enormous step. What has
        none at all stays as it is.
        """
        bias1 = 1 - group["betas"][0] ** state["step"]
        deviation = _deviation(state["exp_avg_sq"], state["variance_step"], group)
        if state["step"] > state["variance_step"] and group["floor"]:
            typical = deviation.square().mean().sqrt()
            deviation.clamp_(min=group["floor"] * typical)
        nothing = deviation == 0
        direction: torch.Tensor = (state["exp_avg"] / bias1).div_(deviation.add_(group["eps"]))
        direction.masked_fill_(nothing, 0)
        return direction

    def _warn_of_unseen(self) -> None:
        unseen = sum(1 for s in self.state.values() if not s["exp_avg_sq"].any())
        unseen += sum(len(g["params"]) for g in self.param_groups) - len(self.state)
        if unseen:
            log.warning(
                "%s: %d parameters have had no gradient in the %d steps of the warm-up, and will "
                "not change from now on; raise freeze_step if they are to learn",
                type(self).__name__,
                unseen,
                self.freeze_step,
            )


class OneBitAdam(SharedMomentum):
    """Adam whose ranks average compressed momentum after ``freeze_step`` steps.

    Until then it is Adam, with ``weight_decay`` AdamW. Then the variance stays as it is. Wrap
    it in ``DistributedOptimizer``, which then takes no other compression. Tang et al., "1-bit
    Adam", ICML 2021.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        freeze_step: steps of the warm-up; the paper takes 15 to 20 % of all, at least until the
            learning rate is at its largest.
        betas: of momentum and variance; the first must be the same for all groups.
        eps: added to the deviation.
        weight_decay: decoupled, as in AdamW.
        floor: the least deviation after the warm-up, in root mean squares of those of the same
            parameter; 0 is the paper's, which may diverge where inputs are often zero.
        compression: of the momentum, as in ``DistributedOptimizer``.

    Raises:
        OptionError: a bad option.

    >>> import hpc_dl.torch as hvd
    >>> hvd.init()
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = hvd.OneBitAdam(model.parameters(), lr=1e-3, freeze_step=100)
    >>> optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    >>> hvd.shutdown()
    """

    def _apply(
        self, p: torch.Tensor, state: State, group: Group, before: torch.Tensor | None
    ) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(self._direction(state, group), alpha=-group["lr"])


class OneBitLamb(SharedMomentum):
    """LAMB whose ranks average compressed momentum after ``freeze_step`` steps.

    In the warm-up each parameter's step is scaled by its trust ratio, the norm of the parameter
    by the norm of the step. Then the ratio's running average stays, times the largest ratio of
    the deviation that was frozen and the one that goes on, which is estimated from two momenta.
    Li et al., "1-bit LAMB", 2021.

    Args:
        params, lr, freeze_step, betas, eps, weight_decay, floor, compression: as for
            ``OneBitAdam``; ``weight_decay`` is part of the step that is scaled.
        ratio_range: the least and the largest trust ratio.
        ratio_beta: of the running average of trust ratios.
        factor_range: the least and the largest factor of the frozen ratio.
        factor_change: the part by which that factor may change in one step.

    Raises:
        OptionError: a bad option.
    """

    _looks_back = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        freeze_step: int,
        ratio_range: tuple[float, float] = (0.01, 10.0),
        ratio_beta: float = 0.9,
        factor_range: tuple[float, float] = (0.5, 4.0),
        factor_change: float = 0.1,
        **options: Any,
    ):
        """Check the options."""
        super().__init__(
            params,
            lr,
            freeze_step=freeze_step,
            others={
                "ratio_range": ratio_range,
                "ratio_beta": ratio_beta,
                "factor_range": factor_range,
                "factor_change": factor_change,
            },
            **options,
        )

    def _apply(
        self, p: torch.Tensor, state: State, group: Group, before: torch.Tensor | None
    ) -> None:
        direction = self._direction(state, group).add_(p, alpha=group["weight_decay"])
        if before is None:
            ratio = _trust(p, direction, group["ratio_range"])
            average = state.get("ratio", ratio)
            state["ratio"] = average + (1 - group["ratio_beta"]) * (ratio - average)
        else:
            ratio = state.setdefault("ratio", 1.0) * self._factor(state, group, before)
        p.add_(direction, alpha=-group["lr"] * ratio)

    def _factor(self, state: State, group: Group, before: torch.Tensor) -> float:
        """Return by how much the gradient has shrunk since the variance was frozen, about."""
        beta1, beta2 = group["betas"]
        frozen = state["exp_avg_sq"]
        if "fresh_sq" not in state:
            state["fresh_sq"], state["factor"] = frozen.clone(), 1.0
        gradient = (state["exp_avg"] - beta1 * before).div_(1 - beta1)
        fresh = state["fresh_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        then = _deviation(frozen, state["variance_step"], group).add_(group["eps"])
        now = _deviation(fresh, state["step"], group).add_(group["eps"])
        ratios = then.div_(now).masked_fill_(frozen == 0, 0)
        if not ratios.numel():
            return float(state["factor"])
        least, most = group["factor_range"]
        low, high = (state["factor"] * (1 + sign * group["factor_change"]) for sign in (-1, 1))
        factor: float = min(max(float(ratios.max()), low, least), high, most)
        state["factor"] = factor
        return factor


def _deviation(variance: torch.Tensor, steps: int, group: Group) -> torch.Tensor:
    """Return the root of a running average of squares, without the bias of its beginning."""
    bias = 1 - group["betas"][1] ** max(steps, 1)
    return variance.sqrt().div_(bias**0.5)


def _trust(p: torch.Tensor, direction: torch.Tensor, bounds: tuple[float, float]) -> float:
    """Return LAMB's trust ratio, 1 where there is none."""
    own, change = float(p.norm()), float(direction.norm())
    return min(max(own / change, bounds[0]), bounds[1]) if own > 0 and change > 0 else 1.0


def _check_beta(groups: Sequence[Group]) -> float:
    """Return the first beta, which all groups must share."""
    betas = {float(group["betas"][0]) for group in groups}
    if len(betas) > 1:
        raise OptionError(
            f"groups of parameters have the first betas {sorted(betas)}; give one for all, as "
            "their momentum travels together"
        )
    return betas.pop()


def _check(options: dict[str, Any]) -> None:
    """Check the options of groups that both optimizers have."""
    least = {"lr": 0.0, "eps": 0.0, "weight_decay": 0.0, "floor": 0.0}
    for name, bound in least.items():
        if not options[name] >= bound:
            raise OptionError(f"{name}={options[name]}; give {bound:g} or more")
    beta1, beta2 = options["betas"]
    if not (0 < beta1 < 1 and 0 <= beta2 < 1):
        raise OptionError(f"betas={options['betas']}; give two numbers between 0 and 1")
