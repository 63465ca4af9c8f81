"""How much memory this process may still take and how much it has taken.

Limits of containers count: a machine's free memory says little inside a control group. Sizes are bytes. Linux is read
precisely; elsewhere physical memory is the bound. Nothing here allocates.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

_CGROUPS = (  # (limit, usage, statistics, name of the reclaimable page cache in them) of versions 2 and 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_memory() -> int:
    """Bytes this process can still allocate without swapping: the system's figure, capped by the control group's."""
    bounds = [_system_available()]
    for limit_file, usage_file, stat_file, reclaimable in _CGROUPS:
        limit, usage = _read(limit_file), _read(usage_file)
        if limit.isdigit() and usage.isdigit():  # a limit of "max" is none
            cached = dict(line.split(" ", 1) for line in _read(stat_file).splitlines()).get(reclaimable, "0")
            bounds.append(max(0, int(limit) - int(usage) + int(cached)))
    return min(bounds)


def peak_memory() -> int:
    """The process's peak resident set, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes


def _system_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _read(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""


def kv_cache_budget() -> int:
    """Bytes that a KV cache on the CPU may take now unless told otherwise.

    An embedded engine is a guest; and the cap of max_num_seqs x max_model_len usually binds first.
    """
    return available_memory() // 4
