"""Ranks that do different things end with an error that names both, instead of a hang."""

SCRIPT = """
import torch
import hpc_dl.torch as hvd
import hpc_dl.reduce.reducer as reducer

reducer.OVERLAP_BYTES = 0
hvd.init("mpi")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 1))
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
for step in range(3):
    optimizer.zero_grad()
    loss = model[1](model[0](torch.ones(2, 4).double()).float()).sum()
    if step == 2 and hvd.rank() == 0:
        loss = model[1].bias.sum()  # no gradient for the first layer on this rank
    loss.backward()
    hvd.allreduce(loss.detach(), name="loss")
    optimizer.step()
"""


def test_a_gradient_missing_on_one_rank_before_another_collective(launch):
    outcome = launch(SCRIPT)
    assert outcome.code != 0
    assert "called different things" in outcome.err
    assert "'loss'" in outcome.err
