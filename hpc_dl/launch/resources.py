"""How many cores and how much memory this process may use, also inside a container or a job."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def memory(root: Path = _ROOT) -> float | None:
    """Return the bytes that can be had: what is available, at most what the cgroups grant.

    Args:
        root: where ``proc`` and ``sys`` are; another one for tests.

    Returns:
        None where the system does not tell.
    """
    limits = [_number(text) for text in _group_files(root, "memory", "memory.max")]
    limits += [_number(text) for text in _group_files(root, "memory", "memory.limit_in_bytes")]
    # Not MemFree, which leaves out what caches would give back.
    for line in _text(root / "proc" / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            limits.append(_number(value.split()[0]) * 1024)
    least = min(limits, default=math.inf)
    return least if math.isfinite(least) else None


def cores(root: Path = _ROOT) -> int:
    """Return the cores that this process may run on, at most what its cgroups grant."""
    granted = [_share(*text.split()) for text in _group_files(root, "cpu", "cpu.max")]
    quotas = _group_files(root, "cpu", "cpu.cfs_quota_us")
    periods = _group_files(root, "cpu", "cpu.cfs_period_us")
    granted += [_share(quota, period) for quota, period in zip(quotas, periods, strict=False)]
    least = min(granted, default=math.inf)
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, math.ceil(least) if math.isfinite(least) else allowed))


def _share(quota: str = "", period: str = "", *_: str) -> float:
    """Return a quota in cores; infinite without one (``max``, or -1 in version 1)."""
    if _number(quota) > 0 and math.isfinite(_number(period)) and _number(period) > 0:
        return _number(quota) / _number(period)
    return math.inf


def _group_files(root: Path, controller: str, name: str) -> Iterator[str]:
    """Yield a file's content in this process's cgroup and in all above it, where it is there."""
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        base = root / "sys" / "fs" / "cgroup"
        if number != "0":  # version 1 has a tree for each controller
            if controller not in controllers.split(","):
                continue
            base /= controller
        folder = base / group.lstrip("/")
        while True:
            text = _text(folder / name)
            if text:
                yield text
            if folder in (base, folder.parent):
                break
            folder = folder.parent


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "max"
        return math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
