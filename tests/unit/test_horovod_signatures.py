"""Arguments have Horovod's names and order, so that a script may pass them by position."""

import importlib
import inspect
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

pytest.importorskip("horovod.torch", reason="Horovod is not built; run `hpc-dl horovod build`")

PAIRS = {
    "hpc_dl.torch": "horovod.torch",
    "hpc_dl.tensorflow": "horovod.tensorflow",
    "hpc_dl.keras": "horovod.tensorflow.keras",
    "hpc_dl.keras.callbacks": "horovod.tensorflow.keras.callbacks",
}
#: With why they are not compared.
OTHERWISE = {
    "init": "Horovod's takes *args",
    "shutdown": "Horovod's takes *args",
    "ProcessSet": "MPI communicators are for init()",
    "PartialDistributedGradientTape": "passes options on",
}


@pytest.mark.parametrize("module", PAIRS)
def test_arguments_come_in_horovods_order(module: str) -> None:
    ours, theirs = importlib.import_module(module), importlib.import_module(PAIRS[module])
    compared = 0
    for name in ours.__all__:
        function, original = getattr(ours, name), getattr(theirs, name, None)
        if name in OTHERWISE or not callable(function) or original is None:
            continue
        try:
            wanted = list(inspect.signature(original).parameters)
        except ValueError:  # of a built-in or an enumeration
            continue
        found = list(inspect.signature(function).parameters)
        assert found[: len(wanted)] == wanted, name
        compared += 1
    assert compared > (4 if module.endswith("callbacks") else 20)
