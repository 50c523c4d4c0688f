"""Low-rank approximation of gradients by power iteration."""

import functools
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hpc_dl.compress.base import AllReduced, Floats, Reduction, Round, Segment, State, Step, Unit
from hpc_dl.compress.kernels import lowrank
from hpc_dl.compress.products import Products
from hpc_dl.compress.random import generator, key_of
from hpc_dl.errors import OptionError


class _Matrix(NamedTuple):
    """A parameter that is sent as P (height, rank) and Q (width, rank)."""

    segment: Segment
    height: int
    width: int

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    def of(self, flat: Any) -> Any:
        """View it in a flat array."""
        return flat[self.segment.offset : self.segment.stop].reshape(self.height, self.width)


class _Plan(NamedTuple):
    """What of a unit is of low rank, and the ranges of the rest, which are sent as they are."""

    matrices: tuple[_Matrix, ...]
    dense: tuple[tuple[int, int], ...]

    @property
    def dense_size(self) -> int:
        return sum(stop - start for start, stop in self.dense)

    def size(self, axis: int, rank: int) -> int:
        """Return the elements of all P (axis 0) or Q (axis 1)."""
        return rank * sum(matrix.sides[axis] for matrix in self.matrices)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Cut a shape in two where the matrix is nearest to a square, so that thin ones are small.

    Frameworks differ in where they put the output channels of a convolution.
    """
    cuts = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(cuts, key=sum)


@functools.lru_cache(maxsize=1024)
def _plan(unit: Unit, rank: int) -> _Plan:
    matrices, dense, end = [], [], 0
    for segment in unit.segments:
        if len(segment.shape) < 2 or segment.size == 0:
            continue
        height, width = _sides(segment.shape)
        if (height + width) * rank * 2 >= height * width:
            continue
        matrices.append(_Matrix(segment, height, width))
        dense.append((end, segment.offset))
        end = segment.stop
    dense.append((end, unit.size))
    return _Plan(tuple(matrices), tuple(part for part in dense if part[0] < part[1]))


@dataclass(frozen=True)
class PowerSgd(AllReduced):
    """Each matrix as a product of two thin ones, which all-reduce can average.

    A parameter of more than two dimensions is cut where the matrix is nearest to a square;
    vectors, and matrices that would not
    shrink by half at least, travel as they are in the same buffer as P. Vogels, Karimireddy,
    Jaggi: "PowerSGD: practical low-rank gradient compression", NeurIPS 2019.

    Args:
        rank: columns of the thin matrices.
        iterations: power iterations in each step; each costs two more all-reduces.
        warm_start: begin each step with the Q of the step before, instead of a random one.
    """

    rank: int = 4
    iterations: int = 1
    warm_start: bool = True

    name: ClassVar[str] = "powersgd"
    summary: ClassVar[str] = "matrices of low rank, by power iteration"
    reduction: ClassVar[Reduction] = Reduction.MULTI_ROUND
    needs_feedback: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option in ("rank", "iterations"):
            if getattr(self, option) < 1:
                raise OptionError(f"{option}={getattr(self, option)}; give a number from 1 on")

    def init(self, unit: Unit) -> State:
        """Draw each parameter's Q, stored transposed; the name alone decides."""
        if not self.warm_start:
            return {}
        return {
            f"q.{matrix.segment.name}": self._draw(matrix, matrix.segment.name)
            for matrix in _plan(unit, self.rank).matrices
        }

    def payload_bytes(self, unit: Unit, size: int) -> float:
        """Return four bytes for each value of P, Q and what is sent as it is."""
        plan = _plan(unit, self.rank)
        thin = plan.size(0, self.rank) + plan.size(1, self.rank)
        return 4 * (plan.dense_size + self.iterations * thin)

    def rounds(
        self, x: Floats, out: Floats, left: Floats | None, state: State, unit: Unit, step: Step
    ) -> Generator[Round, None, None]:
        """Average P = M Q, make it orthonormal, average Q = Mᵀ P; the average is P Qᵀ."""
        return self.rounds_with(Products(), x, out, left, state, unit, step)

    def rounds_with(
        self, products: Products, x: Any, out: Any, left: Any, state: State, unit: Unit, step: Step
    ) -> Generator[Round, None, None]:
        """Do what ``rounds`` does with arrays of another kind; ``state`` stays on the host."""
        plan = _plan(unit, self.rank)
        drawn = np.empty(plan.size(1, self.rank), np.float32)
        for matrix, part in zip(plan.matrices, _parts(drawn, plan, 1, self.rank), strict=True):
            part[:] = self._start(matrix, state, step)
        q_all = products.from_host(drawn)
        q_of, p_of = _parts(q_all, plan, 1, self.rank), []
        thin = plan.size(0, self.rank)
        for iteration in range(self.iterations):
            p_all = products.empty(thin + (0 if iteration else plan.dense_size))
            if len(p_all) > thin:
                products.join([x[a:b] for a, b in plan.dense], p_all[thin:])
            for matrix, q, p in zip(
                plan.matrices, q_of, _columns(p_all, plan, self.rank), strict=True
            ):
                products.times(matrix.of(x), q, p)
            if len(p_all):
                yield Round(p_all, "average")
            if len(p_all) > thin:
                _spread(p_all[thin:], plan, out, left)
            p_of = self._orthonormal(products, plan, p_all[:thin])
            for matrix, q, p in zip(plan.matrices, q_of, p_of, strict=True):
                products.project(p, matrix.of(x), q)
            if len(q_all):
                yield Round(q_all, "average")
        for matrix, p, q in zip(plan.matrices, p_of, q_of, strict=True):
            rest = None if left is None else matrix.of(left)
            products.multiply(p, q, matrix.of(x), matrix.of(out), rest)
        if self.warm_start:
            after = _parts(products.to_host(q_all), plan, 1, self.rank)
            for matrix, q in zip(plan.matrices, after, strict=True):
                state[f"q.{matrix.segment.name}"] = q.copy()

    def _orthonormal(self, products: Products, plan: _Plan, p_all: Any) -> list[Any]:
        """Return orthonormal P, transposed: on the host, by the one kernel for this.

        So ranks that have averaged the same P go on with the same bytes, whatever GPU they have.
        """
        rows = np.empty(len(p_all), np.float32)
        host = _columns(products.to_host(p_all), plan, self.rank)
        for matrix, column, row in zip(
            plan.matrices, host, _parts(rows, plan, 0, self.rank), strict=True
        ):
            row[:] = column.T
            lowrank.orthonormalise(row, key_of("powersgd", matrix.segment.name))
        return _parts(products.from_host(rows), plan, 0, self.rank)

    def _draw(self, matrix: _Matrix, *key: int | str) -> Floats:
        shape = self.rank, matrix.width
        return generator("powersgd", *key).standard_normal(shape, np.float32)

    def _start(self, matrix: _Matrix, state: State, step: Step) -> Floats:
        """Return the Q to begin with; rows that are good for nothing are drawn anew."""
        name = matrix.segment.name
        q = state.get(f"q.{name}") if self.warm_start else None
        if q is None or q.shape != (self.rank, matrix.width):  # saved with another rank
            return self._draw(matrix, name, step.seed, step.number)
        bad = np.logical_not(np.isfinite(q).all(axis=1) & q.any(axis=1))
        if bad.any():
            q = np.where(bad[:, None], self._draw(matrix, name, step.seed, step.number), q)
        return q


def _parts(flat: Any, plan: _Plan, axis: int, rank: int) -> list[Any]:
    """View the matrices' parts of a buffer, each of shape (rank, length)."""
    parts, end = [], 0
    for matrix in plan.matrices:
        start, end = end, end + rank * matrix.sides[axis]
        parts.append(flat[start:end].reshape(rank, -1))
    return parts


def _columns(flat: Any, plan: _Plan, rank: int) -> list[Any]:
    """View the P of the matrices in a buffer, each of shape (height, rank)."""
    return [part.reshape(-1, rank) for part in _parts(flat, plan, 0, rank)]


def _spread(dense: Any, plan: _Plan, out: Any, left: Any) -> None:
    """Write averages to their places; nothing is left of them."""
    end = 0
    for a, b in plan.dense:
        start, end = end, end + b - a
        out[a:b] = dense[start:end]
        if left is not None:
            left[a:b] = 0
