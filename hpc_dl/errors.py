"""Every error that hpc_dl raises on purpose.

    HpcDlError
    ├── OptionError (ValueError)          a name, option or value that is not allowed
    ├── NotInitializedError (RuntimeError, ValueError) a collective before init()
    ├── MissingComponentError (ImportError) a library, tool or build that is not there
    ├── UnsupportedError (TypeError)      a request this communicator or type cannot serve
    │   └── RanksJoinedError              ... because some ranks are out of batches
    ├── MismatchError                     ranks called different things
    ├── ReplicaDivergenceError            replicas hold different parameters
    ├── DataError (ValueError)            a data file that is missing, damaged or does not fit
    ├── LaunchError                       a job could not be started, or ended badly
    └── BuildError                        Horovod could not be built

A message says what was given, what is allowed, and the next step.
"""

from collections.abc import Iterable


class HpcDlError(Exception):
    """The root of all errors of this package."""


class OptionError(HpcDlError, ValueError):
    """A name, option or value that is not allowed."""

    @classmethod
    def unknown(cls, kind: str, given: object, valid: Iterable[object]) -> "OptionError":
        """Say that ``given`` is no known ``kind`` and list the valid ones."""
        choices = ", ".join(sorted(map(str, valid)))
        return cls(f"unknown {kind} {given!r}; valid: {choices}")


class NotInitializedError(HpcDlError, RuntimeError, ValueError):
    """A rank, a size or a collective was asked for before ``init()``."""


class MissingComponentError(HpcDlError, ImportError):
    """A library, a tool or a build that is needed is not there."""


class UnsupportedError(HpcDlError, TypeError):
    """The communicator or the type of the data cannot serve this request."""


class RanksJoinedError(UnsupportedError):
    """A collective that needs all ranks after some have called ``join``."""


class MismatchError(HpcDlError):
    """Ranks called different collectives, or one with different names or shapes."""


class ReplicaDivergenceError(HpcDlError):
    """Replicas that must be equal hold different parameters."""


class DataError(HpcDlError, ValueError):
    """A data file is missing, damaged or does not fit the others."""


class LaunchError(HpcDlError):
    """A job could not be started, or ended badly."""


class BuildError(HpcDlError):
    """Horovod could not be built."""
