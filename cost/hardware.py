"""What a device can do, from hardware.toml, and how long it takes for one kernel or one collective."""

import math
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from cost.operations import Operation
from runtime.ranks import UserError

TABLE = Path(__file__).parent / "hardware.toml"


@dataclass(frozen=True)
class Hardware:
    """A row of hardware.toml, which says what each number is and where it comes from."""

    name: str
    names: list[str]
    flops: float
    float32_flops: float
    bandwidth: float
    memory_gib: float
    link: float
    node_link: float
    matmul: float
    efficiency: float
    attention: list[float]
    units: int
    half_depth: float
    streaming: float
    launch: float
    latency: float
    hop: float
    rounds: dict[str, float] = field(default_factory=lambda: {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2})
    asynchronous: bool = True  # a GPU's; on a CPU kernels, their launch and collectives come one after the other

    def seconds(self, kernel: Operation, float32: bool = False) -> float:
        """Of one kernel, by a roofline (Williams et al., 2009): computing or moving bytes, whichever takes longer."""
        moving = kernel.nbytes / (self.bandwidth * self.streaming)
        peak = self.float32_flops if float32 else self.flops
        if kernel.kind == "attention":
            share = self.attention[kernel.phase == "backward"]
        elif kernel.kind == "matmul":
            m, n, depth = kernel.shape
            rounds = math.ceil(m / 128) * math.ceil(n / 128) / self.units
            share = self.matmul * rounds / math.ceil(rounds) * depth / (depth + self.half_depth)
        else:
            return moving
        return max(kernel.flops / (peak * share * self.efficiency), moving)

    def collective(self, kind: str, nbytes: int, ranks: int, in_node: int) -> float:
        """Seconds of an all-gather, reduce-scatter or all-reduce over `ranks`, of which `in_node` share a node.

        Bytes are those of the whole tensor. Of a ring, (n - 1)/n of it passes by each rank; an all-reduce is a
        reduce-scatter and an all-gather. Between nodes, each of the ranks in a node has a link of its own.
        """
        if ranks == 1:
            return 0.0
        bandwidth = self.link if ranks <= in_node else min(self.link, in_node * self.node_link)
        hops = 2 * math.log2(ranks) if kind == "all-reduce" else ranks - 1  # a tree, where it is small, or a ring
        return self.latency + hops * self.hop + self.rounds[kind] * nbytes * (ranks - 1) / ranks / bandwidth


def known() -> dict[str, Hardware]:
    """By name."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    for_all = rows.pop("all")
    return {name: Hardware(name, **(for_all | row)) for name, row in rows.items()}


def named(name: str, node_link_gbps: float | None = None) -> Hardware:
    """By a row's name, or as torch says it; UserError lists the rows. `node_link_gbps` is a card's, in 10^9 bits/s."""
    rows = known()
    said = [row for row in rows.values() if row.names and all(part.lower() in name.lower() for part in row.names)]
    found = rows.get(name.lower()) or next(iter(said), None)
    if found is None:
        raise UserError(f"--gpu={name}: known are {', '.join(rows)}; add yours as a row of cost/hardware.toml")
    # what collectives reach of a card's speed, as measured
    return found if node_link_gbps is None else replace(found, node_link=node_link_gbps / 8 * 1e9 * 0.94)
