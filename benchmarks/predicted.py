"""What cost/ predicts for this machine's CPU beside what a step takes: `python benchmarks/predicted.py`.

For each of four meshes the real loop of train.py runs on gloo ranks. Every few steps it stands still, and the same
processes, all at once and with the threads that they train with, measure what one rank gets of this machine:

    matmul       products of several shapes; seconds per FLOP are a + b / depth, hence peak and halving depth
    attention    forward and backward, with a rank's heads and rows
    elementwise  of several sizes, each reading what the last one wrote, all results kept as forward keeps its own
    host         CPU time of a micro-step of the same plan with next to nothing to compute, by the number of kernels;
                 where ranks share a core, each waits for its turn
    collectives  all three kinds, of several sizes, in the mesh's groups, each after a matrix product: as in training
                 ranks arrive at different times, and gloo's threads have slept. Seconds are latency + bytes / link.
                 Where ranks share a core, another one computes while this one waits: then CPU time is what counts

What is measured right before and right after some steps makes a row of cost/hardware.toml, and that the prediction of
these steps: nothing is fitted to them. The table has medians over the turns, and of the ratio the extremes, as in
bench.py: what else the machine does hits both alike. The rows of the median are printed too. Further arguments are
train.py's: `[CONFIG.toml] [--section.key=value ...]`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, harmonic_mean, median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import configs
import explain
import parallel
import train
from benchmarks.contenders import Contender, Pace
from benchmarks.profile_step import MESHES
from configs import Config
from cost import record
from cost.hardware import Hardware
from cost.operations import kernels
from cost.predict import predict
from cost.text import table
from model import Llama
from runtime import ranks
from runtime.hardware import memory_per_rank

SHAPE = {"model.vocab_size": 4096, "model.hidden_size": 384, "model.intermediate_size": 1024}  # without a CONFIG
SHAPE |= {"model.num_attention_heads": 6, "model.num_key_value_heads": 6}
SHAPE |= {"data.seq_len": 512, "train.global_batch_size": 4}
LOOP = {"data.layout": "pack", "data.val_fraction": 0, "train.steps": 1_000_000, "checkpoint.every": 0}
Found = dict[tuple, float]  # seconds of one call, by what it is


@dataclass
class Job:
    """Our loop on so many ranks; `size`: rows of the matrices that are multiplied alone."""

    ranks: int
    arguments: list[str]
    size: int


def smallest(config: Config) -> Config:
    """The same plan and blocks with next to nothing to compute."""
    sizes = {"vocab_size": 256, "hidden_size": 2 * config.model.num_attention_heads, "head_dim": 2}
    model = replace(config.model, **sizes, intermediate_size=16, max_position_embeddings=8)
    return replace(config, model=model, data=replace(config.data, seq_len=8))


class Turns(Pace):
    """Answers with the mean seconds of the steps that it let through, and of what is measured after them."""

    def prepare(self, config: Config, size: int) -> None:
        self.config, self.size, self.mesh = config, size, parallel.build_mesh(config.parallel, self.device)
        with torch.device("meta"):
            self.model = Llama(smallest(config).model)
        parallel.parallelize(self.model, self.mesh, config.parallel)
        self.model.to_empty(device=self.device)
        self.model.init_weights(0, parallel.place_shard)

    def answer(self) -> tuple[float, Found]:
        return super().answer(), self.computing() | self.launching() | self.sending()

    def repeated(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, while all ranks do the same, for longer than a process has a core for itself."""
        call()
        dist.barrier()
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < 1e-4 * self.size:
            call()
            count += 1
        return (time.perf_counter() - start) / count

    def computing(self) -> Found:
        found, size, model, rows = {}, self.size, self.config.model, self.config.train.micro_batch_size
        for width, depth in product((size // 4, size), (size // 16, size // 4, size)):
            right = torch.randn(width, depth).T
            for name, left in ("input", torch.randn(size, depth)), ("weight", torch.randn(depth, size).T):
                found["matmul", name, width, depth] = self.repeated(partial(torch.mm, left, right))
        shape = rows, model.num_attention_heads // self.config.parallel.tp, self.config.data.seq_len, model.head_dim
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        back = partial(torch.autograd.grad, attend(), (q, k, v), torch.randn(shape), retain_graph=True)
        found |= {("attention", 2): self.repeated(attend), ("attention", 5): self.repeated(back)}  # matrix products

        def chain(x: Tensor, times: int) -> None:
            kept = [x]
            for _ in range(times):
                kept.append(F.silu(kept[-1]))
                kept.append(kept[-1] * x)

        for share in (16, 4, 1):
            x = torch.randn(8192 * size // share)
            found["elementwise", 5 * x.nbytes] = self.repeated(partial(chain, x, share)) / share
        return found

    def launching(self) -> Found:
        rows = torch.zeros(self.config.train.micro_batch_size, 8, dtype=torch.int64)

        def micro_step() -> float:
            start = time.thread_time()  # without what gloo's threads do, and without waiting for them
            with parallel.loss_context(self.mesh):
                self.model(rows, rows).backward()
            self.model.zero_grad()
            return time.thread_time() - start

        return {("host",): fmean([micro_step() for _ in range(5)][1:])}

    def sending(self) -> Found:
        found, before = {}, partial(torch.mm, *torch.randn(2, self.size, self.size))
        share = self.mesh.size() / ranks.cores()
        clock = time.perf_counter if share <= 1 else lambda: share * time.process_time()
        for axis, count in product(("dp_shard", "tp"), (4, 512, 2048)):
            if (n := self.mesh[axis].size()) > 1:
                whole, own = torch.ones(count * self.size), torch.ones(count * self.size // n)
                calls = {
                    "all-gather": partial(dist.all_gather_into_tensor, whole, own),
                    "reduce-scatter": partial(dist.reduce_scatter_tensor, own, whole),
                    "all-reduce": partial(dist.all_reduce, whole),
                }
                for kind, call in calls.items():
                    seconds = []
                    for _ in range(7):
                        before()
                        start = clock()
                        call(group=self.mesh.get_group(axis))
                        seconds.append(clock() - start)
                    found[kind, axis, whole.nbytes * (n - 1) / n] = fmean(seconds[1:])
        return found


def training(job: Job, device: torch.device, folder: Path, pace: Turns) -> None:
    ranks.init_distributed()
    config = configs.load([*job.arguments, f"--run.dir={folder}"])
    pace.prepare(config, job.size)
    for kind, _ in train.train(config, device):
        if kind == "line":  # one a step
            pace()


def mean_of(several: Sequence[Found]) -> Found:
    return {key: fmean(each[key] for each in several) for key in several[0]}


def straight(points: list[tuple[float, float]]) -> tuple[float, float]:
    """a and b, neither below 0, of the line a + b x that is nearest to the points (x, y) by relative error."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    columns = torch.stack((1 / y, x / y), 1)
    a, b = torch.linalg.lstsq(columns, torch.ones_like(y)[:, None]).solution.flatten().tolist()
    alone = (columns.sum(0) / columns.square().sum(0)).tolist()
    return (a, b) if min(a, b) >= 0 else (alone[0], 0.0) if b < 0 else (0.0, alone[1])


def hardware_of(name: str, found: Found, config: Config, job: Job, launches: int) -> Hardware:
    """A row of cost/hardware.toml; `launches` are the kernels of the smallest micro-step."""
    at = {kind: [(key, seconds) for key, seconds in found.items() if key[0] == kind] for kind, *_ in found}
    per_flop, per_depth = straight([(1 / k[3], seconds / (2 * job.size * k[2] * k[3])) for k, seconds in at["matmul"]])
    model, length = config.model, config.data.seq_len
    heads = config.train.micro_batch_size * model.num_attention_heads // config.parallel.tp
    flops = heads * length**2 * model.head_dim  # of a product of attention: causal, so half of it
    kinds = at.keys() & {"all-gather", "reduce-scatter", "all-reduce"}  # one rank has none
    bandwidth = harmonic_mean([key[1] / seconds for key, seconds in at["elementwise"]])
    sent = {kind: straight([(key[2], seconds) for key, seconds in at[kind]]) for kind in sorted(kinds)}
    # noise may hide all that sizes cost
    per_byte = {kind: max(slope, 1 / bandwidth) for kind, (_, slope) in sent.items()}
    link = 1 / per_byte["all-gather"] if sent else float("inf")
    same = {"matmul": 1.0, "efficiency": 1.0, "streaming": 1.0, "units": 1, "hop": 0.0}  # in what was measured already
    return Hardware(
        name=name,
        names=(name,),
        flops=1 / per_flop,
        float32_flops=1 / per_flop,
        bandwidth=bandwidth,
        memory_gib=memory_per_rank(job.ranks) / 2**30,
        link=link,
        node_link=link,
        attention=tuple(key[1] * flops / seconds * per_flop for key, seconds in at["attention"]),
        half_depth=per_depth / per_flop,
        launch=found["host",] / launches * max(1, job.ranks / ranks.cores()),
        latency=fmean(latency for latency, _ in sent.values()) if sent else 0.0,
        rounds={kind: each * link for kind, each in per_byte.items()},
        asynchronous=False,
        **same,
    )


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml(each)}' for key, each in value.items())} }}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else configs.toml_value(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--turns", type=int, default=8, help="how often steps and measurements take turns")
    parser.add_argument("--steps", type=int, default=2, help="steps of one turn")
    parser.add_argument("--size", type=int, default=1024, help="rows of the matrices that are multiplied alone")
    parser.add_argument("--mesh", choices=MESHES, help="only this one")
    options, given = parser.parse_known_args()
    settings = {} if given and not given[0].startswith("--") else SHAPE
    lines = [f"--{key}={configs.toml_value(value)}" for part in (settings, LOOP) for key, value in part.items()]
    given = [*given[: not settings], *lines, *given[not settings :]]
    batch = explain.load([*given, "--train.micro_batch_size=1"], 1, 1).train.global_batch_size
    rows, hardware = [], []
    for mesh, (n, tp) in MESHES.items() if options.mesh is None else [(options.mesh, MESHES[options.mesh])]:
        job = Job(n, [*given, f"--parallel.tp={tp}", f"--train.micro_batch_size={batch * tp // n}"], options.size)
        with tempfile.TemporaryDirectory() as folder:
            contender = Contender(training, job, Path(folder) / mesh, Turns)
            turns = [contender.ask(options.steps) for _ in range(options.turns)]
            contender.stop()
        config = explain.load(job.arguments, n, n)
        report, tiny = (record.explain(each, n, train.make_optimizer) for each in (config, smallest(config)))
        launches = sum(tiny.trace.layers.count(each.owner) if each.owner else 1 for each in kernels(tiny.trace.tape))
        name, found = f"cpu-{mesh.replace(' ', '-')}", [mean_of([each for _, each in turn]) for turn in turns]
        gpus = [hardware_of(name, mean_of(pair), config, job, launches) for pair in pairwise(found)]
        seconds = [max(step for step, _ in turn) for turn in turns[1:]]
        made = [predict(report, gpu, n) for gpu in gpus]
        ratios = [each.step_seconds / step for each, step in zip(made, seconds, strict=True)]
        parts = [median(each.seconds[part] for each in made) for part in made[0].seconds]
        whole = median(seconds), median(each.step_seconds for each in made)
        rows.append([mesh, *(f"{x:.3f}" for x in (*whole, median(ratios), min(ratios), max(ratios), *parts))])
        middle = {key: median(each[key] for each in found) for key in found[0]}
        row = asdict(hardware_of(name, middle, config, job, launches))
        hardware.append(f"[{row.pop('name')}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in row.items()))
    heads = ["seconds of a step", "measured", "predicted", "ratio", "least", "most", *made[0].seconds]
    print(table(heads, rows, 10), *hardware, sep="\n")


if __name__ == "__main__":
    main()
