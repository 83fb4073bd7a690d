"""What the machine can do is found out by trying it, and what memory it has by asking its kernel."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.lines import ROOT
from runtime import hardware
from runtime.hardware import main_memory, memory_per_rank, slow_bfloat16

QUESTION = "import torch; from runtime.hardware import slow_bfloat16; print(slow_bfloat16(torch.device('cpu')))"


def answer(**environment: str) -> str:
    """In a process of its own: the libraries read their environment once."""
    arguments = {"env": os.environ | environment, "cwd": ROOT, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-c", QUESTION], check=True, **arguments).stdout.strip()


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN, which imitates CPUs"
)
def test_a_cpu_without_bf16_instructions_is_found_slow():
    """oneDNN's switch makes this machine one; on such a machine it changes nothing."""
    assert answer(ONEDNN_MAX_CPU_ISA="AVX2", DNNL_MAX_CPU_ISA="AVX2") == "True"


@pytest.mark.skipif(
    not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
    reason="no bf16 instructions here",
)
def test_a_cpu_with_bf16_instructions_is_not():
    assert answer() == "False"


def test_asking_leaves_the_process_as_it_was():
    threads, numbers = torch.get_num_threads(), torch.get_rng_state()
    slow_bfloat16.cache_clear()
    slow_bfloat16(torch.device("cpu"))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), numbers)


def test_other_devices_are_not_tried():
    assert not slow_bfloat16(torch.device("meta"))


# ---------------------------------------------------------------------------------------------------------------------
# Memory

MEMINFO = "MemTotal:       24684084 kB\nMemFree:        22781200 kB\nMemAvailable:      1000 kB\nCached: 5 kB\n"
UNLIMITED = 9223372036854771712  # version 1 says


def kernel(root: Path, cgroup: str = "", **limits: object) -> Path:
    """A machine with 1000 KiB left: /proc/self/cgroup, and files under /sys/fs/cgroup."""
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, limit in limits.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    return root


V1 = "9:name=systemd:/\n4:memory:/jobs/7:a\n2:cpuacct:/elsewhere\n0::/\n"


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("", {}, 1_024_000),
        ("0::/jobs/7\n", {}, 1_024_000),
        ("0::/jobs/7\n", {"jobs/7/memory.max": 5000}, 5000),
        ("0::/jobs/7\n", {"jobs/7/memory.max": "max"}, 1_024_000),
        ("0::/jobs/7\n", {"jobs/7/memory.max": 2_000_000}, 1_024_000),
        ("0::/jobs/7\n", {"jobs/7/memory.max": 5000, "jobs/memory.max": 4000}, 4000),
        ("0::/jobs/7\n", {"jobs/7/memory.max": "max", "jobs/memory.max": 6000}, 6000),
        ("0::/jobs/7\n", {"jobs/8/memory.max": 5000, "other/memory.max": 4000}, 1_024_000),
        ("0::/\n", {"memory.max": 5000}, 5000),  # a container sees itself at the top
        ("0::/docker/abc\n", {"memory.max": 5000}, 5000),  # or by a name that does not exist inside
        ("0::/../../jobs\n", {"memory.max": 5000}, 5000),
        (V1, {"memory/jobs/7:a/memory.limit_in_bytes": 5000}, 5000),
        (V1, {"memory/jobs/7:a/memory.limit_in_bytes": UNLIMITED, "memory/memory.limit_in_bytes": 3000}, 3000),
        (V1, {"memory/jobs/7:a/memory.limit_in_bytes": UNLIMITED}, 1_024_000),
        (V1, {"cpuacct/elsewhere/memory.limit_in_bytes": 5000, "elsewhere/memory.max": 5000}, 1_024_000),
    ],
)
def test_main_memory_is_what_is_left_within_the_control_groups(tmp_path, cgroup, limits, expected):
    assert main_memory(kernel(tmp_path, cgroup, **limits)) == expected


def test_without_linux_all_memory_counts_and_without_an_answer_there_is_no_limit(tmp_path, monkeypatch):
    assert main_memory(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "sysconf_names", {})
    assert main_memory(tmp_path) == math.inf


def test_this_machine_has_some_memory_and_not_more_than_all():
    assert 2**26 < main_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_ranks_on_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "main_memory", lambda: 12)
    assert [memory_per_rank(ranks) for ranks in (1, 2, 4)] == [12, 6, 3]


def test_each_rank_has_a_gpu_and_the_smallest_counts_of_those_that_are_used(monkeypatch):
    sizes = [40, 20, 30, 10]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=sizes[gpu]))
    assert [memory_per_rank(ranks) for ranks in (1, 2, 3, 4, 8)] == [40, 20, 20, 10, 10]
