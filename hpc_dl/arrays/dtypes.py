"""The number types that NumPy itself does not name."""

import ml_dtypes
import numpy as np

#: bfloat16 as a NumPy type.
BFLOAT16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)

#: 16-bit floats: summed in float32 and rounded once.
HALF_TYPES = (np.dtype(np.float16), BFLOAT16)
