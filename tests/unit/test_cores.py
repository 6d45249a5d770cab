"""Cores: the affinity, and what the control group allows of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vernier.cores import available_cores, processor_limit
from vernier.processes import number
from vernier.processes.number import front_count
from vernier.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def _sixty_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),
        ("150000 100000\n", 2),
        ("400000 100000\n", 4),
        ("40000 10000\n", 4),
        ("10000000 100000\n", 64),
        ("max 100000\n", 64),
        ("0 100000\n", 64),
        ("100000 0\n", 64),
        ("nonsense\n", 64),
        ("", 64),
    ],
)
def test_a_limit_of_processor_time_is_a_limit_of_cores(tmp_path: Path, text: str, cores: int) -> None:
    write(tmp_path, "sys/fs/cgroup/cpu.max", text)
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    assert available_cores(tmp_path) == cores


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert processor_limit(tmp_path) is None
    assert available_cores(tmp_path) == 64


def test_the_narrowest_of_the_groups_around_the_process_counts(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/kubepods/pod/container\n")
    for folder, text in (
        ("kubepods", "max 100000"),
        ("kubepods/pod", "200000 100000"),
        ("kubepods/pod/container", "300000 100000"),
    ):
        write(tmp_path, f"sys/fs/cgroup/{folder}/cpu.max", text)
    assert available_cores(tmp_path) == 2


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_version_1_of_control_groups(tmp_path: Path, controllers: str) -> None:
    write(tmp_path, "proc/self/cgroup", f"4:memory:/m\n2:{controllers}:/docker/x\n1:name=systemd:/\n")
    write(tmp_path, "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us", "300000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us", "100000\n")
    assert available_cores(tmp_path) == 3
    write(tmp_path, "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us", "-1\n")  # no limit
    assert available_cores(tmp_path) == 64


def test_a_group_that_lies_outside_of_what_is_mounted_is_not_looked_for(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/../../other\n")
    write(tmp_path, "sys/other/cpu.max", "100000 100000")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "200000 100000")
    assert available_cores(tmp_path) == 2


@pytest.mark.parametrize(("cores", "fronts"), [(1, 0), (2, 1), (3, 1), (4, 2), (16, 8), (64, 8)])
def test_half_of_the_cores_are_fronts(monkeypatch: pytest.MonkeyPatch, cores: int, fronts: int) -> None:
    monkeypatch.setattr(number, "available_cores", lambda: cores)
    monkeypatch.setattr("sys.platform", "linux")
    assert front_count(Settings()) == fronts
    assert front_count(Settings(fronts=3)) == 3
    assert front_count(Settings(fronts=0)) == 0


def test_there_are_no_processes_where_they_are_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert front_count(Settings()) == 0
    with pytest.raises(SettingsError, match="needs Linux"):
        front_count(Settings(fronts=2))
