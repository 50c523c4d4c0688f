"""For tests: ranks as threads of one process, and the suites that plugins must pass.

``run_threads`` needs nothing but NumPy. The suites are in ``hpc_dl.testing.conformance``, for
communicators, and ``hpc_dl.testing.compression``, for compressors; they need pytest
(``pip install 'hpc_dl[test]'``).
"""

from hpc_dl.comm.threads import run_threads

__all__ = ["run_threads"]
