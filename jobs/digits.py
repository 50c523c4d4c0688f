"""Train a small convolutional network on real handwritten digits.

On any number of ranks, over any communicator, in PyTorch or Keras; see ``--help``.
"""

import click

from hpc_dl import observe, world
from hpc_dl.cli.job import JobCommand, JobOptions, adapter, job_options, momentum_beside
from hpc_dl.data import digits
from hpc_dl.training import Outcome, Plan, facts

MOMENTUM = 0.9


def train_torch(options: JobOptions, plan: Plan, run: observe.Run) -> Outcome:
    """Train in PyTorch."""
    import torch
    from torch.nn.functional import cross_entropy

    import hpc_dl.torch as hvd
    from hpc_dl.models.digits_torch import digits_cnn
    from hpc_dl.training.classify_torch import Learner, fit, own_device

    device = own_device()
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(options.seed)
    model = digits_cnn().to(device)
    momentum = momentum_beside(options.compression, MOMENTUM)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr * plan.size, momentum=momentum, nesterov=momentum > 0
    )
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=options.compression,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.epochs * plan.steps)
    return fit(Learner(model, optimizer, cosine, cross_entropy), plan, run)


def train_keras(options: JobOptions, plan: Plan, run: observe.Run) -> Outcome:
    """Train in Keras."""
    import keras

    import hpc_dl.keras as hvd
    from hpc_dl.models.digits_keras import digits_cnn
    from hpc_dl.training.classify_keras import fit, own_device

    own_device()
    keras.utils.set_random_seed(options.seed)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    model = digits_cnn()
    cosine = keras.optimizers.schedules.CosineDecay(
        options.lr * plan.size, plan.epochs * plan.steps
    )
    momentum = momentum_beside(options.compression, MOMENTUM)
    optimizer = keras.optimizers.SGD(cosine, momentum=momentum, nesterov=momentum > 0)
    model.compile(
        optimizer=hvd.DistributedOptimizer(optimizer, compression=options.compression),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return fit(model, plan, run)


@click.command("digits", cls=JobCommand)
@job_options(epochs=10, batch_size=32, lr=0.04)
def main(**given: object) -> None:
    """Train a small convolutional network on scikit-learn's handwritten digits.

    The learning rate is multiplied by the number of ranks, because the batch of a step is, and
    falls along a cosine. Writes summary.json, metrics.jsonl and curve.png.

    \b
    Examples:
      python jobs/digits.py                              one rank
      hpc-dl launch -n 2 jobs/digits.py                  two ranks
      mpirun -np 2 python jobs/digits.py --comm horovod  two ranks, over Horovod
      hpc-dl launch -n 2 jobs/digits.py --framework keras --epochs 5
      hpc-dl launch -n 2 jobs/digits.py --compression powersgd:rank=4
      python -m hpc_dl.jobs.digits --run-dir /tmp/try    from an installed package
    """
    options = JobOptions(**given)  # type: ignore[arg-type]
    adapter(options.framework).init(comm=options.comm)
    data = digits()
    plan = Plan(
        data.train,
        data.test,
        world.rank(),
        world.size(),
        options.epochs,
        options.batch_size,
        options.seed,
    )
    train = {"torch": train_torch, "keras": train_keras}[options.framework]
    first = plan.rank == 0
    folder = world.broadcast_object(
        observe.make_run_folder(options.run_dir, "digits") if first else None
    )
    with observe.Run(folder if first else None, plan.epochs, plan.steps) as run:
        outcome = train(options, plan, run)
        run.finish(facts("digits", options._asdict(), outcome, __file__))


if __name__ == "__main__":
    main()
