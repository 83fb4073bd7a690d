"""What the plan does to each module, and what a step sends and holds: the report behind explain.py.

Nothing here is a second copy of the plan. The real model, with one block of each kind, goes through
`parallel.parallelize` on a mesh of which this process is rank 0 and the others are pretended; then forward and backward
run on tensors that have a shape but no memory, and every operation and collective that is called is written down. What
a block does is multiplied by the blocks of its kind.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import model as model_module
import parallel
from configs import Config
from cost.operations import Operation, Tape, live_bytes
from model import Llama, Mask

LAYERS = "model.layers."
KINDS = {"gather": "all-gather", "reduce_scatter": "reduce-scatter", "reduce": "all-reduce"}  # by part of the op's name


@dataclass
class Collective:
    """All calls of one kind and size that one module causes in one phase of a step."""

    module: str  # "" is the whole model; " (FSDP)" follows where FSDP gathers parameters or sums gradients
    phase: str  # forward, backward, recompute (in backward, by activation checkpointing), update (once a step)
    kind: str
    axis: str
    nbytes: int  # of one call
    count: int  # in a step, over all blocks of the kind and all micro-steps


@dataclass
class Trace:
    """What `cost.time` and `cost.memory` go by: a micro-step of one block of each kind."""

    tape: Tape
    layers: list[str]  # of each layer the block that stands for it
    gathered: dict[str, int]  # bytes that FSDP gathers for each block, and under "" for the rest
    shapes: dict[str, list[list[int]]]  # of their parameters, as TP leaves them
    buffers: int  # bytes
    temporary: float  # what the optimizer needs while it is at work, as a share of the parameters

    def numbers(self, dp_shard: int, name: str | None = None) -> int:
        """How many numbers of a block's parameters, or of all, rank 0 keeps: FSDP cuts dim 0, and rounds up."""
        shapes = [shape for each in (["", *self.layers] if name is None else [name]) for shape in self.shapes[each]]
        return sum(math.ceil(shape[0] / dp_shard) * math.prod(shape[1:]) for shape in shapes)

    def sent(self, dp_shard: int, name: str) -> float:
        """Bytes of an all-gather: slices are as large as rank 0's, so there may be more than FSDP gathers."""
        return self.gathered[name] * dp_shard * self.numbers(dp_shard, name) / self.numbers(1, name)


@dataclass
class Report:
    """Everything that is printed. Bytes are rank 0's; where slices are uneven, no rank has more."""

    config: Config
    ranks: list[list[list[int]]]  # by dp_replicate, dp_shard, tp
    micro_steps: int
    blocks: dict[str, tuple[list[int], str]]  # by the first block of each kind: the layers of that kind, and their mask
    weights: dict[str, list]  # by module: style, full shape, placements, local shape
    activations: dict[str, list[list]]  # by module: [local shape, layout] at the four moments of `Recorder.visit`
    collectives: list[Collective]
    memory: dict[str, int]  # bytes of the slices that stay on this rank, and of what FSDP gathers for a while
    trace: Trace
    flops_per_token: int  # of the model, forward and backward, without what is computed again


def mask_text(mask: Mask, document_mask: bool) -> str:
    return ("causal" if mask == Mask() else str(mask)) + (", in its document" if document_mask else "")


def layout_text(placement, ndim: int) -> str:
    """`is_shard` would not do: it denies FSDP's slices of a slice."""
    return "R" if placement.is_replicate() else "P" if placement.is_partial() else f"S({placement.dim % ndim})"


def nbytes(tensors) -> int:
    """Of the slices on this rank."""
    with torch.no_grad():
        return sum(tensor.numel() * tensor.element_size() for tensor in map(parallel.to_local, tensors))


class Recorder(Tape):
    """Writes down, while it is active, what goes in and out of each module, and each collective with its cause."""

    compiles_loss = True  # as `parallelize` does, without TP
    norms_are_kernels = True  # on a GPU; on a CPU RMSNorm is several operations

    def __init__(self, model: Llama, mesh: DeviceMesh, styles: dict[str, ParallelStyle], compiled: bool, on_gpu: bool):
        super().__init__()
        self.model, self.mesh, self.styles, self.phase = model, mesh, styles, "forward"
        self.compiled, self.compiled_loss = compiled, compiled and self.compiles_loss and mesh["tp"].size() == 1
        self.labels: list[str] = []  # of what runs, inmost last: FSDP's are "FSDP::what_it_does (module)"
        self.axes = {mesh.get_group(axis).group_name: axis for axis in mesh.mesh_dim_names}
        self.calls, self.activations, self.gathered = Counter(), {}, {}
        self.layouts = WeakIdKeyDictionary()  # tensors that are not kept alive: the tape sees when they end
        self.stack, self.spans, self.temporary, self.on_gpu = [], [], 0.0, on_gpu
        kernels = nn.RMSNorm if on_gpu and self.norms_are_kernels else ()
        self.one_kernel = {name for name, module in model.named_modules() if isinstance(module, kernels)}
        for name, module in model.named_modules():
            # The outer two come before and after all other hooks: what TP and FSDP communicate in theirs lies between.
            # The last one also runs when recomputation stops half-way, with an exception.
            module.register_forward_pre_hook(partial(self.visit, "arrives", name), prepend=True)
            module.register_forward_pre_hook(partial(self.visit, "starts", name))
            module.register_forward_hook(partial(self.visit, "ends", name), prepend=True)
            module.register_forward_hook(partial(self.visit, "leaves", name), always_call=True)

    @torch.no_grad()
    def visit(self, moment: str, name: str, module: nn.Module, inputs: tuple, output: Tensor | None = None) -> None:
        """A hook, before and after the input and before and after the output is redistributed."""
        if moment == "arrives":
            self.stack.append((name, torch._C._autograd._get_sequence_nr()))
        if moment == "leaves":
            self.spans.append((*self.stack.pop(), torch._C._autograd._get_sequence_nr()))
        if self.phase != "forward":
            return
        if moment == "starts":  # FSDP has gathered the module's own parameters, but not yet those of blocks inside it
            own = [parameter for key, parameter in module.named_parameters() if name or not key.startswith(LAYERS)]
            self.gathered[name] = nbytes(own)
        inputs = inputs or (torch.empty(()),)  # of a module that only hands out its parameter
        tensor, style = inputs[0] if output is None else output, self.styles.get(name)
        # A plain tensor is what the module's style takes it for, or else what the module was that it comes from.
        declared = {"arrives": "input_layouts", "leaves": "output_layouts"}.get(moment, "")
        placements = getattr(style, declared, getattr(style, "sequence_sharding", None))
        if isinstance(tensor, DTensor):
            placements = tensor.placements
        if placements:
            self.layouts[tensor] = layout_text(placements[0], tensor.ndim)
        layout = self.layouts.get(tensor, "-")
        moments = self.activations.setdefault(name, [])
        if len(moments) < 4:  # of the first call: the loss calls the head chunk by chunk
            moments.append([tuple(parallel.to_local(tensor).shape), layout])

    @torch.no_grad()
    def cause(self, func: torch._ops.OpOverload, sent: Tensor) -> tuple[str, str]:
        """The module that a collective belongs to, and the phase."""
        if func.namespace == "c10d" and self.phase != "update":
            return f"{self.fsdp_module()} (FSDP)", self.phase
        if not self.stack:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None and parallel.to_local(parameter.grad) is sent:
                    return name.removesuffix(".weight"), self.phase
        return self.place()

    def place(self) -> tuple[str, str]:
        """The module that runs, and the phase."""
        if self.stack:
            return self.stack[-1][0], "recompute" if self.phase == "backward" else self.phase
        # Autograd numbers its nodes as forward makes them: the one that runs now was made inside of the first of these,
        # as inner modules are left before outer ones.
        node = torch._C._current_autograd_node()
        made = node._sequence_nr() if node else -1
        return next((name for name, first, end in self.spans if first <= made < end), ""), self.phase

    def fsdp_module(self) -> str | None:
        """Which module FSDP works for now; None if it does not."""
        labels = [label for label in self.labels if label.startswith("FSDP::")]
        return labels[-1].partition("(")[2].removesuffix(")") if labels else None

    def see(self, func, args, kwargs, result) -> None:
        sent = None
        if func.namespace == "profiler":
            self.labels = [*self.labels, args[0]] if isinstance(args[0], str) else self.labels[:-1]
        if func.namespace in ("c10d", "_c10d_functional") and func.__name__ != "wait_tensor.default":
            boxed = [each for each in args if isinstance(each, torch.ScriptObject)]
            group = dist.ProcessGroup.unbox(boxed[0]).group_name if boxed else args[-1]
            kind = next((text for part, text in KINDS.items() if part in func.__name__), func.__name__)
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            whole = max(nbytes([tensor]) for tensor in tensors)  # gathered, or not yet scattered
            axis = "all ranks" if self.phase == "update" else self.axes[group]  # their group may be that of an axis too
            self.calls[*self.cause(func, tensors[0]), kind, axis, whole] += 1
            sent = kind, axis, whole
        if self.phase == "update" or func.namespace == "c10d":  # FSDP's, which Trace.gathered stands for
            return
        (name, phase), fsdp = self.place(), self.fsdp_module()
        compiled = name in self.one_kernel or (self.compiled and block_of(name) != "")
        compiled |= self.compiled_loss and name == "loss"
        operation = Operation(block_of(name), phase, "other", compiled)
        if fsdp is not None:
            operation = Operation(block_of(fsdp), self.phase, "FSDP")
        elif sent:
            operation.kind, operation.collective = "collective", sent
        self.add(operation, func, args, kwargs, result)


def block_of(name: str) -> str:
    """The block that a module, a parameter or a cause is in; outside of blocks ""."""
    return ".".join(name.removesuffix(" (FSDP)").split(".")[:3]) if name.startswith(LAYERS) else ""


def keep_one_of_each_kind(model: Llama) -> dict[str, list[int]]:
    """Drop every block that equals an earlier one; by the name of each that is left, the layers that it stands for."""
    kinds: dict[str, list[int]] = {}
    for layer, block in enumerate(model.model.layers):
        settings = [{key: value for key, value in vars(each).items() if key[0] != "_"} for each in block.modules()]
        slices = [(name, w.shape, getattr(w, "placements", None)) for name, w in block.named_parameters()]
        kinds.setdefault(f"{block} {settings} {slices}", []).append(layer)
    for layers in kinds.values():
        for layer in layers[1:]:
            delattr(model.model.layers, str(layer))  # the others keep their names
    return {f"{LAYERS}{layers[0]}": layers for layers in kinds.values()}


def styles_of(plan: dict[str, ParallelStyle], model: Llama) -> dict[str, ParallelStyle]:
    """By module. Each part of a plan's key may have wildcards; none stands for a dot, of which there are as many."""
    names = [name for name, _ in model.named_modules()]
    pairs = [(key, name) for key in plan for name in names if key.count(".") == name.count(".")]
    return {name: plan[key] for key, name in pairs if fnmatch(name, key)}


def record(config: Config, recorder: Recorder, kinds: dict[str, list[int]], make_optimizer: Callable) -> dict[str, int]:
    """A micro-step and the update of one block of each kind, without memory; returns the bytes that the model needs."""
    model, memory = recorder.model, Counter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.init_weights(config.train.seed, parallel.place_shard)
        rows = torch.zeros(config.train.micro_batch_size, config.data.seq_len, dtype=torch.int64)
        # FlexAttention, on a GPU, makes no (T, T) masks
        positions = [rows] if config.data.document_mask and not recorder.on_gpu else []
        with recorder, parallel.loss_context(recorder.mesh):
            loss = model(rows, rows, *positions)
            recorder.phase = "backward"
            loss.backward()
            recorder.phase, loss = "update", parallel.to_local(loss.detach())
            parallel.sum_over_ranks(loss, loss, parallel.gradient_square(model))
        optimizer = make_optimizer(model, config.optim)
        optimizer.step()
        with Tape() as update:
            optimizer.step()
        recorder.temporary = max(live_bytes(update)[0]) / nbytes(model.parameters())
        for name, parameter in model.named_parameters():
            times = len(kinds.get(block_of(name), [0]))
            memory["parameters"] += times * nbytes([parameter])
            memory["gradients"] += times * nbytes([parameter.grad])
            memory["optimizer state"] += times * nbytes(optimizer.state[parameter].values())
    root, blocks = recorder.gathered[""], {name: recorder.gathered[name] for name in kinds}
    largest, every = max(blocks.values()), sum(size * len(kinds[name]) for name, size in blocks.items())
    at_once = largest if config.parallel.reshard_after_forward else every
    gathered = {"gathered block": largest, "gathered rest": root, "gathered at once": root + at_once}
    return memory | gathered


def weight_row(recorder: Recorder, name: str) -> list | None:
    """Style, full shape, placements and local shape of a module's weight; None if it has neither weight nor style."""
    style = recorder.styles.get(name)
    weight = getattr(recorder.model.get_submodule(name), "weight", None)
    title = type(style).__name__ if style else "-"
    if weight is None:
        return [title, "-", "-", "-"] if style else None
    placements = ", ".join(layout_text(placement, weight.ndim) for placement in weight.placements)
    return [title, tuple(weight.shape), placements, tuple(weight.to_local().shape)]


def merge(kinds: dict[str, list[int]], weights: dict[str, list], recorder: Recorder) -> dict[str, list[int]]:
    """One of kinds of which the same is reported."""
    shown: dict[str, tuple[str, list[int]]] = {}
    for kind, layers in kinds.items():
        rows = [(n.removeprefix(kind), weights[n], recorder.activations[n]) for n in weights if block_of(n) == kind]
        calls = [(n.removeprefix(kind), *rest, k) for (n, *rest), k in recorder.calls.items() if block_of(n) == kind]
        mask = recorder.model.get_submodule(kind).mask
        shown.setdefault(f"{mask} {rows} {sorted(calls)}", (kind, []))[1].extend(layers)
    return {kind: sorted(layers) for kind, layers in shown.values()}


def explain(config: Config, world: int, make_optimizer: Callable, memory_gib: float = 0, quick: bool = False) -> Report:
    """The report of rank 0 of `world`, for a configuration from `load`. Assumes that there is no process group.

    `make_optimizer` is train.py's. `memory_gib` is a GPU's: it decides how large the chunks of the loss are. `quick`
    takes it that the plan treats equal blocks alike, and parallelizes one of each.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    logits_at_once = model_module.LOGITS_AT_ONCE
    model_module.LOGITS_AT_ONCE = max(logits_at_once, round(memory_gib * 2**30) // 10 // 16)
    try:
        mesh = parallel.build_mesh(config.parallel, torch.device("cpu"))
        with torch.device("meta"):
            model = Llama(config.model)
        kinds = keep_one_of_each_kind(model) if quick else {}
        parallel.parallelize(model, mesh, replace(config.parallel, compile=False))
        kinds = kinds or keep_one_of_each_kind(model)
        sizes = {axis: mesh[axis].size() for axis in mesh.mesh_dim_names} | {"all ranks": world}
        block = parallel.block_plan(config.model, sizes["tp"])
        plan = parallel.top_level_plan() | {f"{kind}.{key}": block[key] for kind in kinds for key in block}
        styles = styles_of(plan, model) if sizes["tp"] > 1 else {}
        recorder = Recorder(model, mesh, styles, config.parallel.compile, memory_gib > 0)
        memory = record(config, recorder, kinds, make_optimizer)
        trace = trace_of(recorder, kinds)
    finally:
        model_module.LOGITS_AT_ONCE = logits_at_once
        dist.destroy_process_group()
    weights = {name: row for name in recorder.activations if (row := weight_row(recorder, name))}
    kinds = merge(kinds, weights, recorder)
    times = {"": 1} | {kind: len(layers) for kind, layers in kinds.items()}
    weights = {name: row for name, row in weights.items() if block_of(name) in times}
    micro_steps = config.train.global_batch_size * sizes["tp"] // (config.train.micro_batch_size * world)
    collectives = []
    for (name, phase, kind, axis, whole), count in recorder.calls.items():
        if sizes[axis] > 1 and block_of(name) in times:
            once = phase == "update" or (axis == "dp_replicate" and parallel.sums_once(config.parallel))
            count *= times[block_of(name)] * (1 if once else micro_steps)
            collectives.append(Collective(name, phase, kind, axis, whole, count))
    order = list(recorder.activations)
    collectives.sort(key=lambda call: order.index(call.module.removesuffix(" (FSDP)")))
    masks = {kind: mask_text(model.get_submodule(kind).mask, config.data.document_mask) for kind in kinds}
    blocks = {kind: (layers, masks[kind]) for kind, layers in kinds.items()}
    flops = model_module.flops_per_token(config.model, config.data.seq_len)
    ranks, activations = mesh.mesh.tolist(), recorder.activations
    return Report(config, ranks, micro_steps, blocks, weights, activations, collectives, memory, trace, flops)


def trace_of(recorder: Recorder, kinds: dict[str, list[int]]) -> Trace:
    layers = {layer: kind for kind, those in kinds.items() for layer in those}
    shapes: dict[str, list[list[int]]] = {name: [] for name in ("", *kinds)}
    for name, parameter in recorder.model.named_parameters():
        shape, tp = list(parameter.shape), recorder.mesh["tp"].size()
        if tp > 1 and not parameter.placements[-1].is_replicate():
            shape[parameter.placements[-1].dim] //= tp  # which divides it
        shapes[block_of(name)].append(shape)
    buffers = sum(buffer.nbytes for buffer in recorder.model.buffers())
    gathered = {name: recorder.gathered[name] for name in shapes}
    return Trace(recorder, [layers[layer] for layer in sorted(layers)], gathered, shapes, buffers, recorder.temporary)
