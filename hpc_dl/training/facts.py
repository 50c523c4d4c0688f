"""What summary.json says about a run."""

import os
from collections.abc import Mapping
from typing import Any

from hpc_dl import world
from hpc_dl.errors import ReplicaDivergenceError
from hpc_dl.observe import git_commit, versions
from hpc_dl.training.plan import Outcome


def facts(
    job: str, options: Mapping[str, Any], outcome: Outcome, script: str | os.PathLike[str]
) -> dict[str, Any]:
    """Collect the facts of a run; all ranks call this at its end.

    Args:
        job: the name of the job.
        options: how it was called; ``comm`` is replaced by the communicator that was used.
        outcome: what came of it.
        script: the file of the job, for the commit it belongs to, which rank 0 asks for.

    Raises:
        ReplicaDivergenceError: the ranks end with different weights.
    """
    digests = world.allgather_object(outcome.weights_digest)
    if len(set(digests)) > 1:
        listed = ", ".join(f"rank {rank}: {digest[:16]}" for rank, digest in enumerate(digests))
        raise ReplicaDivergenceError(
            f"the ranks end with different weights ({listed}), so what they learned is not one "
            "model. Check that the optimizer is wrapped and that the weights were broadcast"
        )
    return {
        "job": job,
        **outcome._asdict(),
        "world_size": world.size(),
        **{name: value for name, value in options.items() if name != "run_dir"},
        "comm": world.current().comm.name,
        "versions": versions(),
        "git_commit": git_commit(script) if world.rank() == 0 else None,
    }
