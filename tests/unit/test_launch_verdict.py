"""How a job went is decided by its first cause, never by mpirun's exit code alone."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.launch.channel import End
from hpc_dl.launch.verdict import TIMED_OUT, Facts, judge

OPENMPI_SIGNAL = (
    "prterun noticed that process rank 1 with PID 5497 on node vm exited on\nsignal 9 (Killed).\n"
)
HYDRA_SIGNAL = (
    "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Segmentation fault (signal 11)\n"
    "This typically refers to a problem with your application.\n"
)


def facts(
    size: int = 2, ends: dict[int, End] | None = None, code: int = 0, **more: object
) -> Facts:
    return Facts(size, ends or {}, frozenset(range(size)), code, **more)  # type: ignore[arg-type]


def test_success_needs_the_word_of_every_rank() -> None:
    assert judge(facts(2, {0: End(0), 1: End(0)})).code == 0
    silent = judge(facts(2, {0: End(0)}))
    assert silent.code == 1
    assert "rank 1" in silent.message


def test_a_rank_that_never_started_is_named() -> None:
    verdict = judge(Facts(3, {0: End(0)}, frozenset({0}), 0))
    assert verdict.code == 1
    assert "ranks 1, 2" in verdict.message


@given(
    code=st.integers(1, 255),
    mpirun=st.integers(-15, 255),
    size=st.integers(1, 6),
    data=st.data(),
)
def test_the_first_failing_rank_gives_the_code(
    code: int, mpirun: int, size: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, size - 1))
    ends = {first: End(code, "ValueError: boom", "the traceback")}
    for rank in range(size):
        ends.setdefault(rank, End(data.draw(st.integers(0, 255))))
    verdict = judge(facts(size, ends, mpirun))
    assert (verdict.code, verdict.blamed) == (code, first)
    assert verdict.traceback == "the traceback"
    assert f"rank {first} failed with exit code {code}: ValueError: boom" in verdict.message


def test_ranks_that_failed_alike_are_counted_and_others_are_quoted() -> None:
    same, other = End(1, "KeyError: 'a'"), End(2, "OSError: disk")
    message = judge(facts(4, {2: same, 0: same, 3: same, 1: other}, 1)).message
    assert "rank 2 failed with exit code 1: KeyError: 'a'" in message
    assert "ranks 0, 3 failed in the same way" in message
    assert "rank 1 failed too: OSError: disk" in message


@pytest.mark.parametrize(
    ("noise", "code", "number", "who"),
    [(OPENMPI_SIGNAL, 137, 9, "rank 1"), (HYDRA_SIGNAL, 11, 11, "a rank"), ("", -15, 15, "a rank")],
)
def test_a_signal_gives_128_plus_its_number(noise: str, code: int, number: int, who: str) -> None:
    verdict = judge(facts(2, {}, code, noise=noise))
    assert verdict.code == 128 + number
    assert verdict.message.startswith(
        f"{who} was ended by signal {number} ({signal.Signals(number).name})"
    )


def test_a_kill_has_memory_as_its_likely_cause() -> None:
    assert "memory" in judge(facts(2, {}, 137, noise=OPENMPI_SIGNAL)).message


def test_mpirun_that_starts_nothing_is_quoted() -> None:
    verdict = judge(Facts(2, {}, frozenset(), 213, noise="there are not enough slots available"))
    assert verdict.code == 213
    assert verdict.noise == "there are not enough slots available"
    assert "fewer slots than ranks" in verdict.message


def test_a_rank_that_leaves_with_a_code_of_its_own_keeps_it() -> None:
    verdict = judge(facts(2, {0: End(0)}, 7))
    assert verdict.code == 7
    assert "rank 1" in verdict.message


@pytest.mark.parametrize(
    "noise",
    [
        "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD",
        "   Process name: [prterun-vm-5486@1,1]\n   Exit code:    7\n",
    ],
)
def test_the_rank_that_ended_the_job_itself_is_named(noise: str) -> None:
    verdict = judge(facts(2, {}, 7, noise=noise))
    assert verdict.code == 7
    assert verdict.message.startswith("rank 1 ended the job with exit code 7")


@pytest.mark.parametrize("number", [9, 15])
def test_signals_of_the_launcher_are_not_blamed_on_a_rank(number: int) -> None:
    noise = f"YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Ended (signal {number})"
    verdict = judge(facts(2, {}, number, noise=noise, lost=(1,), forced=True))
    assert verdict.code == 1
    assert verdict.message.startswith("rank 1 left without finishing the script")
    crash = judge(facts(2, {}, 11, noise=HYDRA_SIGNAL, lost=(1,), forced=True))
    assert crash.code == 139


def test_a_time_out_has_its_own_code() -> None:
    verdict = judge(facts(2, {0: End(1, "KeyboardInterrupt")}, 1, timeout=3.0))
    assert verdict.code == TIMED_OUT
    assert "3 s" in verdict.message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_job_says_by_what(number: signal.Signals) -> None:
    verdict = judge(facts(2, {0: End(130, "KeyboardInterrupt")}, 1, stopped_by=number))
    assert verdict.code == 128 + number
    assert number.name in verdict.message


def test_ranks_that_finish_in_good_order_on_a_signal_have_succeeded() -> None:
    verdict = judge(facts(2, {0: End(0), 1: End(0)}, 0, stopped_by=signal.SIGTERM))
    assert verdict.code == 0


FATAL = (
    "[vm:00000] *** An error occurred in MPI_Send\n"
    "[vm:00000] *** MPI_ERR_RANK: invalid rank\n"
    f"{'-' * 74}\n"
    "prterun has exited due to process rank 0 with PID 0 on node vm calling\n"
    '"abort". This may have caused other processes to be terminated.\n'
    f"{'-' * 74}\n"
)


def test_an_error_that_only_mpi_reports_is_shown() -> None:
    verdict = judge(facts(2, {}, 6, noise=FATAL))
    assert verdict.code == 6
    assert "rank 0 ended the job with exit code 6" in verdict.message
    assert "MPI_ERR_RANK: invalid rank" in verdict.noise
    assert "prterun" not in verdict.noise


def test_a_rank_that_died_before_it_joined_is_quoted() -> None:
    verdict = judge(Facts(2, {}, frozenset({0}), 1, "ImportError: libpython", lost=(0,)))
    assert verdict.code == 1
    assert verdict.noise == "ImportError: libpython"


def test_a_failing_rank_needs_no_words_of_mpis() -> None:
    assert judge(facts(2, {0: End(1, "ValueError", "trace")}, 1, noise=FATAL)).noise == ""


@pytest.mark.parametrize(
    ("ended", "code"), [({"timeout": 3.0}, TIMED_OUT), ({"stopped_by": signal.SIGTERM}, 143)]
)
def test_what_fails_on_the_way_out_is_told(ended: dict[str, object], code: int) -> None:
    end = End(1, "OSError: disk full", "the traceback")
    verdict = judge(facts(2, {0: End(130, "KeyboardInterrupt"), 1: end}, 1, **ended))
    assert verdict.code == code
    assert (verdict.blamed, verdict.traceback) == (1, "the traceback")
    assert "rank 1 failed meanwhile: OSError: disk full" in verdict.message
    assert verdict.from_outside
