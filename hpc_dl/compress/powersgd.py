"""Low-rank approximation of gradients by power iteration."""

import functools
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from hpc_dl.compress.base import AllReduced, Floats, Reduction, Round, Segment, State, Step, Unit
from hpc_dl.compress.kernels import lowrank
from hpc_dl.compress.random import generator, key_of
from hpc_dl.errors import OptionError

#: Rows of which the matrix product reads its operand once: they stay in the cache.
_ROWS = 64


class _Matrix(NamedTuple):
    """A parameter that is sent as P (height, rank) and Q (width, rank)."""

    segment: Segment
    height: int
    width: int

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    def of(self, flat: Floats) -> Floats:
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
        plan = _plan(unit, self.rank)
        q_all = np.empty(plan.size(1, self.rank), np.float32)
        q_of = _parts(q_all, plan, 1, self.rank)
        for matrix, q in zip(plan.matrices, q_of, strict=True):
            q[:] = self._start(matrix, state, step)
        p_of: list[Floats] = []
        for iteration in range(self.iterations):
            dense_size = 0 if iteration else plan.dense_size
            p_all = np.empty(plan.size(0, self.rank) + dense_size, np.float32)
            dense = p_all[len(p_all) - dense_size :]
            if dense_size:
                np.concatenate([x[a:b] for a, b in plan.dense], out=dense)
            p_of = [part.T for part in _columns(p_all, plan, self.rank)]
            for matrix, q, p in zip(plan.matrices, q_of, p_of, strict=True):
                _times(matrix.of(x), _unit(q).T.copy(), p.T)
            if len(p_all):
                yield Round(p_all, "average")
            if dense_size:
                _spread(dense, plan, out, left)
            for number, (matrix, q) in enumerate(zip(plan.matrices, q_of, strict=True)):
                p = p_of[number] = np.ascontiguousarray(p_of[number])
                lowrank.orthonormalise(p, key_of("powersgd", matrix.segment.name))
                np.matmul(p, matrix.of(x), out=q)
            if len(q_all):
                yield Round(q_all, "average")
        for matrix, p, q in zip(plan.matrices, p_of, q_of, strict=True):
            rest = matrix.of(out if left is None else left)
            lowrank.multiply(p, q, matrix.of(x), matrix.of(out), rest, left is not None)
            if self.warm_start:
                state[f"q.{matrix.segment.name}"] = q.copy()

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


def _parts(flat: Floats, plan: _Plan, axis: int, rank: int) -> list[Floats]:
    """View the matrices' parts of a buffer, each of shape (rank, length)."""
    parts, end = [], 0
    for matrix in plan.matrices:
        start, end = end, end + rank * matrix.sides[axis]
        parts.append(flat[start:end].reshape(rank, -1))
    return parts


def _columns(flat: Floats, plan: _Plan, rank: int) -> list[Floats]:
    """View the P of the matrices in a buffer, each of shape (height, rank)."""
    return [part.reshape(-1, rank) for part in _parts(flat, plan, 0, rank)]


def _unit(q: Floats) -> Floats:
    """Scale each row to norm 1: the products neither overflow nor underflow.

    What is spanned, which is all that counts, stays the same.
    """
    norms = np.sqrt(np.square(q, dtype=np.float64).sum(axis=1, keepdims=True))
    return np.asarray(q / np.maximum(norms, np.finfo(np.float64).tiny), np.float32)


def _times(matrix: Floats, q: Floats, out: Floats) -> None:
    """Multiply by a thin matrix, some rows at a time."""
    for start in range(0, len(matrix), _ROWS):
        np.matmul(matrix[start : start + _ROWS], q, out=out[start : start + _ROWS])


def _spread(dense: Floats, plan: _Plan, out: Floats, left: Floats | None) -> None:
    """Write averages to their places; nothing is left of them."""
    end = 0
    for a, b in plan.dense:
        start, end = end, end + b - a
        out[a:b] = dense[start:end]
        if left is not None:
            left[a:b] = 0
