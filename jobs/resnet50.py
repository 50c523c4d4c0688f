"""Train ResNet-50 on a folder of images such as ImageNet, or on noise to measure speed.

On any number of ranks, over any communicator, in PyTorch or Keras; see ``--help``.
"""

from pathlib import Path
from typing import Any, NamedTuple

import click

from hpc_dl import observe, world
from hpc_dl.cli.job import JobCommand, JobOptions, adapter, job_options, momentum_beside
from hpc_dl.data import Images, image_folder, list_images, synthetic_images
from hpc_dl.errors import OptionError
from hpc_dl.training import Outcome, Plan, facts
from hpc_dl.training.schedule import WarmupSteps

MOMENTUM = 0.9

#: Batches of noise in an epoch, and its number of classes.
SYNTHETIC_STEPS, SYNTHETIC_CLASSES = 10, 1000


class Options(NamedTuple):
    """The options of this job besides those of every job."""

    data: str
    image_size: int
    steps: int | None
    warmup_epochs: float | None
    weight_decay: float
    label_smoothing: float
    sync_batch_norm: bool
    workers: int


def load(common: JobOptions, own: Options) -> tuple[Images, Images | None]:
    """Return the images to learn from, and those to be tested on if there are any."""
    if own.data == "synthetic":
        count = (own.steps or SYNTHETIC_STEPS) * common.batch_size * world.size()
        noise = synthetic_images(count, own.image_size, SYNTHETIC_CLASSES, seed=common.seed)
        return noise, None
    train, test = Path(own.data, "train"), Path(own.data, "val")
    # One rank looks: a million files are not listed by each, and all number them alike.
    found = None
    if world.rank() == 0:
        found = list_images(train), list_images(test) if test.exists() else None
    to_learn, to_test = world.broadcast_object(found)
    learned = image_folder(
        train,
        own.image_size,
        augment=True,
        seed=common.seed,
        workers=own.workers,
        listing=to_learn,
    )
    if to_test is None:
        return learned, None
    tested = image_folder(test, own.image_size, workers=own.workers, listing=to_test)
    if tested.names != learned.names:
        raise OptionError(
            f"{train} has {learned.classes} classes and {test} has {tested.classes}, or they are "
            "called differently; both need the same folders"
        )
    return learned, tested


def train_torch(
    common: JobOptions, own: Options, plan: Plan, schedule: WarmupSteps, run: observe.Run
) -> Outcome:
    """Train in PyTorch."""
    import torch

    import hpc_dl.torch as hvd
    from hpc_dl.models.resnet50_torch import resnet50
    from hpc_dl.training.classify_torch import Learner, fit, own_device

    device = own_device()
    torch.manual_seed(common.seed)
    norm = hvd.SyncBatchNorm if own.sync_batch_norm else torch.nn.BatchNorm2d
    model = resnet50(plan.train.classes, norm).to(device)
    # Weights decay; biases, and what normalisation scales and shifts by, do not.
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": own.weight_decay},
        {"params": vectors},
    ]
    momentum = momentum_beside(common.compression, MOMENTUM)
    optimizer = torch.optim.SGD(
        groups, common.lr * plan.size, momentum=momentum, nesterov=momentum > 0
    )
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=common.compression,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=own.label_smoothing)
    return fit(Learner(model, optimizer, rates, loss), plan, run)


def train_keras(
    common: JobOptions, own: Options, plan: Plan, schedule: WarmupSteps, run: observe.Run
) -> Outcome:
    """Train in Keras."""
    import keras

    import hpc_dl.keras as hvd
    from hpc_dl.models.resnet50_keras import resnet50
    from hpc_dl.training.classify_keras import (
        Rates,
        SgdWithL2,
        SmoothedCrossentropy,
        fit,
        own_device,
    )

    own_device()
    keras.utils.set_random_seed(common.seed)
    normal = keras.layers.BatchNormalization
    norm = hvd.SyncBatchNormalization if own.sync_batch_norm else normal
    model = resnet50(own.image_size, plan.train.classes, norm)
    momentum = momentum_beside(common.compression, MOMENTUM)
    optimizer = SgdWithL2(
        common.lr * plan.size, momentum=momentum, nesterov=momentum > 0, l2=own.weight_decay
    )
    model.compile(
        optimizer=hvd.DistributedOptimizer(optimizer, compression=common.compression),
        loss=SmoothedCrossentropy(own.label_smoothing),
        metrics=["accuracy"],
    )
    return fit(model, plan, run, [Rates(common.lr * plan.size, schedule)])


@click.command("resnet50", cls=JobCommand)
@click.option(
    "--data",
    default="synthetic",
    show_default=True,
    metavar="synthetic|FOLDER",
    help="Noise, or a folder with train/CLASS/*.jpg and, to be tested on, val/CLASS/*.jpg.",
)
@click.option(
    "--image-size",
    type=click.IntRange(min=32),
    default=224,
    show_default=True,
    help="Height and width of the images, in pixels.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help=f"End each epoch after so many batches; else all of FOLDER, or {SYNTHETIC_STEPS} of "
    "noise.",
)
@click.option(
    "--warmup-epochs",
    type=click.FloatRange(min=0),
    help="Epochs in which the learning rate rises; else 1/18 of all.",
)
@click.option(
    "--weight-decay", type=click.FloatRange(min=0), default=1e-4, show_default=True, help="L2."
)
@click.option(
    "--label-smoothing",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="The part of each label that is given to all classes.",
)
@click.option("--sync-batch-norm", is_flag=True, help="Normalise over the batches of all ranks.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Threads that decode images, on each rank.",
)
@job_options(epochs=1, batch_size=32, lr=0.0125)
def main(**given: object) -> None:
    """Train ResNet-50.

    The learning rate is multiplied by the number of ranks, because the batch of a step is; it
    rises to that at the begin and falls to a tenth at 1/3, 2/3 and 8/9 of all steps. Writes
    summary.json, metrics.jsonl and curve.png.

    \b
    Examples:
      hpc-dl launch -n 2 jobs/resnet50.py --image-size 64 --batch-size 8
      srun python jobs/resnet50.py --data /data/imagenet --epochs 90
      python -m hpc_dl.jobs.resnet50 --steps 50 --framework keras
    """
    common = JobOptions(**{k: v for k, v in given.items() if k in JobOptions._fields})  # type: ignore[arg-type]
    own = Options(**{k: v for k, v in given.items() if k in Options._fields})  # type: ignore[arg-type]
    adapter(common.framework).init(comm=common.comm)
    train_images, test_images = load(common, own)
    plan = Plan(
        train_images,
        test_images,
        world.rank(),
        world.size(),
        common.epochs,
        common.batch_size,
        common.seed,
        own.steps,
        ahead=0 if own.data == "synthetic" else 2,
    )
    steps = plan.epochs * plan.steps
    warmup = steps // 18 if own.warmup_epochs is None else round(own.warmup_epochs * plan.steps)
    schedule = WarmupSteps(steps, warmup, 1 / plan.size)
    train = {"torch": train_torch, "keras": train_keras}[common.framework]
    first = plan.rank == 0
    folder = world.broadcast_object(
        observe.make_run_folder(common.run_dir, "resnet50") if first else None
    )
    with observe.Run(folder if first else None, plan.epochs, plan.steps) as run:
        outcome = train(common, own, plan, schedule, run)
        run.finish(facts("resnet50", {**own._asdict(), **common._asdict()}, outcome, __file__))


if __name__ == "__main__":
    main()
