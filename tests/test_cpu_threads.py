"""The default number of threads, from a machine's description as Linux writes it."""

from __future__ import annotations

import os

import pytest

try:
    from engine.ops.cpu import threads
except ImportError as error:
    pytest.skip(f"the C++ extension is not built: {error}", allow_module_level=True)


def describe_cpus(folder, siblings):
    for cpu, text in siblings.items():
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text + "\n")


def test_hyper_threads_of_one_core_count_once(tmp_path):
    describe_cpus(tmp_path, {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"})
    assert threads.physical_cores(range(8), tmp_path) == 4
    assert threads.physical_cores({1, 5, 6}, tmp_path) == 2  # an affinity mask with both halves of core 1


def test_cpus_without_a_description_are_cores(tmp_path):
    assert threads.physical_cores(range(6), tmp_path) == 6


@pytest.mark.parametrize(("text", "cpus"), [("max 100000", None), ("150000 100000", 1.5), ("200000 100000", 2.0)])
def test_quota_of_cgroup_v2(tmp_path, text, cpus):
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert threads.cgroup_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1", None), ("50000", 0.5), ("400000", 4.0)])
def test_quota_of_cgroup_v1(tmp_path, quota, cpus):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.cgroup_cpus(tmp_path) == cpus


def test_no_cgroup_is_no_limit(tmp_path):
    assert threads.cgroup_cpus(tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [("50000 100000", 1), ("250000 100000", 3), ("max 100000", 4)])
def test_the_smaller_of_cores_and_quota(tmp_path, monkeypatch, quota, expected):
    describe_cpus(tmp_path, {cpu: str(cpu) for cpu in range(4)})
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(threads, "_CPU_DIR", tmp_path)
    monkeypatch.setattr(threads, "_CGROUP_DIR", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert threads.default_threads() == expected
