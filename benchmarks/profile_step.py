"""Where the time of a training step goes, per mesh: `python benchmarks/profile_step.py [--dtype float32] [--compile]`.

The real loop of train.py runs under torch.profiler on the shape of bench.py. The table shows shares of a step on
rank 0, in percent:

    matmul         matrix products of projections, feed-forward, head and their gradients
    attention      scaled_dot_product_attention, forward and backward
    loss           cross-entropy over the logits; its matrix products count as matmul
    elementwise    norms, RoPE, SiLU, residuals, and whatever else is computed or copied
    optimizer      AdamW, and the passes over the gradients that measure and scale them
    communication  what is sent and waited for, and FSDP's copies and casts around it
    data           waiting for rows
    Python         what is left: Python, DTensor and autograd between the operators

The profiler takes time for each operator, so Python's share is an upper bound.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).parent.parent))
import parallel
from benchmarks.bench import BATCH, SEQ_LEN, SHAPE, SLOW_BFLOAT16
from benchmarks.contenders import Contender, Job, Pace, ours
from model import SummedLoss
from runtime.hardware import slow_bfloat16
from runtime.monitor import Meter

MESHES = {"1 rank": (1, 1), "tp 2": (2, 2), "dp 2": (2, 1), "dp 2 x tp 2": (4, 2)}  # ranks, tp
NAMES = {  # parts of an operator's name; the first that fits counts
    "matmul": ("aten::mm", "aten::bmm", "aten::addmm", "mkldnn_linear", "mkl_linear"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "optimizer": ("aten::_fused_adam",),
    "communication": ("c10d", "gloo"),
    "elementwise": ("aten::", "cpp_fused"),
}
RANGES = {"loss", "optimizer", "communication", "data"}  # that `named` opens: all operators inside belong to it
CATEGORIES = ["matmul", "attention", "loss", "elementwise", "optimizer", "communication", "data", "Python"]


def category(event: Any) -> str:
    """Of the time that an event of the profiler spends outside of those that it calls."""
    ancestor = event
    while ancestor is not None:
        if ancestor.name in RANGES:
            return ancestor.name
        if ancestor is not event and ancestor.name.startswith(("FSDP::all_gather", "FSDP::post_backward_reduce")):
            return "communication"
        ancestor = ancestor.cpu_parent
    return next((kind for kind, parts in NAMES.items() if any(part in event.name for part in parts)), "Python")


def named(label: str, function: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return call


def name_ranges() -> None:
    loading, work = Meter.loading, torch._C._distributed_c10d.Work

    def recorded_loading(meter: Meter, batches: Iterator[Any], count: int) -> Iterator[Any]:
        timed = loading(meter, batches, count)
        while (batch := named("data", next)(timed, None)) is not None:
            yield batch

    Meter.loading = recorded_loading
    work.wait = named("communication", work.wait)
    dist.all_reduce = named("communication", dist.all_reduce)
    SummedLoss.cross_entropy = staticmethod(named("loss", SummedLoss.cross_entropy))
    torch.autograd.grad = named("loss", torch.autograd.grad)  # its only use is the loss
    for name in ("gradient_square", "scale_gradients"):
        setattr(parallel, name, named("optimizer", getattr(parallel, name)))


class ProfilingPace(Pace):
    """Profiles the steps that it lets through; answers with the seconds of each category."""

    def __init__(self, pipe: Any, device: torch.device):
        super().__init__(pipe, device)
        self.profiler = self.whole = None
        name_ranges()
        torch._inductor.config.cpp.enable_kernel_profile = True

    def begin(self) -> None:
        self.profiler, self.whole = profile(activities=[ProfilerActivity.CPU]), record_function("step")
        self.profiler.__enter__()
        self.whole.__enter__()

    def answer(self) -> Counter:
        spent = Counter()
        if self.profiler is not None:  # None after the warm-up
            self.whole.__exit__(None, None, None)
            self.profiler.__exit__(None, None, None)
            events = self.profiler.events()
            (thread,) = {event.thread for event in events if event.name == "step"}
            for event in events:
                if event.thread == thread:
                    spent[category(event)] += event.self_cpu_time_total / 1e6 / self.steps
        return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.dtype == "bfloat16" and slow_bfloat16(torch.device("cpu")):
        sys.exit(f"bfloat16 is left out: {SLOW_BFLOAT16}")
    shares = {}
    for mesh, (ranks, tp) in MESHES.items():
        micro_batch = BATCH * tp // ranks
        job = Job(SHAPE, SEQ_LEN, BATCH, micro_batch, arguments.dtype, ranks, tp, arguments.compile)
        with tempfile.TemporaryDirectory() as folder:
            contender = Contender(ours, job, Path(folder) / mesh, ProfilingPace)
            spent = contender.ask(arguments.steps)[0]
            contender.stop()
        shares[mesh] = {kind: 100 * spent[kind] / spent.total() for kind in CATEGORIES}
    print(f"{arguments.dtype}{', compiled' * arguments.compile}, shares of a step in percent\n")
    print(f"| | {' | '.join(MESHES)} |\n|{' --- |' * (len(MESHES) + 1)}")
    for kind in CATEGORIES:
        print(f"| {kind} | {' | '.join(f'{shares[mesh][kind]:.1f}' for mesh in MESHES)} |")


if __name__ == "__main__":
    main()
