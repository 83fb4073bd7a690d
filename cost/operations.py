"""What one rank runs in a micro-step, operation by operation, and how long each piece of memory lives.

A `Tape` is filled while the real model runs on tensors without memory. `kernels` and `live_bytes` then read it, as
eager code would run it or as the compiler would: of a compiled block, elementwise operations between two kernels that
cannot be fused (matrix products, attention, collectives) become one kernel, which reads what it needs once, and whose
intermediate results never reach memory.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
FLOPS: dict[Any, Callable] = {  # torch has no formulas for what it calls where there is no GPU
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, *_, **__: sdpa_flop_count(*[q.shape] * 3),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, *_, **__: sdpa_backward_flop_count(
        *[g.shape] * 4
    ),
}
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
LOOKUPS = {aten.embedding, aten.gather, aten.index_put_}  # they touch a few rows of what they are given


@dataclass
class Operation:
    """One call, or several that are fused. Memory goes by its number on the tape."""

    owner: str = ""  # the block; outside of blocks ""
    phase: str = "update"  # forward, backward, recompute (in backward, by activation checkpointing), update
    kind: str = "other"  # matmul, attention, collective, FSDP (its copies)
    compiled: bool = False
    collective: tuple[str, str, int] = ("", "", 0)  # kind, axis, bytes
    reads: dict[int, int] = field(default_factory=dict)  # bytes, by number
    writes: dict[int, int] = field(default_factory=dict)
    flops: float = 0.0
    shape: tuple[int, ...] = ()  # (m, n, k) of a matrix product

    @property
    def fused(self) -> bool:
        """Whether the compiler may put it into one kernel with its neighbours."""
        return self.compiled and self.kind == "other"

    @property
    def nbytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


class Tape(TorchDispatchMode):
    """Writes down, while it is active, every operation in its order, and when the memory that it made is let go."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.sizes: list[int] = []  # of each piece of memory, in bytes
        self.births: dict[int, int] = {}  # the operation that made it; none for what was there before, and for FSDP's
        self.deaths: dict[int, int] = {}  # the first operation that does not see it any more
        self.alive: dict[int, int] = {}  # numbers by address
        self.unwritten: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it becomes operations on local tensors, and collectives, which come by here again
        result = func(*args, **(kwargs or {}))
        self.see(func, args, kwargs or {}, result)
        return result

    def see(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        self.add(Operation(), func, args, kwargs, result)

    def sizes_of(self, values: Any) -> dict[int, int]:
        """Of the tensors in it, by number."""
        found = {}
        for tensor in (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            address, nbytes = storage._cdata, storage.nbytes()
            if address not in self.alive:
                self.alive[address] = len(self.sizes)
                self.sizes.append(nbytes)
                weakref.finalize(storage, self.bury, address)
            found[self.alive[address]] = min(tensor.numel() * tensor.element_size(), nbytes)
        return found

    def bury(self, address: int) -> None:
        self.deaths[self.alive.pop(address)] = len(self.operations)

    def add(self, operation: Operation, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """`operation` says where it belongs; what it reads, writes and computes is found here."""
        packet, arguments = func.overloadpacket, func._schema.arguments
        if func.namespace not in ("aten", "_c10d_functional", "c10d", "fsdp") or func.__name__ == "wait_tensor.default":
            return
        reads, results = self.sizes_of((args, kwargs)), self.sizes_of(result)
        made = {number: nbytes for number, nbytes in results.items() if number not in reads}
        if packet in EMPTY or (reads and self.unwritten.issuperset(reads)):
            # DTensor learns an output's shape by running the operation on memory that nobody has written: no work
            self.unwritten.update(made)
            return
        first_written = self.unwritten.intersection(reads)
        self.unwritten -= first_written
        changing = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        named = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        changed = self.sizes_of([named.get(name) for name in changing])
        if not (made or changed or first_written):
            return  # a view
        if packet in LOOKUPS:
            reads, changed = made, dict.fromkeys(changed, 0)
        operation.reads, operation.writes = reads, made | changed
        if packet in FLOPS:
            operation.flops = FLOPS[packet](*args, **kwargs, out_val=result)
            operation.kind = "attention" if "attention" in func.__name__ else "matmul"
        if operation.kind == "attention":
            operation.flops /= 2  # causal: kernels leave out the half that is hidden
        if operation.kind == "matmul":
            left, right = [leaf.shape for leaf in tree_leaves(args) if isinstance(leaf, Tensor)][-2:]
            operation.shape = left[-2], right[-1], left[-1]
        if operation.kind != "FSDP":
            self.births |= dict.fromkeys((*made, *first_written), len(self.operations))
        self.operations.append(operation)


@functools.cache
def in_memory(tape: Tape) -> tuple[set[int], list[dict[int, int]]]:
    """Which results reach memory, and what each operation reads of them.

    A fused one's result does only if something that is not fused with it needs it: another kind of kernel, another
    block, or a change in place. Whoever else needs it, backward above all, computes it again.
    """
    solid, owners = set(), {}
    for operation in tape.operations:
        solid.update(n for n in operation.reads if not operation.fused or owners.get(n) != operation.owner)
        solid.update(n for n in operation.writes if not operation.fused or n in owners)
        owners |= dict.fromkeys([*operation.reads, *operation.writes], operation.owner)
    useful, dead = set(solid), set()  # what nobody will read the compiler does not compute
    for index, operation in reversed(list(enumerate(tape.operations))):
        if operation.fused and not useful.intersection(operation.writes):
            dead.add(index)
        else:
            useful.update(operation.reads)
    sources, needs = {}, []
    for index, operation in enumerate(tape.operations):
        need: dict[int, int] = {}
        for number, nbytes in operation.reads.items() if index not in dead else ():
            need |= {number: nbytes} if number in solid else sources.get(number, {number: nbytes})
        needs.append(need)
        sources |= {number: need for number in operation.writes if number not in solid}
    return solid, needs


@functools.cache
def kernels(tape: Tape) -> list[Operation]:
    """What the device runs, in its order."""
    solid, needs = in_memory(tape)
    found, reads, writes = [], {}, {}
    for (now, then), need in zip(pairwise([*tape.operations, Operation()]), needs, strict=True):
        reads |= {number: nbytes for number, nbytes in need.items() if number not in writes}
        writes |= {number: nbytes for number, nbytes in now.writes.items() if number in solid}
        if now.fused and then.fused and then.owner == now.owner:
            continue
        if writes:  # else whoever needs it computes it
            found.append(replace(now, reads=reads, writes=writes))
        reads, writes = {}, {}
    return found


@functools.cache
def live_bytes(tape: Tape) -> tuple[list[int], list[int]]:
    """At each operation: bytes that live while it runs, and of these the ones that it found and that outlive it."""
    solid, needs = in_memory(tape)
    uses = {n: i for i, need in enumerate(needs) for n in (*need, *tape.operations[i].writes)}  # the last one
    during, across = ([0] * (len(needs) + 1) for _ in range(2))
    for number, birth in tape.births.items():
        # compiled code keeps what it will need, and no longer
        own = tape.deaths.get(number, len(needs))
        death = uses[number] + 1 if tape.operations[birth].compiled else own
        for changes, start in ((during, birth), (across, birth + 1)):
            if number in solid and start < death:
                changes[start] += tape.sizes[number]
                changes[death] -= tape.sizes[number]
    return list(accumulate(during)), list(accumulate(across))
