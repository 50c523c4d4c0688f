"""Ranks with different numbers of batches: the first to finish waits in ``join``.

hpc-dl launch -n 2 examples/torch/uneven_batches.py
"""

import torch

import hpc_dl.torch as hvd

hvd.init()
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
hvd.broadcast_parameters(model.state_dict())
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters()
)

# Rank r has 2 r + 3 batches.
batches = 2 * hvd.rank() + 3
for _ in range(batches):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()

# From here this rank contributes zeros until the others have finished too. The last one to
# join has made all the steps, so it holds the newest parameters.
last = hvd.join()
hvd.broadcast_parameters(model.state_dict(), root_rank=last)
print(f"rank {hvd.rank()}: {batches} batches; rank {last} was the last", flush=True)
