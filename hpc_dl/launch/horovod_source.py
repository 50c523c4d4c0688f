"""Fetch Horovod's source distribution, check it, and apply the patches carried here."""

import hashlib
import importlib.resources
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpc_dl.errors import BuildError, MissingComponentError

VERSION = "0.28.1"
#: Of the source distribution on the Python package index.
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
ARCHIVE = f"horovod-{VERSION}.tar.gz"

_FETCH_TIMEOUT = 300


@dataclass(frozen=True)
class Patch:
    """A unified diff against the source, and the reason for it."""

    name: str
    why: str
    diff: bytes


def patches() -> list[Patch]:
    """Return the carried patches in the order in which they are applied."""
    folder = importlib.resources.files("hpc_dl.launch") / "horovod_patches"
    found = sorted((item for item in folder.iterdir() if item.name.endswith(".patch")), key=str)
    if not found:
        raise BuildError(f"the package holds no patches in {folder}; install hpc_dl again")
    return [_read_patch(item.name, item.read_bytes()) for item in found]


def _read_patch(name: str, content: bytes) -> Patch:
    first, _, diff = content.partition(b"\n")
    why = first.decode().removeprefix("Why:").strip()
    return Patch(name, why, diff.lstrip(b"\n"))


def patches_digest() -> str:
    """Return a hash of all patches; part of the key of a cached wheel."""
    digest = hashlib.sha256()
    for patch in patches():
        digest.update(patch.name.encode() + b"\0" + patch.diff + b"\0")
    return digest.hexdigest()[:16]


def fetch(cache: Path, given: Path | None = None) -> Path:
    """Return the source archive with the right hash: the one given, the kept one, or pip's.

    Args:
        cache: the folder where the archive is kept, so that the next build needs no network.
        given: an archive that the user has already.

    Raises:
        BuildError: it cannot be had, or it is not the one that the patches were made for.
    """
    if given is not None:
        _check_hash(given)
        return given
    kept = cache / ARCHIVE
    if kept.is_file() and _sha256(kept) == SHA256:
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fetched = _download(Path(folder))
        _check_hash(fetched)
        os.replace(fetched, kept)
    return kept


def _download(folder: Path) -> Path:
    # In pip's hash-checking mode nothing of the archive runs before its hash is checked.
    wanted = folder / "requirements.txt"
    wanted.write_text(f"horovod=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--no-binary", "horovod", "--no-build-isolation", "--require-hashes"]
    command += ["--no-input", "--progress-bar", "off", "-r", str(wanted), "-d", str(folder)]
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_FETCH_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            f"pip did not fetch {ARCHIVE} within {error.timeout:g} s; {_BY_HAND}"
        ) from None
    archive = folder / ARCHIVE
    if answer.returncode != 0 or not archive.is_file():
        said = "\n".join((answer.stderr or answer.stdout).strip().splitlines()[-6:])
        raise BuildError(f"pip could not fetch horovod=={VERSION}; {_BY_HAND}. pip says:\n{said}")
    return archive


_BY_HAND = (
    f"on a machine without network copy {ARCHIVE} here (`pip download --no-deps --no-binary "
    f"horovod horovod=={VERSION}` elsewhere) and pass it with --sdist"
)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_hash(archive: Path) -> None:
    try:
        found = _sha256(archive)
    except OSError as error:
        raise BuildError(f"cannot read {archive}: {error}") from error
    if found != SHA256:
        raise BuildError(
            f"{archive} is not the source of Horovod {VERSION} that the patches are made for: its "
            f"sha256 is {found}, expected {SHA256}. Delete it and fetch it again"
        )


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the archive below ``folder`` and return the root of the source."""
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(folder, filter="data")
            else:  # Python 3.11.0 to 3.11.3
                _check_members(tar, folder)
                tar.extractall(folder)
    except (OSError, tarfile.TarError) as error:
        raise BuildError(f"cannot unpack {archive} into {folder}: {error}") from error
    return folder / f"horovod-{VERSION}"


def _check_members(tar: tarfile.TarFile, folder: Path) -> None:
    root = folder.resolve()
    for member in tar:
        path = root / member.name
        pointed = path
        if member.issym():
            pointed = path.parent / member.linkname
        elif member.islnk():
            pointed = root / member.linkname
        inside = all(p.resolve().is_relative_to(root) for p in (path, pointed))
        if not inside or not (
            member.isfile() or member.isdir() or member.issym() or member.islnk()
        ):
            raise tarfile.TarError(f"{member.name!r} is no file of this folder")


def apply_patches(source: Path) -> None:
    """Apply every carried patch exactly, with no fuzz.

    Raises:
        BuildError: a patch does not fit; it is named.
    """
    for patch in patches():
        apply_patch(patch, source)


def apply_patch(patch: Patch, source: Path) -> None:
    """Apply one patch exactly.

    Raises:
        BuildError: it does not fit.
        MissingComponentError: patch-ng is not installed.
    """
    try:
        import patch_ng
    except ImportError:
        raise MissingComponentError(
            "applying Horovod's patches needs patch-ng; run `pip install 'hpc_dl[horovod]'`"
        ) from None
    with _complaints() as complaints:
        parsed = patch_ng.fromstring(patch.diff)
        applied = parsed and parsed.apply(strip=1, root=os.fspath(source), fuzz=False)
    if not applied or complaints:
        details = "\n".join(complaints[-4:])
        raise BuildError(
            f"{patch.name} does not fit the source in {source}; it was made for Horovod {VERSION} "
            f"as published. {details}".rstrip()
        )


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """Collect what patch-ng logs, instead of printing it."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                messages.append(record.getMessage())

    log = logging.getLogger("patch_ng")
    collector, level, propagate = Collector(), log.level, log.propagate
    log.addHandler(collector)
    log.propagate = False
    try:
        yield messages
    finally:
        log.removeHandler(collector)
        log.setLevel(level)
        log.propagate = propagate
