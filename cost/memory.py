"""How much memory a rank reaches, and what it is made of: bytes as torch's allocator counts them."""

import math
from dataclasses import dataclass

import torch

from cost.operations import live_bytes
from cost.record import Trace
from parallel import ParallelConfig


@dataclass
class Sharding:
    """What FSDP does with the model, and where its ranks are."""

    plan: ParallelConfig
    ranks: dict[str, int]  # by axis
    local_world: int  # of one node
    micro_steps: int

    @property
    def reduce_ratio(self) -> float:
        """Bytes of a gradient on its way, as a share of those of a gathered parameter."""
        return getattr(torch, self.plan.reduce_dtype).itemsize / getattr(torch, self.plan.param_dtype).itemsize

    def in_node(self, axis: str) -> int:
        """Ranks of one group of an axis that share a node: the last axis is innermost."""
        axes = list(self.ranks)
        return max(1, self.local_world // math.prod(self.ranks[inner] for inner in axes[axes.index(axis) + 1 :]))


def segments(trace: Trace) -> dict[tuple[str, bool], tuple[int, int]]:
    """First and last operation of each block, forward (False) and backward (True).

    What FSDP gathers before is not among them, what it does with the gradients is: it frees them.
    """
    found: dict[tuple[str, bool], tuple[int, int]] = {}
    for index, operation in enumerate(trace.tape.operations):
        key = operation.owner, operation.phase != "forward"
        if operation.owner and (operation.kind != "FSDP" or key in found):
            found[key] = found.get(key, (index, index))[0], index
    return found


def peak(trace: Trace, sharding: Sharding, state: dict[str, int]) -> dict[str, int]:
    """Bytes at the worst moment of a step, by what they are for; `state` is what stays on the rank.

    The tape has one block of each kind. Here each layer takes its turn: what its block leaves behind adds up in forward
    and goes again in backward. On top comes what it has at work, and what FSDP holds meanwhile.
    """
    during, across = live_bytes(trace.tape)
    parts, gathered, ratio, layers = segments(trace), trace.gathered, sharding.reduce_ratio, trace.layers
    forward_ends = max(last for (_, backward), (_, last) in parts.items() if not backward) + 1
    backward_starts = min(first for (_, backward), (first, _) in parts.items() if backward)
    backward_ends = max(last for _, last in parts.values()) + 1
    dp_shard, reshard = sharding.ranks["dp_shard"], sharding.plan.reshard_after_forward
    per_number = state["gradients"] / trace.numbers(dp_shard)
    live, gradients = 0, state["gradients"] if sharding.micro_steps > 1 else 0.0
    moments: list[tuple[float, ...]] = []

    def pass_by(start: int, stop: int, held: float) -> None:
        """The operations from `start` to before `stop`, while FSDP holds so many bytes."""
        nonlocal live
        moments.append((gradients, live, max(during[start:stop], default=across[start]) - across[start], held))
        live += across[stop] - across[start]

    def weights(index: int) -> int:
        """That are gathered while a layer computes."""
        return gathered[""] + sum(gathered[name] for name in layers[index if reshard else 0 : index + 1])

    def buffer(index: int) -> int:
        """In which a layer's weights come: in forward it is kept until the next layer's have come in theirs."""
        return round(trace.sent(dp_shard, layers[index])) if dp_shard > 1 and index >= 0 else 0

    pass_by(0, min(first for first, _ in parts.values()), gathered[""])
    for index, name in enumerate(layers):
        first, last = parts[name, False]
        pass_by(first, last + 1, weights(index) + buffer(index))
    done = gathered[""] if reshard else weights(len(layers) - 1)
    pass_by(forward_ends, backward_starts, done + buffer(len(layers) - 1))
    sent = 0.0  # the gradients on their way, as the reduce-scatter was given them: kept until the next ones are there
    for index in reversed(range(len(layers))):
        first, last = parts[layers[index], True]
        pass_by(first, last + 1, weights(index) + sent + (buffer(index - 1) if reshard else 0))
        sent = gathered[layers[index]] * ratio
        if sharding.micro_steps == 1:
            gradients += per_number * trace.numbers(dp_shard, layers[index])
    pass_by(backward_ends, len(trace.tape.operations), gathered[""] + max(sent, gathered[""] * ratio))
    moments.append((state["gradients"], 0, state["parameters"] * trace.temporary, 0))
    names = ("gradients", "activations", "at work", "FSDP")
    worst = dict(zip(names, map(round, max(moments, key=sum)), strict=True))
    return {key: state[key] for key in ("parameters", "optimizer state")} | {"buffers": trace.buffers} | worst
