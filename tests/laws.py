"""A look inside a real run for laws 1 and 8: who got which rows, and whether copies of a parameter are equal.

`watch()` is used around `train.train` on every rank. It changes nothing that is computed: it hashes the input of each
forward pass, and after training every local slice, and compares the hashes between ranks by their place in the mesh.
"""

import contextlib
import hashlib
from collections import defaultdict
from unittest import mock

import torch.distributed as dist
from torch import Tensor

import parallel


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def by_rank(value: object) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def watch():
    """Raises AssertionError on every rank if, at the end, law 1 or 8 was broken. Collective."""
    rows, seen = [], {}
    parallelize = parallel.parallelize

    def parallelize_and_listen(model, mesh, config):
        parallelize(model, mesh, config)
        seen.update(model=model, mesh=mesh)
        model.register_forward_pre_hook(lambda module, inputs: rows.append(digest(inputs[0])))

    with mock.patch.object(parallel, "parallelize", parallelize_and_listen):
        yield
    check_rows(rows, seen["mesh"])
    check_copies(seen["model"])


def check_rows(rows: list[str], mesh: parallel.DeviceMesh) -> None:
    """Law 8: TP peers saw the same rows in every forward pass, DP ranks never the same."""
    assert rows
    by_dp_rank = defaultdict(list)
    for dp_rank, hashes in by_rank((parallel.dp_rank_and_size(mesh)[0], rows)):
        by_dp_rank[dp_rank].append(hashes)
    for dp_rank, peers in by_dp_rank.items():
        assert all(peer == peers[0] for peer in peers), f"TP peers of dp rank {dp_rank} saw different rows"
    for i, hashes in enumerate(zip(*(peers[0] for peers in by_dp_rank.values()), strict=True)):
        assert len(set(hashes)) == len(hashes), f"two dp ranks saw the same rows in forward pass {i}"


def check_copies(model: parallel.Llama) -> None:
    """Law 1: ranks that hold the same slice of a parameter hold the same bits."""
    for name, parameter in model.named_parameters():
        mesh, placements = parameter.device_mesh, parameter.placements
        slices = defaultdict(set)
        place = tuple(c for c, p in zip(mesh.get_coordinate(), placements, strict=True) if not p.is_replicate())
        for where, value in by_rank((place, digest(parameter.to_local()))):
            slices[where].add(value)
        broken = [where for where, values in slices.items() if len(values) > 1]
        assert not broken, f"copies of {name} differ at {broken} of {placements}"
