"""What the machine can do, found out by trying it."""

import functools
import time

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
