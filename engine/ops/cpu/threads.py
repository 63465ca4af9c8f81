"""How many threads the CPU backend should use: the physical cores this process may run on.

Two hyper-threads of a core share its vector units and its path to memory, so a second one only adds waiting. Containers
often show all of a machine's cores and then grant less time: a cgroup's quota counts too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_CPU_DIR = Path("/sys/devices/system/cpu")
_CGROUP_DIR = Path("/sys/fs/cgroup")


def default_threads() -> int:
    """Physical cores in this process's affinity mask, at most the cgroup's CPU quota rounded up; at least 1."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = physical_cores(cpus, _CPU_DIR)
    quota = cgroup_cpus(_CGROUP_DIR)
    return max(1, cores if quota is None else min(cores, -int(-quota // 1)))


def physical_cores(cpus: Iterable[int], cpu_dir: Path) -> int:
    """Groups of sibling hyper-threads among `cpus`; each CPU counts as a core where the system does not tell."""
    return len({_read(cpu_dir / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus})


def cgroup_cpus(cgroup_dir: Path) -> float | None:
    """CPUs' worth of time this container may use, or None for no limit (cgroup v2, then v1)."""
    quota, period = (_read(cgroup_dir / "cpu.max") or "max 1").split()
    if quota == "max":
        quota = _read(cgroup_dir / "cpu" / "cpu.cfs_quota_us") or "-1"
        period = _read(cgroup_dir / "cpu" / "cpu.cfs_period_us") or "1"
    return int(quota) / int(period) if int(quota) > 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
