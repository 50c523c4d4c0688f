"""The Keras networks match what is said of them; in a process without other frameworks."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("keras") is None or importlib.util.find_spec("tensorflow") is None,
    reason="Keras with TensorFlow is not installed",
)

NETWORKS = """
import keras, numpy as np
import hpc_dl.keras as hvd
from hpc_dl.models.digits_keras import digits_cnn
from hpc_dl.models.resnet50_keras import resnet50

def trained(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)

assert trained(digits_cnn()) == 151_306
assert digits_cnn()(np.zeros((3, 8, 8, 1), "float32")).shape == (3, 10)
plain = resnet50(32, 1000)
synced = resnet50(32, 1000, hvd.SyncBatchNormalization)
assert trained(plain) == trained(synced) == 25_583_592
norms = [[l for l in m.layers if "Normalization" in type(l).__name__] for m in (plain, synced)]
assert len(norms[0]) == len(norms[1]) == 53
assert {type(layer) for layer in norms[1]} == {hvd.SyncBatchNormalization}
# 3 + 4 + 6 + 3 blocks begin as the identity.
assert sum(not np.any(layer.gamma.numpy()) for layer in norms[1]) == 16
assert synced(np.zeros((2, 32, 32, 3), "float32")).shape == (2, 1000)
"""

L2 = """
import keras, numpy as np
from hpc_dl.training.classify_keras import SgdWithL2

matrix, vector = (keras.Variable(np.ones(n), dtype="float32") for n in ((2, 2), 2))
optimizer = SgdWithL2(0.1, momentum=0.9, l2=0.5)
optimizer.build([matrix, vector])
w, velocity = 1.0, 0.0
for step in range(3):
    optimizer.apply([np.full((2, 2), 0.25, "float32"), np.full(2, 0.0, "float32")])
    velocity = 0.9 * velocity + 0.25 + 0.5 * w  # PyTorch's SGD
    w -= 0.1 * velocity
np.testing.assert_allclose(matrix.numpy(), w, rtol=1e-5)
np.testing.assert_allclose(vector.numpy(), 1.0)
assert SgdWithL2.from_config(optimizer.get_config()).l2 == 0.5
"""

LOSS = """
import keras, numpy as np
from hpc_dl.training.classify_keras import SmoothedCrossentropy

generator = np.random.default_rng(0)
logits = generator.normal(size=(6, 5)).astype("float32")
labels = generator.integers(0, 5, 6)
for smoothing in (0.0, 0.1, 0.9):
    ours = SmoothedCrossentropy(smoothing)(labels, logits)
    theirs = keras.losses.CategoricalCrossentropy(True, label_smoothing=smoothing)(
        np.eye(5)[labels], logits
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
"""


@pytest.mark.parametrize("script", [NETWORKS, LOSS, L2], ids=["networks", "loss", "l2"])
def test_in_keras(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
