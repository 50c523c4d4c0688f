"""Keep built wheels, each under the key of all that it depends on.

A wheel's folder holds the wheel and ``wheel.json``: the key's parts in words, the wheel's name
and its hash. The metadata is written last, so that a build that was cut off leaves no wheel that
looks whole.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_dl.errors import BuildError

METADATA = "wheel.json"
LOG = "build.log"

#: How a file system says that it has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_CHOOSE = "choose another cache with --wheel-dir or XDG_CACHE_HOME"


@dataclass(frozen=True)
class Key:
    """All that a compiled Horovod depends on; a change in any of it means another wheel.

    Args:
        horovod: its version.
        patches: a hash of the carried patches.
        python: Python's version and ABI.
        machine: the architecture and the processor's extensions that are used.
        torch: PyTorch's version with its local part, or None to leave it out.
        tensorflow: TensorFlow's version, or None to leave it out.
        mpi: name and version of the MPI, and where it lies if outside this environment.
        gpu: ``nccl``, ``mpi`` or ``none``.
        cuda: CUDA's release and NCCL's version, or None.
        settings: the user's compiler and flags, or None if there are none.
    """

    horovod: str
    patches: str
    python: str
    machine: str
    torch: str | None
    tensorflow: str | None
    mpi: str
    gpu: str
    cuda: str | None
    settings: str | None = None

    @property
    def digest(self) -> str:
        """Return a hash of all parts."""
        parts = asdict(self)
        if self.settings is None:  # as for wheels from before this part was there
            del parts["settings"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Return a folder name that a person can read and no other key has."""
        parts = [f"horovod-{self.horovod}", self.python]
        parts += [f"torch{self.torch}"] if self.torch else []
        parts += [f"tf{self.tensorflow}"] if self.tensorflow else []
        parts += [self.gpu] if self.gpu != "none" else []
        return "-".join([*parts, self.digest])


@dataclass(frozen=True)
class CachedWheel:
    """A whole, verified wheel."""

    path: Path
    key: Key
    seconds: float
    log: Path


def default_folder(environ: Mapping[str, str]) -> Path:
    """Return ``$XDG_CACHE_HOME/hpc_dl/wheels``, by default below ``~/.cache``.

    Raises:
        BuildError: there is no home, and the temporary folder used instead is not one's own.
    """
    base = environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "hpc_dl" / "wheels"
    except RuntimeError:  # a container run with a user's number alone
        return _private_folder() / "wheels"


def _private_folder() -> Path:
    # What is installed comes from here, so nobody else may be able to put a wheel there.
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"hpc_dl-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise BuildError(
            f"no home folder, and {folder} cannot be made: {error}; {_CHOOSE}"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise BuildError(f"no home folder, and others can write to {folder}; {_CHOOSE}")
    return folder


def find(folder: Path, key: Key) -> CachedWheel | None:
    """Return the wheel of this key if it is there, whole and unchanged."""
    wheel = _read(folder / key.name)
    return wheel if wheel is not None and wheel.key == key else None


def contents(folder: Path) -> list[CachedWheel]:
    """Return every whole wheel in the cache, the newest first."""
    try:
        folders = list(folder.iterdir())
    except OSError:  # missing, or closed to this user
        return []
    wheels = [wheel for home in folders if (wheel := _read(home)) is not None]
    return sorted(wheels, key=lambda wheel: wheel.path.stat().st_mtime, reverse=True)


def _read(home: Path) -> CachedWheel | None:
    try:
        data = json.loads((home / METADATA).read_text())
        key = Key(**data["key"])
        path = home / Path(data["wheel"]).name
        if _sha256(path) != data["sha256"]:
            return None
        return CachedWheel(path, key, float(data["seconds"]), home / LOG)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(folder: Path, key: Key, built: Path, seconds: float) -> CachedWheel:
    """Move a wheel that was just built into the cache.

    Args:
        folder: the cache.
        key: what the wheel depends on.
        built: the wheel, anywhere.
        seconds: how long the build took.

    Raises:
        BuildError: the cache cannot be written to.
    """
    try:
        return _store(folder / key.name, key, built, seconds)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _store(home: Path, key: Key, built: Path, seconds: float) -> CachedWheel:
    home.mkdir(parents=True, exist_ok=True)
    (home / METADATA).unlink(missing_ok=True)
    path = home / built.name
    with _replacing(path) as temporary:
        shutil.copyfile(built, temporary)
    data = {
        "key": asdict(key),
        "wheel": path.name,
        "sha256": _sha256(path),
        "seconds": round(seconds, 1),
    }
    with _replacing(home / METADATA) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")
    return CachedWheel(path, key, seconds, home / LOG)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write beside ``path``; it takes its place at the end, or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, key: Key, waiting: str) -> Iterator[None]:
    """Hold the lock of a key, so that the same wheel is not built twice at once.

    Args:
        folder: the cache.
        key: of the wheel.
        waiting: printed once if another process holds the lock.

    Raises:
        BuildError: the cache cannot be written to.
    """
    home = folder / key.name
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / ".lock").open("w")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise _cannot_write(folder, error) from error
            # Two builds at once cost time, not correctness: a wheel is put in place whole.
            print(f"going on without a lock in {folder}: {error}", file=sys.stderr, flush=True)
        yield


def _cannot_write(folder: Path, error: OSError) -> BuildError:
    return BuildError(f"cannot write to the wheel cache {folder}: {error}; {_CHOOSE}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
