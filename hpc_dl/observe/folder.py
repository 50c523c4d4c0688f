"""The folder that a run writes into."""

import itertools
import os
import tempfile
from datetime import datetime
from pathlib import Path

from hpc_dl.errors import OptionError

METRICS, SUMMARY, CURVE = "metrics.jsonl", "summary.json", "curve.png"


def make_run_folder(given: str | os.PathLike[str] | None, job: str) -> Path:
    """Make the folder of a new run and check that files can be written there.

    One rank calls this and tells the others.

    Args:
        given: the folder; None: ``runs/JOB-DATE-TIME`` under the current one.
        job: the name of the job.

    Raises:
        OptionError: it cannot be made or written, or holds another run.
    """
    folder = _new_folder(job) if given is None else _given_folder(Path(given))
    try:
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OptionError(
            f"cannot write into the run folder {folder} ({error.strerror}); give --run-dir a "
            "folder of yours"
        ) from error


def _new_folder(job: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = Path("runs", f"{job}-{stamp}" + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OptionError(_cannot_make(folder, error)) from error
        return folder
    raise AssertionError("count() does not end")


def _given_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(_cannot_make(folder, error)) from error
    for name in (METRICS, SUMMARY):
        if (folder / name).exists():
            raise OptionError(
                f"the run folder {folder} holds the {name} of an earlier run; give --run-dir "
                "another folder, or move this one away"
            )
    return folder


def _cannot_make(folder: Path, error: OSError) -> str:
    return (
        f"cannot make the run folder {folder} ({error.strerror}); give --run-dir a folder that "
        "you may write to"
    )
