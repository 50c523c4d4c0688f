"""Decide from what is known at its end how a job went: its exit code, and what to say."""

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hpc_dl.launch.channel import End
from hpc_dl.launch.noise import telling

#: The exit code of a job that ran into its time limit, as of timeout(1).
TIMED_OUT = 124

_SIGNAL_IN_NOISE = re.compile(r"(?:on\s+signal|\(signal)\s+(\d+)")
_RANK_IN_NOISE = re.compile(r"process rank (\d+)")
_LEAVER_IN_NOISE = re.compile(
    r"(?:MPI_ABORT was invoked on rank |Process name: \[[^\]]*,|process rank (?=\d+ .* calling))"
    r"(\d+)"
)
_NO_SLOTS = re.compile(r"not enough slots|no allocated resources", re.IGNORECASE)

#: What the launcher itself sends; in mpirun's report they may be its own.
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGKILL)

_SIGNAL_REMEDIES = {
    signal.SIGKILL: "the kernel or the scheduler does this when memory runs out: use a smaller "
    "batch, fewer ranks on a node, or ask for more memory",
    signal.SIGSEGV: "a crash in compiled code: the lines above show where Python was; "
    "`hpc-dl doctor` checks that the libraries fit together",
    signal.SIGBUS: "often a full /dev/shm: give the container more shared memory",
    signal.SIGILL: "a library was compiled for another processor: "
    "`hpc-dl horovod build --force` on this machine",
}


@dataclass(frozen=True)
class Facts:
    """What the launcher saw.

    Args:
        size: how many ranks were asked for.
        ends: what ranks said of their end, in the order in which they said it.
        joined: the ranks that connected.
        mpirun_code: mpirun's exit code; negative for a signal, as in `subprocess`.
        noise: what mpirun itself printed.
        lost: ranks that vanished without a word, in the order in which they did.
        forced: the launcher had to end the job after a rank failed, as mpirun did not.
        stopped_by: the signal that the user sent to the launcher, if any.
        timeout: the time limit that the job ran into, in seconds, if it did.
    """

    size: int
    ends: Mapping[int, End]
    joined: frozenset[int]
    mpirun_code: int
    noise: str = ""
    lost: Sequence[int] = ()
    forced: bool = False
    stopped_by: int | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome of a job.

    Args:
        code: the exit code: the failing rank's, or 128 + signal.
        message: one paragraph on what went wrong; empty when all went well.
        blamed: the rank whose traceback is shown, if one rank is to blame.
        traceback: that traceback.
        noise: what mpirun and MPI itself said, where that may be the explanation.
        from_outside: a signal or the time limit ended it.
    """

    code: int
    message: str = ""
    blamed: int | None = None
    traceback: str = ""
    noise: str = ""
    from_outside: bool = False


def judge(facts: Facts) -> Verdict:
    """Return the outcome: the first cause decides, never mpirun's exit code alone."""
    failed = {rank: end for rank, end in facts.ends.items() if end.code != 0}
    done = len(facts.ends) == facts.size and not failed
    if facts.timeout is not None:
        message = (
            f"the job was still running after {facts.timeout:g} s and was ended; the lines above "
            "show where each rank stood. If it only needs longer, raise --timeout"
        )
        return _from_outside(TIMED_OUT, message, failed)
    if facts.stopped_by is not None and not (done and facts.mpirun_code == 0):
        name = signal.Signals(facts.stopped_by).name
        message = f"ended by {name}, all {facts.size} ranks with it"
        return _from_outside(128 + facts.stopped_by, message, failed)
    if failed:
        return _blame(facts, failed)
    verdict = _without_a_word(facts, done)
    return replace(verdict, noise=telling(facts.noise)) if verdict.code else verdict


def _from_outside(code: int, message: str, failed: Mapping[int, End]) -> Verdict:
    """Say what ended the job, and also what a rank made of that, such as a failing save."""
    for rank, end in failed.items():
        if end.traceback:
            message += f"\nrank {rank} failed meanwhile: {end.summary}"
            return Verdict(code, message, rank, end.traceback, from_outside=True)
    return Verdict(code, message, from_outside=True)


def _without_a_word(facts: Facts, done: bool) -> Verdict:
    """Judge a job in which no rank reported a failure."""
    killed = _signal_of(facts)
    ours = facts.forced and (killed is None or killed[0] in _ENDING_SIGNALS)
    if ours and facts.lost:
        return _blame_lost(facts)
    if killed is not None:
        return _blame_signal(facts, *killed)
    if facts.mpirun_code != 0:
        return _blame_mpirun(facts)
    if not done:
        return _blame_silence(facts)
    return Verdict(0)


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def _blame(facts: Facts, failed: Mapping[int, End]) -> Verdict:
    first, *others = failed
    end = failed[first]
    cause = f": {end.summary}" if end.summary else ""
    message = f"rank {first} failed with exit code {end.code}{cause}"
    if facts.size > 1:
        message += f"; all {facts.size} ranks were ended"
    same = [rank for rank in others if failed[rank].summary == end.summary]
    if same:
        message += f"\n{_ranks(same)} failed in the same way"
    for rank in others:
        if rank not in same:
            message += f"\nrank {rank} failed too: {failed[rank].summary}"
    return Verdict(end.code, message, first, end.traceback)


def _signal_of(facts: Facts) -> tuple[int, int | None] | None:
    """Return the signal that ended a rank, and that rank where mpirun names it."""
    found = _SIGNAL_IN_NOISE.search(facts.noise)
    if found is not None:
        rank = _RANK_IN_NOISE.search(facts.noise)
        return int(found[1]), int(rank[1]) if rank else None
    if facts.mpirun_code < 0:
        return -facts.mpirun_code, None
    return None


def _blame_signal(facts: Facts, number: int, rank: int | None) -> Verdict:
    try:
        sign = signal.Signals(number)
    except ValueError:
        return Verdict(128 + number, f"{_who(rank)} was ended by signal {number}")
    remedy = _SIGNAL_REMEDIES.get(sign)
    message = f"{_who(rank)} was ended by signal {number} ({sign.name})"
    if facts.size > 1:
        message += f"; all {facts.size} ranks were ended"
    return Verdict(128 + number, message + (f". {remedy}" if remedy else ""), rank)


def _who(rank: int | None) -> str:
    return "a rank" if rank is None else f"rank {rank}"


def _blame_mpirun(facts: Facts) -> Verdict:
    if not facts.joined:
        hint = (
            "; the allocation has fewer slots than ranks: lower -n, or give more tasks"
            if _NO_SLOTS.search(facts.noise)
            else "; its words are above. `hpc-dl doctor` checks the MPI installation"
        )
        return Verdict(
            facts.mpirun_code,
            f"mpirun started no rank and ended with exit code {facts.mpirun_code}{hint}",
        )
    leaver = _LEAVER_IN_NOISE.search(facts.noise)
    if leaver is not None:
        message = f"rank {leaver[1]} ended the job with exit code {facts.mpirun_code}"
        return Verdict(facts.mpirun_code, f"{message}, without an exception (os._exit, MPI_Abort)")
    silent = sorted(facts.joined - facts.ends.keys())
    who = _ranks(silent) if silent else "a rank"
    return Verdict(
        facts.mpirun_code,
        f"the job ended with exit code {facts.mpirun_code}; "
        f"{who} left without finishing the script",
    )


def _blame_lost(facts: Facts) -> Verdict:
    return Verdict(
        1,
        f"rank {facts.lost[0]} left without finishing the script, and its exit code is not known "
        f"(os._exit); all {facts.size} ranks were ended",
    )


def _blame_silence(facts: Facts) -> Verdict:
    absent = sorted(set(range(facts.size)) - facts.joined)
    if absent:
        return Verdict(
            1,
            f"mpirun reports success, but {_ranks(absent)} of {facts.size} never started; "
            "`hpc-dl doctor` checks the MPI installation",
        )
    silent = sorted(set(range(facts.size)) - facts.ends.keys())
    return Verdict(
        1,
        f"mpirun reports success, but {_ranks(silent)} left without finishing the script "
        "(os._exit, or a node that was lost); end a script by returning from it or by sys.exit",
    )
