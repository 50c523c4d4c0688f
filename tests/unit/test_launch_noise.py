"""Of mpirun's own output the part is shown that explains something."""

import pytest

from hpc_dl.launch.noise import telling

RULER = "-" * 74 + "\n"
OPENMPI_EXIT = (
    f"{RULER}prterun detected that one or more processes exited with non-zero status,\n"
    "thus causing the job to be terminated. The first process to do so was:\n\n"
    f"   Process name: [prterun-vm-24671@1,1]\n   Exit code:    7\n{RULER}"
)
OPENMPI_ABORT = (
    f"{RULER}MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n"
    f"  Proc: [[28000,1],1]\n  Errorcode: 5\n{RULER}"
    "[vm:24724] PMIX ERROR: PMIX_ERR_UNREACH in file ptl_base_connection_hdlr.c at line 103\n"
    "[warn] Epoll MOD(1) on fd 20 failed. Old events were 6: Bad file descriptor\n"
)
OPENMPI_4 = (
    f"{RULER}Primary job  terminated normally, but 1 process returned\n"
    f"a non-zero exit code.\n{RULER}"
    f"{RULER}mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9.\n{RULER}"
)
HYDRA = (
    "\n" + "=" * 80 + "\n"
    "=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n"
    "=   PID 24671 RUNNING AT vm\n=   EXIT CODE: 7\n" + "=" * 80 + "\n"
    "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)\n"
    "This typically refers to a problem with your application.\n"
    "Please see the FAQ page for debugging suggestions\n"
)
REASON = "There are not enough slots available in the system"


@pytest.mark.parametrize("report", [OPENMPI_EXIT, OPENMPI_ABORT, OPENMPI_4, HYDRA])
def test_a_report_that_the_launcher_gives_itself_goes(report: str) -> None:
    assert telling(report) == ""
    kept = telling(f"{REASON}\n{report}after it").splitlines()
    assert [line for line in kept if line] == [REASON, "after it"]


def test_a_paragraph_of_its_own_stays() -> None:
    assert telling(f"{RULER}{REASON}\nto satisfy the request.\n{RULER}") == (
        f"{REASON}\nto satisfy the request."
    )
