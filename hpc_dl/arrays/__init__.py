"""How tensors of any framework become flat host arrays without a copy, and back."""

from hpc_dl.arrays.convert import from_host, host_view, is_device_tensor, torch_view
from hpc_dl.arrays.dtypes import BFLOAT16, HALF_TYPES
from hpc_dl.arrays.layout import Bucket, Layout, Parameter, plan

__all__ = [
    "BFLOAT16",
    "HALF_TYPES",
    "Bucket",
    "Layout",
    "Parameter",
    "from_host",
    "host_view",
    "is_device_tensor",
    "plan",
    "torch_view",
]
