"""One page of what explain.py prints, for the eye: `python explain.py ... --picture FILE`.

It shows the grid of ranks, one block from top to bottom with the shapes, layouts and collectives of its modules, and
the memory of the model. Every number and every name is the report's. It needs matplotlib, and nothing else imports it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cost.record import Collective, Report
from cost.text import few, name_text, size_text
from model import parameter_count
from runtime.ranks import UserError

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Rectangle
except ImportError as error:
    raise UserError("--picture draws with matplotlib: pip install -r requirements-dev.txt") from error

AXES = ("dp_replicate", "dp_shard", "tp")
COLOURS = {"all-gather": "#9ad0f5", "reduce-scatter": "#f5c26b", "all-reduce": "#d9a5c7"}  # of a collective
OURS, SLICE, NOTHING = "#0b5394", "#8fb8de", "#f1f1f1"  # what rank 0 keeps, the slice that TP gives it, the rest
ROWS_OF_DP = ("#cfe5f7", "#fde3b5", "#cdebd8", "#f0d3e4", "#e6e6e6")  # a background for each data-parallel rank
BARS = {  # keys of Report.memory, and what is said of them
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer state": "optimizer state",
    "gathered at once": "gathered for a while",
}
WIDTH, LINE, INDENT = 9.0, 0.21, 0.16  # inches
WEIGHT, ACTIVATION, FORWARD, BACKWARD = 2.5, 4.15, 6.52, 7.7  # where the columns of the block start
CHIP = 1.14  # the width of a collective


class Page:
    """Axes in inches, with y from the top down, so that what is written has a place and a size."""

    def __init__(self, height: float):
        self.figure = Figure(figsize=(WIDTH, height), dpi=100, facecolor="white")
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 9, **how) -> None:
        self.axes.text(x, y, text, size=size, **{"va": "center", "ha": "left"} | how)

    def box(self, x: float, y: float, width: float, height: float, fill: str, edge: str = "none", **how) -> None:
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, **how))

    def round(self, x: float, y: float, width: float, height: float, colour: str, dashed: bool) -> None:
        fill, line = ("white", "--") if dashed else (colour, "-")
        how = {"boxstyle": "round,pad=0,rounding_size=0.05", "facecolor": fill, "edgecolor": colour, "linestyle": line}
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, linewidth=1.5, **how))  # type: ignore[arg-type]

    def chip(self, x: float, y: float, call: Collective) -> None:
        """A collective: over tp a full box, of FSDP a dashed one."""
        self.round(x, y, CHIP, 0.33, COLOURS[call.kind], call.module.endswith(" (FSDP)"))
        again = "again: " if call.phase == "recompute" else ""
        self.text(x + CHIP / 2, y + 0.1, again + call.kind, 8.5 if not again else 7.5, ha="center")
        self.text(x + CHIP / 2, y + 0.235, f"{call.axis} {size_text(call.nbytes)}", 7.5, ha="center")


def depth(name: str, names: Sequence[str]) -> int:
    """How many other modules of the block it is in."""
    return sum(name.startswith(other + ".") for other in names)


def modules_of(report: Report, block: str) -> list[str]:
    """What is inside the block and has a weight, a style or a collective, and what holds such modules; in order."""
    told = {*report.weights, *(call.module for call in report.collectives)}
    inside = [name for name in report.activations if name.startswith(block + ".")]
    return [name for name in inside if any((each + ".").startswith(name + ".") for each in told)]


def calls_of(report: Report, module: str) -> tuple[list[Collective], list[Collective]]:
    """Of one module: those of forward, and those of backward, where checkpointing's come first."""
    calls = [call for call in report.collectives if call.module == module]
    later = [call for call in calls if call.phase in ("recompute", "backward")]
    return [call for call in calls if call.phase == "forward"], sorted(later, key=lambda call: call.phase == "backward")


def row_height(report: Report, module: str) -> float:
    return max(2 * LINE, 0.37 * max(map(len, calls_of(report, module)))) + 0.05


# ---------------------------------------------------------------------------------------------------------------------
# The three parts


def said_of(dp_shard: int, tp: int) -> list[str]:
    """What the grid says of its rows and columns, where they have more than one rank."""
    said = ["a row: TP peers. Same rows of tokens, other slices of a weight"] if tp > 1 else []
    if dp_shard > 1:
        said += [
            "a column: DP peers. Other rows of tokens; each keeps a part",
            "of one slice, and gathers it when a block runs",
        ]
    return said or ["no rank shares its rows of tokens or its weights"]


def draw_grid(page: Page, report: Report, x: float, y: float) -> None:
    """The first replica, as in parallel.py: a row are TP peers, a column DP peers. Many ranks are left out."""
    sheet, sheets = report.ranks[0], len(report.ranks)
    heads = few([f"tp {j}" for j in range(len(sheet[0]))], 5)
    rows = few([(f"dp_shard {i}", few(list(map(str, row)), 5)) for i, row in enumerate(sheet)], 5, ("...", ()))
    cell, high, left = 0.62, 0.27, x + 0.85
    of = f"dp_replicate 0 of {sheets}; the others have the same slices" if sheets > 1 else "one rank keeps one cell"
    page.text(x, y, "RANKS", weight="bold")
    page.text(x + 0.62, y, of, 8.5)
    for j, head in enumerate(heads):
        page.text(left + cell * (j + 0.5), y + 0.25, head, ha="center")
    for i, (name, numbers) in enumerate(rows):
        top = y + 0.38 + high * i
        page.text(left - 0.1, top + high / 2, name, ha="right")
        for j, number in enumerate(numbers or [""] * len(heads)):
            colour = ROWS_OF_DP[i % len(ROWS_OF_DP)] if number else "white"
            first = i == j == 0
            page.box(left + cell * j, top, cell - 0.04, high - 0.04, colour, "black" if first else "none")
            page.text(left + cell * (j + 0.5) - 0.02, top + high / 2 - 0.02, number or "...", ha="center")
    y += 0.38 + high * len(rows) + 0.12
    for i, line in enumerate(said_of(len(sheet), len(sheet[0]))):
        page.text(x, y + 0.18 * i, line, 8.5)


def draw_memory(page: Page, report: Report, x: float, y: float) -> None:
    """A bar for each of BARS."""
    page.text(x, y, "MEMORY", weight="bold")
    page.text(x + 0.75, y, "of the model on rank 0; activations come on top", 8.5)
    most, room = max(report.memory[key] for key in BARS) or 1, 1.55
    for i, (key, name) in enumerate(BARS.items()):
        top, nbytes = y + 0.2 + 0.3 * i, report.memory[key]
        page.text(x + 1.38, top + 0.1, name, ha="right")
        fill, line = ("white", "--") if key.startswith("gathered") else (OURS, "-")
        page.box(x + 1.46, top, room * nbytes / most, 0.2, fill, OURS, linestyle=line)
        page.text(x + 1.5 + room * nbytes / most, top + 0.1, size_text(nbytes))


def draw_weight(page: Page, row: list, tp: int, x: float, y: float) -> None:
    """The whole matrix, its rows downwards; in it what TP leaves to rank 0, and in that what FSDP does."""
    _, whole, placements, local = row
    words = placements.split(", ")
    high, wide = (0.36, 0.36) if len(whole) > 1 else (0.36, 0.07)
    over_tp = words[-1] if len(words) == len(AXES) else "R"  # without TP a weight has no such axis
    across, down = (1 / tp if over_tp == f"S({dim})" else 1.0 for dim in (1, 0))
    page.box(x, y, wide, high, NOTHING, "#888888", linewidth=0.8)
    page.box(x, y, wide * across, high * down, SLICE)
    parts = [own / full for own, full in zip(local, whole, strict=True)]
    page.box(x, y, wide * (parts[1] if len(parts) > 1 else 1), high * parts[0], OURS)
    page.text(x + 0.45, y + 0.08, str(local), 8.5)
    page.text(x + 0.45, y + 0.26, f"of {whole}", 8.5)


def draw_activation(page: Page, shape: Sequence[int], layout: str, tp: int, x: float, y: float) -> None:
    """T downwards, features to the right; dark is what rank 0 has of it."""
    wide, high, dims = 0.22, 0.15, len(shape)
    down = 1 / tp if layout == f"S({dims - 2})" else 1.0
    across = 1 / tp if layout == f"S({dims - 1})" else 1.0
    page.box(x, y, wide, high, NOTHING, "#888888", linewidth=0.8)
    page.box(x, y, wide * across, high * down, OURS)


def draw_block(page: Page, report: Report, block: str, top: float) -> float:
    """The modules of a block in the order in which they run; returns where it ends."""
    names, tp, y = modules_of(report, block), len(report.ranks[0][0]), top
    frames: list[tuple[float, float, int]] = []
    for name in [f"{block} (FSDP)", *names]:
        forward, backward = calls_of(report, name)
        height = row_height(report, name)
        if name.endswith(" (FSDP)"):
            if not forward and not backward:
                continue
            page.text(0.22, y + LINE, "FSDP: the whole block's weights", style="italic")
            page.text(WEIGHT, y + LINE, "gathered before it runs; their gradients summed after", 8.5, style="italic")
        else:
            inner = depth(name, names)
            holds = any(other.startswith(name + ".") for other in names)
            arrives, starts, ends, leaves = report.activations[name]
            bold = "bold" if holds else "normal"
            page.text(0.22 + INDENT * inner, y + LINE, name.removeprefix(block + ".").rpartition(".")[2], weight=bold)
            row = report.weights.get(name)
            if row and row[1] != "-":
                draw_weight(page, row, tp, WEIGHT, y + 0.03)
            change = f"{arrives[1]} -> {starts[1]}" if arrives[1] != starts[1] else starts[1]
            out = f"{ends[1]} -> {leaves[1]}" if ends[1] != leaves[1] else leaves[1]
            for i, (word, (shape, layout), said) in enumerate((("in", starts, change), ("out", leaves, out))):
                if holds and i:
                    continue
                line = y + LINE * (i + 0.5) if not holds else y + LINE
                draw_activation(page, shape, layout, tp, ACTIVATION + 0.28, line - 0.075)
                page.text(ACTIVATION, line, word, 8.5)
                page.text(ACTIVATION + 0.58, line, f"{shape} {said if said != '-' else ''}", 8.5)
            if holds:
                end = y + height + sum(row_height(report, n) for n in names if n.startswith(name + "."))
                frames.append((y, end, inner))
        for x, calls in ((FORWARD, forward), (BACKWARD, backward)):
            for i, call in enumerate(calls):
                page.chip(x, y + 0.37 * i + 0.02, call)
        y += height
    page.box(0.1, top - 0.04, WIDTH - 0.2, y - top + 0.08, "none", "black", linewidth=1.2)
    for start, end, inner in frames:
        page.box(
            0.15 + INDENT * inner, start, 6.25 - INDENT * inner, end - start - 0.03, "#f7f7fb", "#999999", zorder=0
        )
    return y


def heading(report: Report) -> list[str]:
    config, plan, batch = report.config, report.config.parallel, report.config.train
    sizes = [len(report.ranks), len(report.ranks[0]), len(report.ranks[0][0])]
    mesh = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    ranks = sizes[0] * sizes[1] * sizes[2]
    return [
        f"{parameter_count(config.model):,} parameters on {ranks:,} rank{'s'[: ranks > 1]}: {mesh}",
        f"A step: {batch.global_batch_size:,} rows of {config.data.seq_len:,} tokens = {report.micro_steps:,} "
        f"micro-step{'s'[: report.micro_steps > 1]} x {batch.micro_batch_size:,} rows x {sizes[0] * sizes[1]:,} "
        f"data-parallel rank{'s'[: sizes[0] * sizes[1] > 1]}. Checkpointing: {plan.activation_checkpointing}.",
    ]


def totals(report: Report) -> list[str]:
    """One line for each axis: what a whole step sends over it."""
    sums: dict[str, Counter] = {}
    for call in report.collectives:
        sums.setdefault(call.axis, Counter())[call.kind] += call.count * call.nbytes
    of_axes = {axis: sums[axis] for axis in (*reversed(AXES), "all ranks") if axis in sums}
    return [
        f"{axis}: {', '.join(f'{k} {size_text(n)}' for k, n in sorted(of.items()))}" for axis, of in of_axes.items()
    ]


LEGEND = (
    "Shapes are rank 0's. Activations: T downwards, features to the right. Backward runs from the bottom up.",
    "R: the same on all tp ranks. S(1), S(2): over tp, dim 1 or 2 is cut. P: each tp rank has one term of a sum.",
    "a -> b: the plan turns a into b, with the collective beside it. Its bytes: the whole tensor, as one rank sees it.",
)


def draw_legend(page: Page, y: float) -> None:
    """What colours and letters mean."""
    marks = ((NOTHING, "on other tp ranks"), (SLICE, "FSDP: on other dp_shard ranks"), (OURS, "on rank 0"))
    for x, (colour, said) in zip((0.15, 1.65, 4.0), marks, strict=True):
        page.box(x, y - 0.07, 0.2, 0.14, colour, "#888888", linewidth=0.8)
        page.text(x + 0.27, y, said, 8.5)
    for x, said, dashed in ((5.25, "over tp", False), (6.25, "of FSDP", True)):
        page.round(x, y - 0.07, 0.25, 0.14, COLOURS["all-gather"], dashed)
        page.text(x + 0.32, y, said, 8.5)
    for i, line in enumerate(LEGEND):
        page.text(0.15, y + 0.22 + 0.18 * i, line, 8.5)


def draw(report: Report, target: Path | str) -> Figure:
    """Write the page; PNG or SVG, as the suffix of `target` says. Of several kinds of block it shows the first.

    UserError: another suffix, or a place that cannot be written.
    """
    path = Path(target)
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--picture={path}: a picture is .png or .svg")
    block, (layers, mask) = next(iter(report.blocks.items()))
    names = modules_of(report, block)
    sent = totals(report)
    sheet = report.ranks[0]
    grid = 0.45 + 0.27 * min(5, len(sheet)) + 0.18 * len(said_of(len(sheet), len(sheet[0])))
    start, first = 0.95 + max(grid, 1.4), f"{block} (FSDP)"
    fsdp = row_height(report, first) if any(calls_of(report, first)) else 0.0
    end = start + 0.6 + fsdp + sum(row_height(report, name) for name in names)
    page = Page(end + 0.25 + 0.18 * max(1, len(sent)) + 0.12 + 0.22 + 0.18 * len(LEGEND) + 0.08)
    title, below = heading(report)
    page.text(0.15, 0.25, title, 12, weight="bold")
    page.text(0.15, 0.5, below, 9)
    draw_grid(page, report, 0.15, 0.85)
    draw_memory(page, report, 5.05, 0.85)

    kinds, total = len(report.blocks), report.config.model.num_hidden_layers
    alike = f"layers {', '.join(map(str, few(layers, 6)))}" if len(layers) > 1 else f"layer {layers[0]}"
    of = f"the first of {kinds} kinds: {alike} of {total}" if kinds > 1 else f"one of {total} that are alike"
    page.text(0.15, start + 0.2, f"{name_text(block, kinds).strip().upper()}", weight="bold")
    page.text(0.85, start + 0.2, f"{of if total > 1 else 'the only one'}; mask {mask}", 8.5)
    for x, head in ((WEIGHT, "weight"), (ACTIVATION, "activation"), (FORWARD, "forward ↓"), (BACKWARD, "backward ↑")):
        page.text(x, start + 0.43, head, weight="bold")
    y = draw_block(page, report, block, start + 0.6) + 0.25
    page.text(0.15, y, "A STEP SENDS", weight="bold")
    for line in sent or ["nothing: it has one rank"]:
        page.text(1.3, y, line, 8.5)
        y += 0.18
    draw_legend(page, y + 0.12)
    try:
        page.figure.savefig(path)
    except OSError as error:
        raise UserError(f"--picture={path} cannot be written: {error.strerror}") from error
    return page.figure
