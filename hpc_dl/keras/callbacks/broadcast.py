"""Give all ranks the model and the optimizer of one rank when training begins."""

from typing import Any

from hpc_dl.errors import OptionError
from hpc_dl.keras.backend import to_numpy
from hpc_dl.keras.callbacks.prepare import ModelCallback
from hpc_dl.keras.collectives import broadcast_variables, global_variables
from hpc_dl.keras.optimizer import is_distributed
from hpc_dl.reduce.guard import check_replicas
from hpc_dl.world import size
from hpc_dl.world.local import LocalVariables
from hpc_dl.world.process_sets import global_process_set


class BroadcastGlobalVariablesCallback(ModelCallback):
    """Broadcast all variables of model and optimizer from one rank.

    Seeds stay as they are: ranks that are to draw other dropout masks and augmentations, do.

    A model that is built is broadcast before the first batch; one that is built by the first
    batch after that batch, as in Horovod.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None):
        """Make the callback.

        Args:
            root_rank: the rank that has loaded a checkpoint; any rank if none has.
            device: accepted for Horovod's sake.
            local_variables: variables that stay as they are on each rank.
        """
        super().__init__()
        self.root_rank = root_rank
        self.broadcast_done = False
        self._local = LocalVariables(global_process_set, scale=False)
        given = [] if local_variables is None else local_variables
        for variable in given if isinstance(given, list | tuple | set) else [given]:
            self.register_local_var(variable)

    def register_local_var(self, variable: Any) -> None:
        """Leave a variable as it is on each rank."""
        if not hasattr(variable, "assign"):
            raise OptionError(f"local_variables: {variable!r} is no variable; give variables")
        self._local.add(variable)

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast if the model is built."""
        if self.model.built and self.model.optimizer is not None:
            if not self.model.optimizer.built:
                self.model.optimizer.build(self.model.trainable_variables)
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Broadcast after the first batch if it could not be done before."""
        self._broadcast()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Compare the ranks where no distributed optimizer does so.

        Raises:
            ReplicaDivergenceError: on all ranks, if their weights differ.
        """
        if size() == 1 or is_distributed(self.model.optimizer):
            return
        shared = [v for v in self.model.trainable_variables if v not in self._local]
        named = [(v.path, to_numpy(v)) for v in shared]
        check_replicas(global_process_set.group().comm, named, f"epoch {epoch + 1}")

    def _broadcast(self) -> None:
        if not self.broadcast_done:
            variables = global_variables(self.model)
            broadcast_variables([v for v in variables if v not in self._local], self.root_rank)
            self.broadcast_done = True
