"""The report and the prediction as text for a terminal 100 columns wide."""

import textwrap
from itertools import zip_longest

from cost.choose import Choice
from cost.predict import USABLE, Prediction
from cost.record import LAYERS, Report, block_of
from model import parameter_count


def size_text(count: int) -> str:
    units = [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")]
    return next((f"{count / unit:,.1f} {name}" for unit, name in units if count >= unit), f"{count} B")


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


def overview(report: Report) -> list[list]:
    """Each module in one row: what of its weight is here, what leaves it, what it sends forward and backward.

    Where it sends several things, further rows follow.
    """
    rows = []
    for name, (*_, (leaves, layout)) in report.activations.items():
        calls = [call for call in report.collectives if call.module.removesuffix(" (FSDP)") == name]
        forward = dict.fromkeys(call.kind for call in calls if call.phase == "forward")
        backward = dict.fromkeys(call.kind for call in calls if call.phase in ("backward", "recompute"))
        if forward or backward or name in report.weights:
            here = report.weights.get(name, ["-"])[-1], f"{leaves} {layout}".strip(" -")
            sent = zip_longest(forward or [""], backward, fillvalue="")
            rows += [[name_text(name, len(report.blocks)), *here, *next(sent)], *(["", "", "", *more] for more in sent)]
    return rows


def render(report: Report, how_to_read: str, full: bool) -> str:
    """The report as text for a terminal 100 columns wide: all of it, or what one looks at first."""
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
    tables = [table(["MODULE", "weight here", "output here", "sends forward", "and backward"], overview(report))]
    if full:
        tables = [table(["WEIGHTS", "style", "whole", "placements", "local"], weights)]
        tables += [table(["ACTIVATIONS", "arrives", "computes on", "leaves"], activations)]
        tables += [table(["COLLECTIVES", "phase", "kind", "axis", "calls", "bytes", "a step"], calls, 3)]
    return "\n".join(
        [
            f"{parameter_count(config.model):,} parameters, {layers} blocks{of_kinds}; param_dtype {plan.param_dtype}, "
            f"reduce_dtype {plan.reduce_dtype},\nactivation_checkpointing {plan.activation_checkpointing}, "
            f"reshard_after_forward {str(plan.reshard_after_forward).lower()}; shown without compile\n"
            f"a step: {batch.global_batch_size:,} rows of {config.data.seq_len:,} tokens = {report.micro_steps:,} "
            f"micro-steps x {batch.micro_batch_size:,} rows x {dp:,} data-parallel ranks\n",
            how_to_read,
            mesh_text(report.ranks),
            table(["BLOCKS", "number", "layers", "mask"], blocks),
            *tables,
            table(["TOTAL", "kind", "calls", "a step"], sums, 2),
            table(["MEMORY", "bytes"], [[name, size_text(size)] for name, size in report.memory.items()], 1),
        ]
    )


def prediction_text(made: Prediction, world: int) -> str:
    """What a step takes on a GPU, and what for."""
    step, gpu = made.step_seconds, made.gpu
    times = [[part, f"{seconds:.3f} s", f"{seconds / step:.1%}"] for part, seconds in made.seconds.items()]
    memory = [[part, size_text(nbytes)] for part, nbytes in made.bytes.items()]
    fits = "fits into" if made.fits else "is more than"
    head = f"ON {world:,} x {gpu.name.upper()}: {made.tokens_per_second:,.0f} tokens/s per GPU, MFU {made.mfu:.1%}\n"
    head += f"a step of {step:.3f} s; {made.memory_gib:.1f} GiB, which {fits} {USABLE:.0%} of {gpu.memory_gib:g} GiB\n"
    tables = table(["STEP", "predicted", "share"], times, 2), table(["PEAK", "predicted"], memory, 1)
    return "\n".join([head, *tables, textwrap.fill(made.bound(), 100) + "\n"])


def choices_text(fitting: list[Choice], faster: Choice | None) -> str:
    """The best that fit, each with the line to paste, and the fastest that does not."""
    heads = ["", "tp", "dp_replicate", "micro_batch", "checkpointing", "reshard", "tokens/s", "MFU", "GiB"]
    places = {str(place): choice for place, choice in enumerate(fitting, 1)} | ({"no": faster} if faster else {})
    rows = []
    for place, choice in places.items():
        made = choice.prediction
        numbers = [f"{made.tokens_per_second:,.0f}", f"{made.mfu:.1%}", f"{made.memory_gib:.1f}"]
        rows.append([place, *(str(value).lower() for value in choice.key), *numbers])
    lines = [f"{place:>2}  {choice.arguments()}\n" for place, choice in places.items() if choice is not faster]
    why = textwrap.fill(f"no: it would be faster, but {faster.prediction.bound()[3:]}", 100) + "\n" if faster else ""
    return "\n".join([table(heads, rows, 3), "".join(lines), why]).rstrip()
