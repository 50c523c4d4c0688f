"""The public names of the adapters: exactly those listed, and all that Horovod has."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hpc_dl

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "public_names.json").read_text())

#: Public in Horovod's modules, and not offered: elastic jobs, and what is meant for itself.
LEFT_OUT = {
    "torch": {"check_extension", "sparse_allreduce_async"},
    "tensorflow": {
        "LocalGradientAggregationHelper",
        "check_extension",
        "check_num_rank_power_of_2",
        "gpu_available",
        "handle_average_backwards_compatibility",
        "refs_to_vars",
        "split_list",
        "vars_to_refs",
    },
    "keras": set(),
}
#: Files that show Horovod's own queues: there are none over the other communicators.
TIMELINE = {"start_timeline", "stop_timeline"}


def _declared(adapter: str) -> list[str]:
    source = (Path(hpc_dl.__file__).parent / adapter / "__init__.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise AssertionError(f"hpc_dl.{adapter} has no __all__")


@pytest.mark.parametrize("adapter", sorted(LEFT_OUT))
def test_names_are_those_listed(adapter: str) -> None:
    """A new name, or one that is gone, is a decision: change tests/golden with it."""
    assert _declared(adapter) == sorted(GOLDEN[adapter])


PROBE = """
import importlib, json, types
adapter = importlib.import_module("hpc_dl." + {0!r})
theirs = importlib.import_module("horovod." + {0!r}) if {1!r} else None
names = [
    name
    for name, value in vars(theirs or types.SimpleNamespace()).items()
    if not name.startswith("_")
    and not isinstance(value, types.ModuleType)
    and str(getattr(value, "__module__", "")).startswith("horovod")
]
absent = [name for name in adapter.__all__ if not hasattr(adapter, name)]
print(json.dumps([absent, [name for name in names if not hasattr(adapter, name)]]))
"""


@pytest.mark.parametrize("adapter", sorted(LEFT_OUT))
def test_names_are_there_and_horovod_has_no_other(adapter: str) -> None:
    module = {"keras": "tensorflow"}.get(adapter, adapter)
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    built = importlib.util.find_spec("horovod") is not None
    code = PROBE.format(adapter, built)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    absent, missing = json.loads(run.stdout.splitlines()[-1])
    assert absent == []
    if not built:
        pytest.skip("Horovod is not built: its names could not be compared")
    assert set(missing) <= LEFT_OUT[adapter] | TIMELINE
