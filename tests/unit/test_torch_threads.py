"""The torch adapter over the communicators of a single process."""

import pytest
import torch
from torch_training import OPTIMIZERS, furthest, train_alone, train_sharded

import hpc_dl.torch as hvd
from hpc_dl.comm import SerialCommunicator, run_threads
from hpc_dl.errors import NotInitializedError


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_n_threads_train_like_one_rank(name, size):
    def rank_main(comm):
        hvd.init(comm)
        try:
            assert (hvd.rank(), hvd.size()) == (comm.rank, size)
            return train_sharded(OPTIMIZERS[name], 4, 24, torch.float64)
        finally:
            hvd.shutdown()

    alone = train_alone(OPTIMIZERS[name], 4, 24, torch.float64)
    for net in run_threads(size, rank_main):
        assert furthest(alone, net) <= 1e-10


def test_serial_is_exactly_the_plain_optimizer():
    hvd.init(SerialCommunicator())
    try:
        alone = train_alone(OPTIMIZERS["sgd"], 4, 24, torch.float32)
        assert furthest(alone, train_sharded(OPTIMIZERS["sgd"], 4, 24, torch.float32)) == 0
    finally:
        hvd.shutdown()


def test_before_init_and_after_shutdown():
    assert not hvd.is_initialized()
    with pytest.raises(NotInitializedError, match=r"call init\(\) first"):
        hvd.rank()
    with pytest.raises(NotInitializedError):
        hvd.allreduce(torch.zeros(1))
