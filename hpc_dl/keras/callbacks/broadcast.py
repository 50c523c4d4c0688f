"""Give all ranks the model and the optimizer of one rank when training begins."""

from typing import Any

from hpc_dl.errors import OptionError
from hpc_dl.keras.callbacks.prepare import ModelCallback
from hpc_dl.keras.collectives import broadcast_variables
from hpc_dl.world.local import LocalVariables
from hpc_dl.world.process_sets import global_process_set


class BroadcastGlobalVariablesCallback(ModelCallback):
    """Broadcast all variables of model and optimizer from one rank.

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

    def _broadcast(self) -> None:
        if not self.broadcast_done:
            variables = [*self.model.variables, *self.model.optimizer.variables]
            broadcast_variables([v for v in variables if v not in self._local], self.root_rank)
            self.broadcast_done = True
