"""Fit a line with compressed gradients.

hpc-dl launch -n 2 train.py
"""

import torch

import hpc_dl.torch as hvd

hvd.init()
torch.manual_seed(0)
truth = torch.randn(128, 256)
model = torch.nn.Linear(128, 256)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=20.0),
    named_parameters=model.named_parameters(),
    compression="ternary:factor=0.5",
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
torch.manual_seed(1 + hvd.rank())
losses = []
for _ in range(60):
    x = torch.randn(64, 128)
    loss = (model(x) - x @ truth).square().mean()
    losses.append(hvd.allreduce(loss.detach()).item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if hvd.rank() == 0:
    sent = optimizer.traffic()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"{sent.bytes_dense / sent.bytes_sent:.1f} times fewer bytes")
