"""Views between torch tensors and NumPy arrays: the same memory, or a clear error."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.arrays import BFLOAT16, from_host, host_view, is_device_tensor, torch_view
from hpc_dl.errors import UnsupportedError

TORCH_TYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: BFLOAT16,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
    torch.complex64: np.complex64,
}
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(shapes, st.sampled_from(list(TORCH_TYPES)))
def test_view_is_the_memory_of_the_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    array = host_view(tensor)
    assert array.shape == shape
    assert array.dtype == TORCH_TYPES[dtype]
    array[...] = 1
    assert bool((tensor == torch.ones(shape, dtype=dtype)).all())
    back = torch_view(array)
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    back.zero_()
    assert not array.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_kept(dtype: torch.dtype) -> None:
    tensor = torch.arange(12, dtype=dtype).reshape(3, 4)
    for part in (tensor.T, tensor[:, 1:3], tensor[::2]):
        array = host_view(part)
        assert array.flags.c_contiguous == part.is_contiguous()
        np.testing.assert_array_equal(array.astype(np.float64), part.double().numpy())


def test_tensors_that_need_gradients() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    host_view(parameter)[:] = 5
    assert parameter.tolist() == [5, 5, 5]
    assert host_view(parameter * 2).tolist() == [10, 10, 10]


def test_arrays_pass_as_they_are() -> None:
    array = np.arange(4)[::2]
    assert host_view(array) is array
    assert from_host(array, array) is array
    assert host_view([1, 2]).tolist() == [1, 2]
    assert host_view(3.0).shape == ()


def test_read_only_array_is_copied_for_torch() -> None:
    array = np.ones(3, np.float32)
    array.setflags(write=False)
    torch_view(array).zero_()
    assert array.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.int64])
def test_result_is_of_the_framework_of_the_argument(dtype: np.dtype[np.generic]) -> None:
    array = np.arange(3).astype(dtype)
    made = from_host(array, torch.zeros(1))
    assert isinstance(made, torch.Tensor)
    np.testing.assert_array_equal(host_view(made), array)
    assert host_view(made).dtype == dtype
    assert from_host(array, np.zeros(1)) is array


def test_sparse_tensor() -> None:
    with pytest.raises(UnsupportedError, match=r"sparse_coo.*to_dense"):
        host_view(torch.eye(2).to_sparse())


def test_tensor_elsewhere() -> None:
    tensor = torch.empty(2, device="meta")
    assert is_device_tensor(tensor)
    assert not is_device_tensor(torch.empty(2))
    assert not is_device_tensor(np.empty(2))
    with pytest.raises(UnsupportedError, match=r"meta.*\.cpu\(\)"):
        host_view(tensor)


def test_type_that_numpy_does_not_have() -> None:
    with pytest.raises(UnsupportedError, match=r"float8.*pass"):
        host_view(torch.zeros(2, dtype=torch.float8_e4m3fn))


def test_lazy_conjugate() -> None:
    with pytest.raises(UnsupportedError, match="resolve_conj"):
        host_view(torch.ones(2, dtype=torch.complex64).conj())
