"""Whether to sum gradients over ranks once a step instead of once a micro-step: `python benchmarks/accumulation.py`.

FSDP2's `set_requires_gradient_sync(False)` leaves the gradients of all but the last micro-step where they are, whole on
every rank. That saves communication and costs the memory of a model's whole gradient. Rounds in turns, on two ranks
with four micro-steps a step; a ratio below 1 means that the late sum is faster, or smaller.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.bench import BATCH, SEQ_LEN, SHAPE
from benchmarks.contenders import Contender, Job, PaceWithMemory, ours
from model import Llama

ROUNDS, STEPS, MICRO_STEPS, RANKS = 7, 2, 4, 2


def late(job: Job, device: torch.device, folder: Path, pace: Callable[[], None]) -> None:
    """train.py with one sum a step."""
    forward, calls = Llama.forward, 0

    def forward_with_late_sum(model: Llama, *inputs: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        model.set_requires_gradient_sync(calls % MICRO_STEPS == 0)
        return forward(model, *inputs)

    Llama.forward = forward_with_late_sum
    ours(job, device, folder, pace)


def main() -> None:
    job = Job(SHAPE, SEQ_LEN, BATCH, BATCH // RANKS // MICRO_STEPS, "float32", RANKS)
    with tempfile.TemporaryDirectory() as folder:
        each = Contender(ours, job, Path(folder) / "each", PaceWithMemory)
        once = Contender(late, job, Path(folder) / "late", PaceWithMemory)
        times, memory = [], []
        for _ in range(ROUNDS):
            (a, each_gib), *_ = each.ask(STEPS)
            (b, late_gib), *_ = once.ask(STEPS)
            times.append(b / a)
            memory.append(late_gib / each_gib)
        each.stop()
        once.stop()
    print(f"dp {RANKS}, {MICRO_STEPS} micro-steps, float32: one sum a step against one a micro-step")
    print(f"time {statistics.median(times):.2f} [{min(times):.2f}, {max(times):.2f}]")
    print(f"peak memory of a rank {memory[-1]:.2f}: {late_gib:.2f} against {each_gib:.2f} GiB")


if __name__ == "__main__":
    main()
