"""What rank 0 plans for a checkpoint, and every rank for a load: `python benchmarks/save_planning.py [RANKS LAYERS]`.

The real parallelized Llama of configs/llama3_70b.toml, tp 8, on the meta device, with some of its 80 layers. One
process is rank 0 of a fake process group: what the others would send it is computed and pickled beforehand, by setting
the mesh's coordinate to theirs, and nothing is written but `.metadata`. All the rest is what runs in training. The
seconds are CPU time of rank 0, with pickling and unpickling, without the network and its share of the tensors.

"old" is `dcp.save` as it comes, with a step count for each parameter, at every save; "first" and "next" are
`storage.save`. "MB gathered" are plans and what was written where; "next" needs neither. The last line is the largest
row scaled to 512 ranks x 80 layers. With RANKS and LAYERS that is measured instead: 512 80 takes 10 minutes and 5 GiB.
"""

import contextlib
import functools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import planner_helpers
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parent.parent))
import configs
import parallel
from model import Llama
from runtime import storage

CONFIG = Path(__file__).parent.parent / "configs/llama3_70b.toml"
ROWS = [(8, 2), (8, 8), (64, 2), (64, 8), (512, 2), (512, 8)]
FULL = 512, 80
HEAD = (
    "| ranks | layers | items a rank, old | new | MB gathered, old | first | MB of .metadata, old | new "
    "| s a save, old | first | next | s to read .metadata | s to plan a load | GiB here |"
)


class OtherRanks:
    """Stands in for the collectives of rank 0. `aside` is the time that it spent on what others do."""

    def __init__(self, plans: list[torch.Tensor]):
        self.sent, self.aside, self.nbytes = plans, 0.0, 0

    def gather_object(self, obj: Any, object_gather_list: list, **_: Any) -> None:
        """First the plans, then what was written."""
        self.nbytes += sum(map(len, self.sent))
        object_gather_list[:] = [obj, *(unpickled(each) for each in self.sent[1:])]

    def scatter_object_list(
        self, scatter_object_output_list: list, scatter_object_input_list: list[SavePlan], **_: Any
    ) -> None:
        for plan in scatter_object_input_list:
            pickled(plan)
        scatter_object_output_list[0] = scatter_object_input_list[0]
        with self.set_aside():
            self.sent = [pickled(written(plan)) for plan in scatter_object_input_list]

    def broadcast_object_list(self, object_list: list, **_: Any) -> None:
        pickled(object_list[0])

    def all_gather_object(self, object_list: list, obj: Any, **_: Any) -> None:
        object_list[:] = [unpickled(pickled(obj)) for _ in object_list]

    def write_data(self, _: dcp.FileSystemWriter, plan: SavePlan, planner: object) -> Future:
        with self.set_aside():
            future = Future()
            future.set_result(written(plan))
        return future

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.aside += time.process_time() - start

    def seconds(self, save: Any, *arguments: Any, **options: Any) -> tuple[float, Any]:
        """Of rank 0, and what `save` returns."""
        names = "gather_object", "scatter_object_list", "broadcast_object_list", "all_gather_object"
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(mock.patch.object(dist, name, getattr(self, name)))
            stack.enter_context(mock.patch.object(dcp.FileSystemWriter, "write_data", lambda *a: self.write_data(*a)))
            start = time.process_time()
            result = save(*arguments, **options)
            return time.process_time() - start - self.aside, result


def pickled(value: Any) -> torch.Tensor:
    """As the collectives for objects do it."""
    return distributed_c10d._object_to_tensor(value, torch.device("cpu"), None)[0]


def unpickled(tensor: torch.Tensor) -> Any:
    return distributed_c10d._tensor_to_object(tensor, len(tensor), None)


def written(plan: SavePlan) -> list[WriteResult]:
    """As `write_data` reports it."""
    name = f"{plan.storage_data.prefix}0.distcp"
    return [WriteResult(item.index, 2**20, _StorageInfo(name, 2**20 * i, 2**20)) for i, item in enumerate(plan.items)]


def state(layers: int) -> dict[str, Any]:
    """What a checkpoint holds, on the meta device, with a step count for each parameter."""
    arguments = [str(CONFIG), f"--model.num_hidden_layers={layers}"]
    config = configs.load(arguments, world=dist.get_world_size(), local_world=8)
    with torch.device("meta"):
        model = Llama(config.model)
    parallel.parallelize(model, parallel.build_mesh(config.parallel, torch.device("cpu")), config.parallel)
    weights = dict(model.named_parameters())
    moments = {f"state.{name}.{key}": w for name, w in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    steps = {f"state.{name}.step": torch.tensor(1.0) for name in weights}
    return {"model": weights, "optimizer": moments | steps}


def become(rank: int, tensors: dict[str, Any]) -> None:
    """From here on the tensors are slices of that rank."""
    for mesh in {id(weight.device_mesh): weight.device_mesh for weight in tensors["model"].values()}.values():
        mesh._coordinate_on_dim = tuple((mesh.mesh == rank).nonzero()[0].tolist())


def peers_with(tensors: dict[str, Any]) -> OtherRanks:
    """All of them have these tensors."""
    plans, name = [], "compute_local_shape_and_global_offset"
    for rank in range(dist.get_world_size()):
        become(rank, tensors)
        with mock.patch.object(planner_helpers, name, functools.cache(getattr(planner_helpers, name))):
            plans.append(pickled(storage.local_plan(dcp.DefaultSavePlanner(), tensors)))
    become(0, tensors)
    return OtherRanks(plans)


def measure(ranks: int, layers: int) -> list[float]:
    """A row of the table after its first two columns, and the peak of this process in GiB."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    old = state(layers)
    new = {**old, "optimizer": storage.with_one_step(old["optimizer"])}
    row = [sum(map(len, tensors.values())) for tensors in (old, new)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        metadata = path / ".metadata"
        gathered, sizes, seconds, layout = [], [], [], None
        for save, tensors, options in (
            (dcp.save, old, {"storage_writer": dcp.FileSystemWriter(path)}),
            (storage.save, new, {"path": path, "last": None, "group": None}),
        ):
            peers = peers_with(tensors)
            taken, layout = peers.seconds(save, tensors, **options)
            gathered.append(peers.nbytes / 1e6)
            sizes.append(metadata.stat().st_size / 1e6)
            seconds.append(taken)
            del peers
        peers = OtherRanks([])
        taken, same = peers.seconds(storage.save, new, path, layout, None)
        assert same is layout, "nothing was planned anew"
        seconds.append(taken)
        del layout, same
        start = time.process_time()
        read = storage.Reader(path).read_metadata()
        seconds.append(time.process_time() - start)
        start = time.process_time()
        with storage.collector_paused():
            planner = dcp.DefaultLoadPlanner()
            planner.set_up_planner(old, read)
            planner.create_local_plan()
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [*row, *gathered, *sizes, *seconds, peak]


def line(ranks: int, layers: int, numbers: list[float]) -> str:
    cells = [str(ranks), str(layers), *(f"{n:,.0f}" for n in numbers[:2]), *(f"{n:,.2f}" for n in numbers[2:])]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    if len(sys.argv) == 4:  # in a process of its own, so that the peak is one's own
        return print(*measure(*map(int, sys.argv[1:3])))
    rows = [tuple(map(int, sys.argv[1:]))] if sys.argv[1:] else ROWS
    print(HEAD, "|" + " --- |" * HEAD.count(" | "), sep="\n")
    for ranks, layers in rows:
        command = [sys.executable, __file__, str(ranks), str(layers), "alone"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        numbers = list(map(float, done.stdout.split()))
        print(line(ranks, layers, numbers), flush=True)
    if not sys.argv[1:]:
        scale = FULL[0] * FULL[1] / ranks / layers
        print(line(*FULL, [n * FULL[1] / layers for n in numbers[:2]] + [n * scale for n in numbers[2:]]))
    return None


if __name__ == "__main__":
    main()
