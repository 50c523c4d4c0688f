"""What a process may use is what the system has free, and what its cgroups grant."""

from pathlib import Path

import pytest

from hpc_dl.launch import resources, toolchain

GB = 10**9


def machine(root: Path, available: float, groups: str, files: dict[str, str]) -> Path:
    """Lay out /proc and /sys as a machine has them."""
    proc = root / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal: 999999999 kB\nMemFree: 1024 kB\nMemAvailable: {int(available / 1024)} kB\n"
    )
    (proc / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


V2 = "0::/slurm/job\n"
V1 = "4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {}, 50),
        (V2, {"slurm/job/memory.max": "max"}, 50),
        (V2, {"slurm/job/memory.max": str(8 * GB)}, 8),
        (V2, {"slurm/memory.max": str(6 * GB), "slurm/job/memory.max": str(8 * GB)}, 6),
        (V2, {"slurm/job/memory.max": str(800 * GB)}, 50),
        # In a container the group's folder is often the root of what is mounted.
        (V2, {"memory.max": str(7 * GB)}, 7),
        (V1, {"memory/job/memory.limit_in_bytes": str(5 * GB)}, 5),
        (V1, {"memory/memory.limit_in_bytes": str(4 * GB)}, 4),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, 50),
        (V2, {"slurm/job/memory.max": "nonsense"}, 50),
        ("", {}, 50),
    ],
)
def test_memory(tmp_path: Path, groups: str, files: dict[str, str], expected: float) -> None:
    root = machine(tmp_path, 50 * GB, groups, files)
    assert resources.memory(root) == pytest.approx(expected * GB, rel=1e-6)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {}, 64),
        (V2, {"slurm/job/cpu.max": "max 100000"}, 64),
        (V2, {"slurm/job/cpu.max": "300000 100000"}, 3),
        (V2, {"slurm/job/cpu.max": "250000 100000"}, 3),
        (V2, {"slurm/job/cpu.max": "10000 100000"}, 1),
        (V2, {"slurm/cpu.max": "200000 100000", "slurm/job/cpu.max": "max 100000"}, 2),
        (V1, {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 64),
        (V2, {"slurm/job/cpu.max": "nonsense"}, 64),
    ],
)
def test_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    files: dict[str, str],
    expected: int,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert resources.cores(machine(tmp_path, GB, groups, files)) == expected


def test_a_system_that_tells_nothing_has_some_memory(tmp_path: Path) -> None:
    assert resources.memory(tmp_path) is None


@pytest.mark.parametrize(
    ("cores", "memory", "jobs"),
    [(8, 5 * GB, 2), (2, 50 * GB, 2), (8, GB, 1), (8, None, 1)],
)
def test_jobs_follow_cores_and_memory(
    monkeypatch: pytest.MonkeyPatch, cores: int, memory: float | None, jobs: int
) -> None:
    monkeypatch.setattr(resources, "cores", lambda: cores)
    monkeypatch.setattr(resources, "memory", lambda: memory)
    assert toolchain.default_jobs() == jobs


def test_this_machine_has_both() -> None:
    assert resources.cores() >= 1
    assert (resources.memory() or 0) > 10**7
