"""Peak memory of the loss, in chunks and on whole logits: `python benchmarks/loss_memory.py`.

First counted, at 8,192 tokens x 131,072 words: every tensor that forward and backward allocate, on tensors that have a
shape but no memory. Then measured with a quarter of the words: resident memory and CPU time, each in a process of its
own.
"""

import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import SummedLoss, summed_cross_entropy

FULL, MEASURED = (8192, 131072), (8192, 32768)


class PeakBytes(TorchDispatchMode):
    """The most bytes that are alive at once of what operations allocate while it is active; `given` does not count."""

    def __init__(self, given: list[Tensor] = ()):
        super().__init__()
        self.alive, self.now, self.peak = {tensor.untyped_storage()._cdata for tensor in given}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it becomes operations on local tensors, which come by here again
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, key: int, nbytes: int) -> None:
        self.alive.remove(key)
        self.now -= nbytes


def whole_logits(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    """The naive way."""
    return summed_cross_entropy(head(hidden).flatten(0, 1), targets.flatten())


WAYS = {"whole logits": whole_logits, "in chunks": SummedLoss()}


def forward_and_backward(way: Callable, tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> PeakBytes:
    """Counted where the tensors are fake, and done where they are real."""
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    hidden = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (1, tokens))
    with PeakBytes([head.weight, hidden, targets]) as counted:
        way(hidden, targets, head).backward()
    return counted


def measure(name: str) -> None:
    """Prints how much the process grew, in GiB, and CPU seconds. A small run comes first, for what torch loads."""
    forward_and_backward(WAYS[name], 8, *MEASURED[1:], 256, torch.float32)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    forward_and_backward(WAYS[name], *MEASURED, 256, torch.float32)
    seconds = time.process_time() - start
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, seconds)


def main() -> None:
    if sys.argv[1:]:
        return measure(sys.argv[1])
    print("| counted | hidden_size | whole logits | in chunks | share |\n| --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for width in (256, 2048, 4096):
            with FakeTensorMode():
                whole, chunks = (forward_and_backward(way, *FULL, width, dtype).peak for way in WAYS.values())
            numbers = f"{whole / 2**30:.2f} GiB | {chunks / 2**30:.2f} GiB | {chunks / whole:.2f}"
            print(f"| {str(dtype).removeprefix('torch.')} | {width:,} | {numbers} |")
    print("\n| measured | resident memory | CPU seconds |\n| --- | --- | --- |")
    for name in WAYS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        gib, seconds = map(float, done.stdout.split())
        print(f"| {name} | {gib:.2f} GiB | {seconds:.1f} |")
    return None


if __name__ == "__main__":
    main()
