"""Compression of gradients: plugins with explicit state, on flat float32 arrays.

A compressor is named by a spec string such as ``topk:ratio=0.01``; see ``registry`` for the
names and ``base`` for how to write one.
"""

from hpc_dl.compress.base import (
    AllReduced,
    Array,
    Bytes,
    Codec,
    Compressor,
    Floats,
    Reduction,
    Round,
    Segment,
    Sparse,
    Sparsifier,
    State,
    Step,
    Unit,
)
from hpc_dl.compress.pairs import unchecked
from hpc_dl.compress.registry import make, names
from hpc_dl.compress.rules import Auto, Limits, Policy, Rule, only, policy_of
from hpc_dl.compress.scheme import Scheme, error_feedback, momentum_correction, warmup

__all__ = [
    "AllReduced",
    "Array",
    "Auto",
    "Bytes",
    "Codec",
    "Compressor",
    "Floats",
    "Limits",
    "Policy",
    "Reduction",
    "Round",
    "Rule",
    "Scheme",
    "Segment",
    "Sparse",
    "Sparsifier",
    "State",
    "Step",
    "Unit",
    "error_feedback",
    "make",
    "momentum_correction",
    "names",
    "only",
    "policy_of",
    "unchecked",
    "warmup",
]
