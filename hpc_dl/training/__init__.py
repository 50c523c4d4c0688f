"""Train and test a classifier of images: the loop that jobs share, for each framework."""

from hpc_dl.training.facts import facts
from hpc_dl.training.plan import Outcome, Plan

__all__ = ["Outcome", "Plan", "facts"]
