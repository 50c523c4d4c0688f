"""Gradient tapes whose gradients are combined over the ranks."""

import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hpc_dl.comm import Op
from hpc_dl.errors import OptionError
from hpc_dl.reduce import Saved, Traffic
from hpc_dl.tensorflow import host
from hpc_dl.tensorflow.compression import Compression, of_gradients
from hpc_dl.tensorflow.gradients import GradientReduction
from hpc_dl.world import Group, ProcessSet, global_process_set
from hpc_dl.world.compression import warn_of_unused
from hpc_dl.world.gradients import Gradient, GradientOptions, gradient_options, unique
from hpc_dl.world.local import LocalVariables, local_weights
from hpc_dl.world.replicas import ReplicaWatch


class DistributedGradientTape(tf.GradientTape):
    """A ``tf.GradientTape`` whose ``gradient`` combines the gradients over the ranks.

    >>> import hpc_dl.tensorflow as hvd
    >>> hvd.init()
    >>> w = tf.Variable([1.0, 2.0])
    >>> with tf.GradientTape() as tape:
    ...     loss = tf.reduce_sum(w * w)
    >>> tape = hvd.DistributedGradientTape(tape)
    >>> tape.gradient(loss, [w])[0].numpy().tolist()
    [2.0, 4.0]
    >>> hvd.shutdown()
    """

    # Beside the state that it shares with the tape it wraps, which may be wrapped twice.
    __slots__ = ("_hpc_dl_local", "_hpc_dl_options")

    def __init__(
        self,
        gradtape: tf.GradientTape,
        device_dense: str = "",
        device_sparse: str = "",
        compression: Any = Compression.none,
        sparse_as_dense: bool = False,
        op: Op = Op.AVERAGE,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: Any = None,
        process_set: ProcessSet = global_process_set,
        scale_local_gradients: bool = True,
        guard: bool = True,
    ):
        """Wrap a tape.

        Args:
            gradtape: a tape that has recorded, or will (``with DistributedGradientTape(...)``).
                The two share what is recorded.
            device_dense: accepted for Horovod's sake, like ``device_sparse``.
            compression: how gradients travel: a name such as ``"fp16"`` or
                ``"topk:ratio=0.01"`` (``hpc-dl compress list`` shows all), a mapping, an
                object of ``hpc_dl.compress``, a list of rules (pattern, compression); or a
                class with ``compress`` and ``decompress`` as Horovod has them.
            sparse_as_dense: reduce ``tf.IndexedSlices`` as dense tensors.
            op: Average, Sum, Min, Max, Product; Adasum over Horovod.
            gradient_predivide_factor: with Average, divide by this before the sum and by
                the rest after it.
            num_groups: Horovod's older name of ``groups``.
            groups: a number of groups, or lists of variables, that travel together.
            process_set: combine over these ranks only.
            scale_local_gradients: divide gradients of local sources by the number of ranks.
            guard: compare the variables of the ranks after the first steps and now and then.

        Raises:
            OptionError: a bad option, or two that do not go together.
        """
        if not isinstance(gradtape, tf.GradientTape):
            raise OptionError(f"gradtape={gradtape!r}; give a tf.GradientTape")
        # One state for both, so that either may be entered, and left, after this.
        object.__setattr__(self, "__dict__", gradtape.__dict__)
        self._hpc_dl_options = gradient_options(
            op,
            of_gradients(compression),
            gradient_predivide_factor,
            sparse_as_dense,
            num_groups if groups is None else groups,
            process_set,
            guard,
        )
        self._hpc_dl_local = LocalVariables(process_set, scale_local_gradients)

    def register_local_source(self, source: Any) -> None:
        """Keep the gradient of ``source``, a variable, as this rank computed it."""
        self._hpc_dl_local.add(source)

    @host.as_written
    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        unconnected_gradients: Any = tf.UnconnectedGradients.NONE,
        use_generic_names: bool = False,
    ) -> Any:
        """Compute the gradients of ``target`` and combine them over the ranks.

        Args:
            sources: tensors and variables, in any nesting; the same on all ranks.
            use_generic_names: name gradients by their number instead of their variable.

        Raises:
            MismatchError: on all ranks, if they reduce different gradients.
        """
        gradients = super().gradient(target, sources, output_gradients, unconnected_gradients)
        flat_sources = tf.nest.flatten(sources)
        names = unique([_name(i, s, use_generic_names) for i, s in enumerate(flat_sources)])
        # Flattening leaves tf.IndexedSlices whole.
        flat = [
            Gradient(name, value, source)
            for name, value, source in zip(
                names, tf.nest.flatten(gradients), flat_sources, strict=True
            )
        ]
        results = self._combine(flat)
        return tf.nest.pack_sequence_as(sources, [results[name] for name in names])

    def _combine(self, gradients: Sequence[Gradient]) -> dict[str, Any]:
        local = self._hpc_dl_local
        results = {
            g.name: local.scaled(g.value) if g.source in local else g.value
            for g in gradients
            if g.value is not None
        }
        shared = [g for g in gradients if g.source not in local]
        if shared and self._hpc_dl_options.combines:
            reduction, watch = _reduction_of(self._hpc_dl_options, shared)
            reduced = reduction(shared, watch)
            results.update(zip([g.name for g in shared], reduced, strict=True))
        return {g.name: results.get(g.name) for g in gradients}

    def compression_state(self) -> Saved:
        """Return what compression keeps between steps on this rank, by variable.

        Tapes with equal options share it: scripts make a new one for each step. Of a world of
        another size, give ``load_compression_state`` what ``hpc_dl.reduce.reshard`` makes of all
        ranks' states.
        """
        reduction = self._begun()
        return {} if reduction is None else reduction.reducers.compression_state()

    def load_compression_state(self, saved: Saved) -> None:
        """Replace that by what ``compression_state`` returned; all ranks call this alike."""
        options = self._hpc_dl_options
        if not options.combines:
            warn_of_unused(saved)
            return
        group = options.process_set.group()
        _tapes_of(group).reduction(group, options).reducers.load_compression_state(saved)

    def report_loss(self, loss: float) -> None:
        """Let the guard of compression see this rank's loss; it suspends on a jump."""
        options = self._hpc_dl_options
        if options.combines:
            _tapes_of(options.process_set.group()).report_loss(options, float(loss))

    def traffic(self) -> Traffic:
        """Return steps, bytes sent and seconds waited so far, of tapes with these options."""
        reduction = self._begun()
        return Traffic(0, 0, 0.0) if reduction is None else reduction.traffic()

    def _begun(self) -> GradientReduction | None:
        """Return what combines the gradients, if it has begun: all ranks begin it together.

        This may well be asked on one of them.
        """
        options = self._hpc_dl_options
        if not options.combines:
            return None
        return _tapes_of(options.process_set.group()).reductions.get(_key(options))

    def get_local_and_global_gradients(
        self,
        target: Any,
        sources: Sequence[Any],
        output_gradients: Any = None,
        use_generic_names: bool = False,
    ) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """Return (source, gradient) of the local sources, and those of the others."""
        gradients = self.gradient(
            target, sources, output_gradients, use_generic_names=use_generic_names
        )
        pairs = list(zip(sources, gradients, strict=True))
        return (
            [(s, g) for s, g in pairs if s in self._hpc_dl_local],
            [(s, g) for s, g in pairs if s not in self._hpc_dl_local],
        )


def PartialDistributedGradientTape(  # noqa: N802  (Horovod's name)
    gradtape: tf.GradientTape, *args: Any, local_layers: Any = None, **options: Any
) -> DistributedGradientTape:
    """Make a ``DistributedGradientTape`` that leaves the gradients of some layers alone.

    Args:
        local_layers: built Keras layers, or one, that each rank trains by itself.
        options: of ``DistributedGradientTape``.

    Raises:
        OptionError: what is no layer, or has no variables yet.
    """
    tape = DistributedGradientTape(gradtape, *args, **options)
    layers = [] if local_layers is None else local_layers
    for layer in layers if isinstance(layers, list | tuple | set) else [layers]:
        for weight in local_weights(layer):
            tape.register_local_source(weight)
    return tape


def _name(number: int, source: Any, generic: bool) -> str:
    if generic or not hasattr(source, "assign"):
        return f"gradient_{number}"
    return str(getattr(source, "path", source.name))


class _Tapes:
    """What outlives a tape: scripts make a new one for each step."""

    def __init__(self) -> None:
        self.reductions: dict[Any, GradientReduction] = {}
        self.watches: dict[tuple[int, bool], tuple[weakref.ref[Any], ReplicaWatch]] = {}
        self.no_watch: ReplicaWatch | None = None
        self._losses: dict[Any, float] = {}

    def reduction(self, group: Group, options: GradientOptions) -> GradientReduction:
        """Return the reduction with these options; all ranks begin it alike."""
        key = _key(options)
        if key not in self.reductions:
            self.reductions[key] = GradientReduction(group, options, "DistributedGradientTape")
            if key in self._losses:
                self.reductions[key].reducers.report_loss(self._losses.pop(key))
        return self.reductions[key]

    def report_loss(self, options: GradientOptions, loss: float) -> None:
        """Tell the reduction with these options of a loss, now or as soon as there is one."""
        key = _key(options)
        if key in self.reductions:
            self.reductions[key].reducers.report_loss(loss)
        else:
            self._losses[key] = loss

    def watch(self, group: Group, sources: Sequence[Any], guard: bool) -> ReplicaWatch:
        """Return the count of steps of these variables, known by the first of them.

        Tensors among the sources are others in each step, and are not compared.
        """
        variable = next((source for source in sources if hasattr(source, "assign")), None)
        if variable is None:
            self.no_watch = self.no_watch or ReplicaWatch(group, enabled=False)
            return self.no_watch
        key = id(variable), guard
        known = self.watches.get(key)
        if known is None or known[0]() is not variable:
            for gone in [k for k, (alive, _) in self.watches.items() if alive() is None]:
                del self.watches[gone]
            known = weakref.ref(variable), ReplicaWatch(group, guard)
            self.watches[key] = known
        return known[1]


def _key(options: GradientOptions) -> Any:
    """Return what tells reductions apart."""
    # Variables cannot be compared; lists of them are told apart by which they are.
    groups = options.groups
    if not isinstance(groups, int):
        groups = tuple(tuple(map(id, members)) for members in groups)
    return options._replace(groups=groups)


def _reduction_of(
    options: GradientOptions, gradients: Sequence[Gradient]
) -> tuple[GradientReduction, ReplicaWatch]:
    """Find the reduction with these options, and the count of steps of these variables."""
    group = options.process_set.group()
    tapes = _tapes_of(group)
    watch = tapes.watch(group, [g.source for g in gradients], options.guard)
    return tapes.reduction(group, options), watch


def _tapes_of(group: Group) -> _Tapes:
    tapes: _Tapes = group.kept.setdefault(_Tapes, _Tapes())
    return tapes
