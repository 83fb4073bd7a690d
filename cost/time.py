"""How long a step takes: a roofline of what a rank runs, and of what it sends which parts stand in its way."""

import math
from collections import defaultdict
from itertools import pairwise

import parallel
from cost.hardware import Hardware
from cost.memory import Sharding
from cost.operations import kernels
from cost.record import Trace


def step(trace: Trace, sharding: Sharding, gpu: Hardware) -> dict[str, float]:
    """Seconds of a step by parts; their sum is the step.

    FSDP gathers the next block's weights, and sums the last one's gradients, while a block computes; what takes longer
    than that is exposed, as are the first gather and the last sum. TP's collectives always are.
    """
    layers, micro_steps, dp_shard = trace.layers, sharding.micro_steps, sharding.ranks["dp_shard"]
    computing: dict[tuple[str, bool], float] = defaultdict(float)  # by block, forward (False) and backward (True)
    talking, launching = computing.copy(), computing.copy()
    for kernel in kernels(trace.tape):
        key = kernel.owner, kernel.phase != "forward"
        launching[key] += gpu.launch
        if kernel.kind == "FSDP":
            continue  # the tape has those of one way to shard: see below
        if kernel.kind == "collective":
            kind, axis, nbytes = kernel.collective
            talking[key] += gpu.collective(kind, nbytes, sharding.ranks[axis], sharding.in_node(axis))
        else:
            computing[key] += gpu.seconds(kernel, sharding.plan.param_dtype == "float32")
    ratio, again = sharding.reduce_ratio, sharding.plan.reshard_after_forward
    for name, whole in trace.gathered.items():
        own, width = trace.numbers(dp_shard, name), whole / trace.numbers(1, name)
        # FSDP casts its slice, puts it into a buffer, and takes the weights out of the gathered one; gradients go into
        # another, and of their sum a slice comes back, in float32, and is added to that of earlier micro-steps
        gathering = 2 * whole + own * (4 + 3 * width)
        summing = (1 + ratio) * whole + own * (width * ratio + 4 + 12 * (micro_steps > 1))
        computing[name, False] += gathering / (gpu.bandwidth * gpu.streaming)
        computing[name, True] += (gathering * (again and name != "") + summing) / (gpu.bandwidth * gpu.streaming)
    together = max if gpu.asynchronous else lambda *parts: sum(parts)
    busy = {key: together(computing[key] + talking[key], launching[key]) for key in launching}

    def fsdp(kind: str, axis: str, ratio: float) -> dict[str, float]:
        """For each block, and the rest."""
        ranks, near = sharding.ranks[axis], sharding.in_node(axis)
        sizes = {name: round(ratio * trace.sent(dp_shard, name)) for name in trace.gathered}
        return {name: gpu.collective(kind, size, ranks, near) for name, size in sizes.items()}

    gather, scatter = fsdp("all-gather", "dp_shard", 1), fsdp("reduce-scatter", "dp_shard", ratio)
    reduce = fsdp("all-reduce", "dp_replicate", ratio / dp_shard)

    def waiting(sums: dict[str, float]) -> float:
        """For FSDP in a micro-step."""
        twice = gather if again else dict.fromkeys(gather, 0.0)
        beside = [(busy[layer, False], gather[then]) for layer, then in pairwise(layers)]
        beside += [(busy[layers[0], True], sums[layers[1]])] if len(layers) > 1 else []
        for index in range(1, len(layers)):
            after = sums[layers[index + 1]] if index + 1 < len(layers) else 0.0
            beside.append((busy[layers[index], True], twice[layers[index - 1]] + after))
        beside.append((busy["", True], twice[layers[-1]]))
        hidden = sum(min(own, sent) for own, sent in beside) if gpu.asynchronous else 0.0
        ends = gather[""] + gather[layers[0]] + sums[layers[0]] + sums[""]
        return ends + sum(sent for _, sent in beside) - hidden

    times = 1 if parallel.sums_once(sharding.plan) else micro_steps
    exposed = times * waiting({name: scatter[name] + reduce[name] for name in scatter})
    exposed += (micro_steps - times) * waiting(scatter)
    keys = [(name, backward) for name in ("", *layers) for backward in (False, True)]
    work, talk, launch = (micro_steps * sum(part[key] for key in keys) for part in (computing, talking, busy))
    # the norm reads gradients, clipping reads and writes them; AdamW reads them, and changes weights and two moments
    update = 4 * trace.numbers(dp_shard) * (1 + 2 + 1 + 6) / (gpu.bandwidth * gpu.streaming)
    ranks = math.prod(sharding.ranks.values())
    rest = gpu.collective("all-reduce", 24, ranks, sharding.local_world) + launch - work - talk
    return {"compute": work, "exposed TP": talk, "exposed FSDP": exposed, "optimizer": update, "rest": rest}
