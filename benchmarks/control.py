"""What ranks say to each other besides the model, at the start and in each step.

    python benchmarks/control.py [RANKS ...]

So many real gloo processes on this machine, 2 to 32 unless told otherwise: seconds or milliseconds until the last rank
is done, the median of the repetitions. All ranks share this machine's cores, so that with more of them each line holds
the work of all, one after the other: on a cluster, where each has a core of its own, it is what the network takes. So
this is an upper bound for as many ranks, and how a line grows is what it is for. Linux only: the processes are forked.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import configs
import parallel
from configs import Config
from runtime import ranks
from runtime.shutdown import Shutdown

SIZES, REPETITIONS = (2, 4, 8, 16, 32), 20
GIGANTIC = [(f"/shared/corpus/part-{number:05d}.parquet", 2**31) for number in range(10_000)]


def seconds(function: Callable[[], Any], repetitions: int = REPETITIONS) -> float:
    """Of one call, until the last rank is done."""
    times = []
    for _ in range(repetitions):
        dist.barrier()
        start = time.perf_counter()
        function()
        took = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        times.append(took.item())
    return statistics.median(times)


def serve(rank: int, size: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    store, start = dist.FileStore(f"{folder}/{size}", size), time.perf_counter()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found = {"process group, s": time.perf_counter() - start}
    shape = parallel.ParallelConfig(tp=min(size, 8))
    start = time.perf_counter()
    mesh = parallel.build_mesh(shape, torch.device("cpu"))
    found["mesh, s"] = time.perf_counter() - start
    found["group of asynchronous saves, s"] = seconds(lambda: dist.new_group(backend="gloo"), 3)
    text = configs.to_toml(Config())
    found["same_everywhere, ms"] = 1000 * seconds(partial(ranks.same_everywhere, "text", text, ""))
    found["together, ms"] = 1000 * seconds(partial(ranks.together, None))
    found["node_leaders, ms"] = 1000 * seconds(ranks.node_leaders)
    found["on_each_node, 10,000 files, ms"] = 1000 * seconds(partial(ranks.on_each_node, lambda: GIGANTIC), 3)
    shutdown = Shutdown(mesh, 600, owns_process=False)
    found["vote, each step, ms"] = 1000 * seconds(partial(shutdown.vote, watch=False))
    scalar = torch.ones((), dtype=torch.float64)
    sums = partial(parallel.sum_over_ranks, scalar, scalar, scalar)
    found["loss, tokens, norm, each step, ms"] = 1000 * seconds(sums)
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    sockets = sum(str(link).startswith("socket") for link in links)
    pipe.send(found | {"sockets of a rank": sockets})
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or SIZES
    fork, rows = multiprocessing.get_context("fork"), {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            ours, theirs = fork.Pipe(duplex=False)
            processes = [fork.Process(target=serve, args=(rank, size, folder, theirs)) for rank in range(size)]
            for process in processes:
                process.start()
            found = [ours.recv() for _ in processes]
            for process in processes:
                process.join()
            rows[size] = {name: max(each[name] for each in found) for name in found[0]}
    print(f"| ranks on {os.cpu_count()} cores | {' | '.join(map(str, sizes))} |")
    print("| --- |" + " --- |" * len(sizes))
    for name in rows[sizes[0]]:
        print(f"| {name} | {' | '.join(f'{rows[size][name]:.3g}' for size in sizes)} |")


if __name__ == "__main__":
    main()
