"""What a person sees of a run, and what the run leaves behind."""

from hpc_dl.observe.curve import curve
from hpc_dl.observe.digest import weights_digest
from hpc_dl.observe.folder import make_run_folder
from hpc_dl.observe.metrics import MetricsWriter, read_metrics
from hpc_dl.observe.progress import Progress
from hpc_dl.observe.provenance import git_commit, versions
from hpc_dl.observe.run import Run
from hpc_dl.observe.summary import write_summary

__all__ = [
    "MetricsWriter",
    "Progress",
    "Run",
    "curve",
    "git_commit",
    "make_run_folder",
    "read_metrics",
    "versions",
    "weights_digest",
    "write_summary",
]
