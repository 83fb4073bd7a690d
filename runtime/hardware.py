"""What the machine can do, found out by trying it, and how much memory it has."""

import functools
import math
import os
import re
import time
from pathlib import Path

import torch


@functools.cache
def slow_bfloat16(device: torch.device) -> bool:
    """Whether matrix products take many times as long in bfloat16 as in float32 on this device.

    Measured, in a fraction of a second: what the instruction set promises is not what torch's kernels make of it.
    """
    if device.type != "cpu":
        return False
    fastest = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where the cores are busy
    for _ in range(8):  # in turns, and the best counts: whatever else runs here only makes it slower
        for dtype in fastest:
            matrix = torch.ones(256, 256, dtype=dtype, device=device)
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return fastest[torch.bfloat16] > 8 * fastest[torch.float32]


LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}  # of control groups: version 2, version 1


def text_of(path: Path) -> str:
    """What a file of the kernel says; "" where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def main_memory(root: Path = Path("/")) -> float:
    """Bytes that Linux has left, or all that this process's control groups may have, if that is less.

    Without swap: every step goes through all that training holds. Elsewhere all there is; infinite if unknown.
    """
    known = [int(kib) * 1024 for kib in re.findall(r"MemAvailable: *(\d+) kB", text_of(root / "proc/meminfo"))]
    if not known and "SC_PHYS_PAGES" in os.sysconf_names:
        known = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controller, path = line.split(":", 2)
        folder = root / "sys/fs/cgroup" / controller / path.lstrip("/")
        # what a container calls its own group may have another name, or none, where it looks: the next one up counts
        for group in (folder, *folder.parents) if controller in LIMITS else ():
            known += map(int, re.findall(r"^\d+$", text_of(group / LIMITS[controller])))
    return min(known, default=math.inf)


def memory_per_rank(local_world: int) -> float:
    """Bytes for each of `local_world` ranks here: the smallest of their GPUs, whoever else is on it, or a share."""
    if not torch.cuda.is_available():
        return main_memory() / local_world
    gpus = range(min(local_world, torch.cuda.device_count()))
    return min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
