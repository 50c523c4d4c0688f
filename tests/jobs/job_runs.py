"""What a run of a job leaves behind, and which frameworks there are to run it in."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

#: Seconds for any one run, far above what it takes.
PATIENCE = 400

FRAMEWORKS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(needed) is None, reason=f"{needed} is not installed"
        ),
    )
    for name, needed in (("torch", "torch"), ("keras", "tensorflow"))
]


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        assert self.code == 0, self.out + self.err
        return json.loads((self.folder / "summary.json").read_text())  # type: ignore[no-any-return]


RunJob = Callable[..., Finished]
