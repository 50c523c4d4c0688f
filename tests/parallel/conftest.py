"""Make pytest behave as one program on many ranks.

Rank 0 reports as usual; the others speak only when something fails. A failure on any rank is
shown at once, with that rank's traceback, and ends the job: the other ranks would wait for ever
in a collective that the failed rank never calls.
"""

import os
import sys
import time
from collections.abc import Iterable

import pytest

from hpc_dl.comm.abort import end_job

#: Seconds that the other ranks get to report a failure of their own before the job ends.
GRACE = 1.0


def _number(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


RANK = _number("OMPI_COMM_WORLD_RANK", "PMI_RANK", default=0)
SIZE = _number("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default=1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if RANK > 0:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        config.pluginmanager.unregister(reporter)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and SIZE > 1:
        _show(f"{report.nodeid} ({report.when})", report.longreprtext, report.sections)
        time.sleep(GRACE)
        end_job(1)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and RANK > 0:
        _show(report.nodeid, report.longreprtext, report.sections)


def pytest_internalerror(excrepr: object) -> None:
    if RANK > 0:
        _show("internal error", str(excrepr), [])


def _show(title: str, text: str, sections: Iterable[tuple[str, str]]) -> None:
    parts = [f"{f' {title} on rank {RANK} of {SIZE} ':=^90}", text]
    for name, content in sections:
        parts += [f"{f' {name} ':-^90}", content.rstrip()]
    # In one piece, so that two ranks that fail together do not mix.
    sys.__stderr__.write("\n".join(parts) + "\n")
    sys.__stderr__.flush()
