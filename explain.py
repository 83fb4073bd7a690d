"""What the plan does to each module of a configuration, and what a step of it costs one rank.

    python explain.py [CONFIG.toml] [--section.key=value ...] [--world-size=8] [--local-world-size=8]

The arguments are train.py's; without CONFIG it is configs/quickstart.toml. --world-size is the number of ranks (8),
--local-world-size that of one node (all). It needs no GPU, no data and no other process, whatever the size.

Nothing here is a second copy of the plan. The real model, with one block of each kind, goes through
`parallel.parallelize` on a mesh of which this process is rank 0 and the others are pretended; then forward and backward
run on tensors that have a shape but no memory, and every collective that is called is written down. What a block does
is multiplied by the blocks of its kind.

How to read it:

  Llama, Block  the whole model, and one of its blocks. With (FSDP): gathering parameters, summing
                gradients. Without: the loss, and the update's one sum of loss, tokens and norm.
                Where blocks differ, each kind is shown by its first block, under that one's number.
  placements    of a weight on dp_replicate, dp_shard and tp: S(d) = cut along dim d, R = the same
                on all ranks, P = a sum still pending, - = none. All but "whole" is rank 0's shape.
  arrives, computes on, leaves
                a module's input before and after the plan redistributes it, and its output after,
                each with its layout over tp
  recompute     what activation checkpointing runs once more in backward
  bytes         of a collective: the whole tensor as one rank sees it, which is what an all-gather
                returns, what a reduce-scatter is given, what an all-reduce sums
  a step        all calls, of all blocks and micro-steps; a group of one rank sends nothing
  memory        of parameters on rank 0, and no rank has more. What FSDP gathers comes on top: one
                block and the rest at once, all blocks without reshard_after_forward. While a block
                computes, the next one may be on its way.
"""

import argparse
from collections import Counter
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import configs
import parallel
import train
from configs import Config
from model import Llama, Mask, parameter_count
from runtime.ranks import UserError

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


def layout_text(placement, ndim: int) -> str:
    """`is_shard` would not do: it denies FSDP's slices of a slice."""
    return "R" if placement.is_replicate() else "P" if placement.is_partial() else f"S({placement.dim % ndim})"


def nbytes(tensors) -> int:
    """Of the slices on this rank."""
    with torch.no_grad():
        return sum(tensor.numel() * tensor.element_size() for tensor in map(parallel.to_local, tensors))


class Recorder(TorchDispatchMode):
    """Writes down, while it is active, what goes in and out of each module, and each collective with its cause."""

    def __init__(self, model: Llama, mesh: DeviceMesh, styles: dict[str, ParallelStyle]):
        super().__init__()
        self.model, self.styles, self.phase, self.fsdp_label = model, styles, "forward", ""
        self.axes = {mesh.get_group(axis).group_name: axis for axis in mesh.mesh_dim_names}
        self.calls, self.activations, self.layouts, self.gathered = Counter(), {}, {}, {}
        self.stack, self.spans = [], []
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
        tensor, style = inputs[0] if output is None else output, self.styles.get(name)
        # A plain tensor is what the module's style takes it for, or else what the module was that it comes from.
        declared = {"arrives": "input_layouts", "leaves": "output_layouts"}.get(moment, "")
        placements = getattr(style, declared, getattr(style, "sequence_sharding", None))
        if isinstance(tensor, DTensor):
            placements = tensor.placements
        if placements:
            self.layouts[id(tensor)] = tensor, layout_text(placements[0], tensor.ndim)  # kept alive: the id stays its
        layout = self.layouts.get(id(tensor), (tensor, "-"))[1]
        moments = self.activations.setdefault(name, [])
        if len(moments) < 4:  # of the first call: the loss calls the head chunk by chunk
            moments.append([tuple(parallel.to_local(tensor).shape), layout])

    @torch.no_grad()
    def cause(self, func: torch._ops.OpOverload, sent: Tensor) -> tuple[str, str]:
        """The module that a collective belongs to, and the phase."""
        if func.namespace == "c10d" and self.phase != "update":
            return self.fsdp_label.partition("(")[2].removesuffix(")") + " (FSDP)", self.phase
        if self.stack:
            return self.stack[-1][0], "recompute" if self.phase == "backward" else self.phase
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and parallel.to_local(parameter.grad) is sent:
                return name.removesuffix(".weight"), self.phase
        # Autograd numbers its nodes as forward makes them: the one that runs now was made inside of the first of these,
        # as inner modules are left before outer ones.
        node = torch._C._current_autograd_node()
        made = node._sequence_nr() if node else -1
        return next((name for name, first, end in self.spans if first <= made < end), ""), self.phase

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it becomes operations on local tensors, and collectives, which come by here again
        result = func(*args, **(kwargs or {}))
        if func.namespace == "profiler" and isinstance(args[0], str):
            self.fsdp_label = args[0]  # "FSDP::what_it_does (module)"
        if func.namespace in ("c10d", "_c10d_functional") and func.__name__ != "wait_tensor.default":
            boxed = [each for each in args if isinstance(each, torch.ScriptObject)]
            group = dist.ProcessGroup.unbox(boxed[0]).group_name if boxed else args[-1]
            kind = next((text for part, text in KINDS.items() if part in func.__name__), func.__name__)
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            whole = max(nbytes([tensor]) for tensor in tensors)  # gathered, or not yet scattered
            axis = "all ranks" if self.phase == "update" else self.axes[group]  # their group may be that of an axis too
            self.calls[*self.cause(func, tensors[0]), kind, axis, whole] += 1
        return result


def block_of(name: str) -> str:
    """The block that a module, a parameter or a cause is in; outside of blocks ""."""
    return ".".join(name.removesuffix(" (FSDP)").split(".")[:3]) if name.startswith(LAYERS) else ""


def keep_one_of_each_kind(model: Llama) -> dict[str, list[int]]:
    """Drop every block that equals an earlier one; by the name of each that is left, the layers that it stands for."""
    kinds: dict[str, list[int]] = {}
    for layer, block in enumerate(model.model.layers):
        settings = [{key: value for key, value in vars(each).items() if key[0] != "_"} for each in block.modules()]
        slices = [(name, weight.shape, weight.placements) for name, weight in block.named_parameters()]
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


def record(
    config: Config, model: Llama, mesh: DeviceMesh, styles: dict[str, ParallelStyle], kinds: dict[str, list[int]]
) -> tuple[Recorder, dict[str, int]]:
    """A micro-step and the update of one block of each kind, without memory; and the bytes that the model needs."""
    memory: Counter[str] = Counter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.init_weights(config.train.seed, parallel.place_shard)
        rows = torch.zeros(config.train.micro_batch_size, config.data.seq_len, dtype=torch.int64)
        positions = [rows] if config.data.document_mask else []
        with Recorder(model, mesh, styles) as recorder, parallel.loss_context(mesh):
            loss = model(rows, rows, *positions)
            recorder.phase = "backward"
            loss.backward()
            recorder.phase, loss = "update", parallel.to_local(loss.detach())
            parallel.sum_over_ranks(loss, loss, parallel.gradient_square(model))
        optimizer = train.make_optimizer(model, config.optim)
        optimizer.step()
        for name, parameter in model.named_parameters():
            times = len(kinds.get(block_of(name), [0]))
            memory["parameters"] += times * nbytes([parameter])
            memory["gradients"] += times * nbytes([parameter.grad])
            memory["optimizer state"] += times * nbytes(optimizer.state[parameter].values())
    root, blocks = recorder.gathered[""], {name: recorder.gathered[name] for name in kinds}
    largest, every = max(blocks.values()), sum(size * len(kinds[name]) for name, size in blocks.items())
    at_once = largest if config.parallel.reshard_after_forward else every
    gathered = {"gathered block": largest, "gathered rest": root, "gathered at once": root + at_once}
    return recorder, memory | gathered


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


def explain(config: Config, world: int) -> Report:
    """The report of rank 0 of `world`, for a configuration from `load`. Assumes that there is no process group."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = parallel.build_mesh(config.parallel, torch.device("cpu"))
        with torch.device("meta"):
            model = Llama(config.model)
        parallel.parallelize(model, mesh, replace(config.parallel, compile=False))
        kinds = keep_one_of_each_kind(model)
        sizes = {axis: mesh[axis].size() for axis in mesh.mesh_dim_names} | {"all ranks": world}
        block = parallel.block_plan(config.model, sizes["tp"])
        plan = parallel.top_level_plan() | {f"{kind}.{key}": block[key] for kind in kinds for key in block}
        styles = styles_of(plan, model) if sizes["tp"] > 1 else {}
        recorder, memory = record(config, model, mesh, styles, kinds)
    finally:
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
    return Report(config, mesh.mesh.tolist(), micro_steps, blocks, weights, recorder.activations, collectives, memory)


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def size_text(count: int) -> str:
    units = [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")]
    return next((f"{count / unit:,.1f} {name}" for unit, name in units if count >= unit), f"{count} B")


def mask_text(mask: Mask, document_mask: bool) -> str:
    return ("causal" if mask == Mask() else str(mask)) + (", in its document" if document_mask else "")


def name_text(module: str, kinds: int = 1) -> str:
    """As a tree: the whole model and a block by their classes, what is inside a block without its name.

    Of several kinds of block each has its number.
    """
    name, fsdp, _ = module.partition(" (FSDP)")
    if block := block_of(name):
        number = block.removeprefix(LAYERS) if kinds > 1 else ""
        inner = ".".join(filter(None, (number, name.removeprefix(block).removeprefix("."))))
        return ("  Block" + f" {number}".rstrip() if name == block else "    " + inner) + fsdp
    return ("  " + name if name else "Llama") + fsdp


def few(items: list, most: int, gap="...") -> list:
    return items if len(items) <= most else [*items[: most - 2], gap, items[-1]]


def table(heads: list[str], rows: list, numbers: int = 0) -> str:
    """Columns as wide as they need to be; the last `numbers` of them flush right."""
    rows = [[str(cell) for cell in row] for row in (heads, *rows)]
    columns = [(max(map(len, column)), i >= len(heads) - numbers) for i, column in enumerate(zip(*rows, strict=True))]
    form = "  ".join(f"{{:{'>' if right else '<'}{width}}}" for width, right in columns)
    return "".join(form.format(*row).rstrip() + "\n" for row in rows)


def mesh_text(ranks: list[list[list[int]]]) -> str:
    """A sheet for each replica, as in parallel.py."""
    sheets = []
    for i, sheet in enumerate(ranks):
        heads = [f"dp_replicate {i}", *few([f"tp {j}" for j in range(len(sheet[0]))], 8)]
        rows = [[f"    dp_shard {j}", *few(row, 8)] for j, row in enumerate(sheet)]
        sheets.append(table(heads, few(rows, 8, ["    ..."] * len(heads)), len(heads) - 1))
    return "\n".join(few(sheets, 3, "...\n"))


def render(report: Report) -> str:
    """The report as text for a terminal 100 columns wide."""
    config, plan, batch = report.config, report.config.parallel, report.config.train
    layers, kinds, dp = config.model.num_hidden_layers, len(report.blocks), len(report.ranks) * len(report.ranks[0])
    blocks, weights, activations, calls, totals = [], [], [], [], {}
    for name, (those, mask) in report.blocks.items():
        blocks.append([name_text(name, kinds), len(those), ", ".join(map(str, few(those, 8))), mask])
    for name, row in report.weights.items():
        arrives, starts, ends, leaves = report.activations[name]
        change = leaves[1] if ends[1] == leaves[1] else f"{ends[1]} -> {leaves[1]}"
        weights.append([name_text(name, kinds), *row])
        activations.append([name_text(name, kinds), *(f"{a} {b}" for a, b in (arrives, starts, (leaves[0], change)))])
    for call in report.collectives:
        whole, (count, total) = call.count * call.nbytes, totals.get((call.axis, call.kind), (0, 0))
        numbers = [f"{call.count:,}", size_text(call.nbytes), size_text(whole)]
        calls.append([name_text(call.module, kinds), call.phase, call.kind, call.axis, *numbers])
        totals[call.axis, call.kind] = count + call.count, total + whole
    sums = [[*key, f"{count:,}", size_text(total)] for key, (count, total) in sorted(totals.items())]
    of_kinds = f" of {kinds} kinds" if kinds > 1 else ""
    return "\n".join(
        [
            f"{parameter_count(config.model):,} parameters, {layers} blocks{of_kinds}; param_dtype {plan.param_dtype}, "
            f"reduce_dtype {plan.reduce_dtype},\nactivation_checkpointing {plan.activation_checkpointing}, "
            f"reshard_after_forward {str(plan.reshard_after_forward).lower()}; shown without compile\n"
            f"a step: {batch.global_batch_size:,} rows of {config.data.seq_len:,} tokens = {report.micro_steps:,} "
            f"micro-steps x {batch.micro_batch_size:,} rows x {dp:,} data-parallel ranks\n",
            __doc__.partition("How to read it:\n\n")[2],
            mesh_text(report.ranks),
            table(["BLOCKS", "number", "layers", "mask"], blocks),
            table(["WEIGHTS", "style", "whole", "placements", "local"], weights),
            table(["ACTIVATIONS", "arrives", "computes on", "leaves"], activations),
            table(["COLLECTIVES", "phase", "kind", "axis", "calls", "bytes", "a step"], calls, 3),
            table(["TOTAL", "kind", "calls", "a step"], sums, 2),
            table(["MEMORY", "bytes"], [[name, size_text(size)] for name, size in report.memory.items()], 1),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------


def load(arguments: list[str], world: int, local_world: int) -> Config:
    """The checked configuration for `world` ranks, `local_world` on each node, whatever there is here.

    UserError names what is wrong.
    """
    if min(world, local_world) < 1 or world % local_world:
        raise UserError(
            f"--world-size={world} with --local-world-size={local_world}: both must be positive integers, and the "
            "first a multiple of the second"
        )
    config = configs.load(arguments, world, local_world)
    if config.model.vocab_size == 0 and config.data.tokenizer != "train":
        raise UserError(
            f"model.vocab_size=0 waits for the tokenizer {config.data.tokenizer}, which is not loaded here: "
            "give the number of rows with --model.vocab_size=N"
        )
    return config if config.model.vocab_size else configs.settle(config, config.data.tokenizer_vocab_size, None)


def main() -> None:
    """Exit status 2, with one message on standard error, where the input is wrong."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--world-size", type=int, default=8, help="number of ranks")
    parser.add_argument("--local-world-size", type=int, help="ranks of one node; by default all")
    options, arguments = parser.parse_known_args()
    world = options.world_size
    try:
        config = load(arguments, world, world if options.local_world_size is None else options.local_world_size)
    except UserError as error:
        parser.error(str(error))
    print(render(explain(config, world)), end="")


if __name__ == "__main__":
    main()
