"""Draw the pictures of docs/ and README.md by this code: `python docs/draw.py [NAME ...]`, names as in PICTURES.

None is drawn by hand: rows, slices, events, bytes and losses come from the code that trains. The numbers in each
picture are printed too. It needs no GPU. Without a name all are drawn but loss_by_mesh and resume, which train; from
the losses that they have written, `python docs/draw.py loss_by_mesh resume --again` draws them once more.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import explain
import parallel
import train
from benchmarks import published
from configs import Config
from cost.choose import Choice, candidates, with_values
from cost.hardware import Hardware, named
from cost.predict import USABLE, Prediction, predict
from cost.record import KINDS, LAYERS, Recorder, block_of, record
from cost.text import size_text, table
from docs import report as report_page
from docs.report import COLOURS as OF_COLLECTIVE
from docs.report import ROWS_OF_DP, Page
from model import Llama

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
RECIPE, NODE = [str(ROOT / "configs" / "llama3_8b.toml"), "--parallel.tp=1"], 8
BATCHES = {8: 512, 64: 512, 512: 1024}  # rows of a global batch, by the number of GPUs
COLOURS = [("#a6cee3", "black"), ("#5b9bd5", "black"), ("#1f5a9e", "white")]  # of a bar, and of what is written on it
PARTS = {  # of a GPU's memory, from below: keys of Prediction.bytes, and a colour
    "weights, gradients, AdamW's moments": (("parameters", "buffers", "gradients", "optimizer state"), "#1f5a9e"),
    "activations kept for backward": (("activations",), "#f0a04b"),
    "at work, in one block or the loss": (("at work",), "#b9b9b9"),
    "FSDP: weights, gradients on their way": (("FSDP",), "#3a9a6b"),
}
STYLE = {"font.size": 11, "axes.titlesize": 11, "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y"}
STYLE |= {"grid.alpha": 0.4, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
SIZE = {"figsize": (9, 4.4), "dpi": 100, "layout": "constrained", "sharey": True}


def best_by_tp(config: Config, world: int, gpu: Hardware) -> dict[int, Choice]:
    """For each tp the fastest that fits on `world` GPUs, of every micro-batch, checkpointing and way to shard."""
    found = sorted(candidates(config, world, min(world, NODE), gpu, train.make_optimizer), key=Choice.rank)
    best = {choice.key[0]: choice for choice in reversed(found) if choice.prediction.fits}
    return dict(sorted(best.items()))


def gib_by_part(config: Config, world: int, gpu: Hardware, keys_of: dict[str, Iterable[str]]) -> dict[str, float]:
    """GiB at the peak of one rank: of each part the sum of its keys of Prediction.bytes."""
    report = explain.explain(config, world, train.make_optimizer, gpu.memory_gib, quick=True)
    nbytes = predict(report, gpu, min(world, NODE)).bytes
    return {part: sum(nbytes[key] for key in keys) / 2**30 for part, keys in keys_of.items()}


def gib_by_tp(config: Config, world: int, gpu: Hardware, tps: Iterable[int], kept: str) -> dict[int, dict[str, float]]:
    """For each tp the GiB of PARTS at the peak, with the configuration's micro-batch and this checkpointing."""
    keys_of = {part: keys for part, (keys, _) in PARTS.items()}
    asked = {tp: with_values(config, tp, config.train.micro_batch_size, kept) for tp in tps}
    return {tp: gib_by_part(asked[tp], world, gpu, keys_of) for tp in asked}


def beside_published() -> list[tuple[published.Row, Prediction]]:
    """The compiled runs of Llama 3 8B on H100s, and what is predicted for the same settings."""
    rows = [row for row in published.ROWS if (row.model, row.gpu, row.compile) == ("3 8B", "h100-96", True)]
    return [(row, published.prediction_of(row, Path(os.devnull))) for row in rows]


@plt.rc_context(STYLE)
def draw_tokens(best: dict[int, dict[int, Choice]], beside: list[tuple[published.Row, Prediction]], path: Path) -> None:
    """Left `best_by_tp` of each number of GPUs, three at most, right `beside_published`."""
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(5, 2.4), **SIZE)
    tps = sorted({tp for choices in best.values() for tp in choices})
    for i, ((world, choices), (colour, ink)) in enumerate(zip(best.items(), COLOURS, strict=False)):
        for tp, choice in choices.items():
            (_, _, rows, kept, _), tokens = choice.key, choice.prediction.tokens_per_second
            x = tps.index(tp) + 0.28 * (i - 1)
            left.bar(x, tokens, 0.26, color=colour, label=f"{world} GPUs" if tp == min(choices) else None)
            for y, text, place in (
                (0, f"  {rows} row{'s'[: rows > 1]}, {kept}", "bottom"),
                (tokens, f"{tokens:,.0f} ", "top"),
            ):
                left.text(x, y, text, rotation=90, ha="center", va=place, color=ink, size=9.5)
    left.set_xticks(range(len(tps)), [f"tp {tp}" for tp in tps])
    left.set(ylabel="tokens/s of one GPU", title="H100, 80 GB: the fastest that is predicted to fit")
    places = range(len(beside))
    right.bar(places, [made.tokens_per_second for _, made in beside], 0.5, color="#cccccc", label="predicted")
    right.plot(places, [row.tokens for row, _ in beside], "D", color="#d95f02", markersize=9, label="published")
    right.set_xticks(places, [f"tp {row.tp}\n{row.gpus} GPUs" for row, _ in beside], size=10)
    right.set(title="H100, 96 GB: torchtitan's runs", xlim=(-0.6, len(beside) - 0.4))
    left.set_ylim(0, left.get_ylim()[1] * 1.14)  # room for the legends
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.legend(ncols=3, loc="upper right")
    right.legend(loc="upper right")
    figure.savefig(path)


@plt.rc_context(STYLE)
def draw_memory(by_checkpointing: dict[str, dict[int, dict[str, float]]], gpu: Hardware, path: Path) -> None:
    """A panel for each checkpointing, in it a stack for each tp, as `gib_by_tp` returns them."""
    (figure, panels), most = plt.subplots(1, len(by_checkpointing), **SIZE), USABLE * gpu.memory_gib
    for axes, (kept, by_tp) in zip(panels, by_checkpointing.items(), strict=True):
        for x, parts in enumerate(by_tp.values()):
            below = 0.0
            for part, gib in parts.items():
                axes.bar(x, gib, 0.6, below, color=PARTS[part][1], label=None if x else part)
                below += gib
            axes.text(x, below, f"{below:.1f}", ha="center", va="bottom")
        axes.axhline(most, color="black", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(by_tp)), [f"tp {tp}" for tp in by_tp])
        axes.set(title=f"checkpointing: {kept}", ylim=(0, 1.15 * most))
    panels[0].set(ylabel="GiB of one GPU at the peak")
    axes.text(len(by_tp) - 0.6, most * 1.02, f"{USABLE:.0%} of {gpu.memory_gib:g} GiB: as much as fits", ha="right")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path)


def tokens_by_tp(path: Path) -> str:
    """The numbers as text."""
    best, beside, one = {}, beside_published(), "--train.micro_batch_size=1"
    for world, rows in BATCHES.items():
        config = explain.load([*RECIPE, one, f"--train.global_batch_size={rows}"], world, NODE)
        best[world] = best_by_tp(config, world, named("h100"))
    draw_tokens(best, beside, path)
    found = [(world, tp, choice) for world, choices in best.items() for tp, choice in choices.items()]
    lines = [[world, tp, f"{c.prediction.tokens_per_second:,.0f}", c.arguments()] for world, tp, c in found]
    lines += [[r.gpus, r.tp, f"{made.tokens_per_second:,.0f}", f"{r.tokens:,} published"] for r, made in beside]
    return table(["GPUs", "tp", "tokens/s", ""], lines)


def memory_by_tp(path: Path) -> str:
    """The numbers as text."""
    config, gpu = explain.load([*RECIPE, "--train.micro_batch_size=2"], 64, NODE), named("h100")
    found = {kept: gib_by_tp(config, 64, gpu, (1, 2, 4, 8), kept) for kept in ("selective", "full")}
    draw_memory(found, gpu, path)
    lines = [[kept, tp, *(f"{gib:.1f}" for gib in found[kept][tp].values())] for kept in found for tp in found[kept]]
    return table(["GiB", "tp", *PARTS], lines, len(PARTS))


# ---------------------------------------------------------------------------------------------------------------------
# grid


@dataclass
class Cell:
    """What one rank of a mesh has. Ends of a range are the first that is not in it."""

    rank: int
    dp: int
    tp: int
    rows: list[list[int]]  # of the global batch, by micro-step
    slices: dict[str, tuple[int, int, int, int]]  # by weight: rows from, to, columns from, to
    shapes: dict[str, tuple[int, int]]  # by weight: the whole


@contextmanager
def pretended(rank: int, world: int) -> Iterator[None]:
    """A process group in which this process is `rank`, and there are no others."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def parallelized(config: Config) -> tuple[Llama, parallel.DeviceMesh]:
    """The model as train.py makes it, still on the meta device."""
    mesh = parallel.build_mesh(config.parallel, torch.device("cpu"))
    with torch.device("meta"):
        model = Llama(config.model)
    parallel.parallelize(model, mesh, config.parallel)
    return model, mesh


GRID = ["--parallel.tp=2", "--train.micro_batch_size=2", "--model.num_hidden_layers=1"]
CUT = {"q_proj": "column-parallel", "o_proj": "row-parallel"}  # weights of the picture


def cells(world: int = 8) -> list[Cell]:
    """Of all ranks: rows by data.py's deal; of weights whose numbers are their places, what `place_shard` keeps."""
    config, found = explain.load(GRID, world, world), []
    with pretended(0, world):
        model, _ = parallelized(config)
        weights = {name: model.get_submodule(f"{LAYERS}0.self_attn.{name}").weight for name in CUT}
    for rank in range(world):
        with pretended(rank, world):
            mesh = parallel.build_mesh(config.parallel, torch.device("cpu"))
            dp, dp_size = parallel.dp_rank_and_size(mesh)
            batch, micro = torch.arange(config.train.global_batch_size), config.train.micro_batch_size
            cell = Cell(rank, dp, mesh.get_local_rank("tp"), data.deal(batch, micro, dp, dp_size), {}, {})
            for name, weight in weights.items():
                # a stand-in: the real one says rank 0, as one process has but one mesh of this shape for FSDP
                kept = torch.zeros(weight.to_local().shape, dtype=torch.int64)
                own = SimpleNamespace(device_mesh=mesh, placements=weight.placements, to_local=lambda kept=kept: kept)
                parallel.place_shard(own, torch.arange(weight.numel()).view(weight.shape))
                cell.slices[name], cell.shapes[name] = extent(kept, weight.shape[1]), tuple(weight.shape)
            found.append(cell)
    return found


def extent(places: torch.Tensor, width: int) -> tuple[int, int, int, int]:
    """Rows from, to, columns from, to: of places in a matrix that is so wide."""
    rows, columns = places // width, places % width
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


OF_TP = ("#0b5394", "#b85c00")  # white can be read on them


def draw_grid(cells: list[Cell], path: Path) -> Figure:
    """Ranks, the global batch, and two weights, each with who has what of it."""
    page, wide, high = Page(4.55), 1.12, 0.62
    page.text(0.15, 0.25, f"Who has what: {len(cells)} ranks, tp 2 x dp_shard 4", 12, weight="bold")
    page.text(0.15, 0.62, "The ranks", weight="bold")
    for tp in range(2):
        page.box(0.85 + wide * tp, 0.78, wide - 0.06, 0.26, OF_TP[tp])
        page.text(0.85 + wide * (tp + 0.5) - 0.03, 0.91, f"tp {tp}", color="white", ha="center")
    for cell in cells:
        x, y = 0.85 + wide * cell.tp, 1.1 + high * cell.dp
        page.box(x, y, wide - 0.06, high - 0.06, ROWS_OF_DP[cell.dp], OF_TP[cell.tp], linewidth=2)
        page.text(x + wide / 2 - 0.03, y + 0.17, f"rank {cell.rank}", ha="center", weight="bold")
        page.text(x + wide / 2 - 0.03, y + 0.38, f"rows {rows_text(cell.rows)}", 8.5, ha="center")
        if cell.tp == 0:
            page.text(0.78, y + high / 2 - 0.03, f"dp {cell.dp}", ha="right")

    page.text(3.4, 0.62, "The global batch: 16 rows", weight="bold")
    for cell in cells:
        for micro_step, rows in enumerate(cell.rows):
            for row in rows:
                y = 0.82 + 0.16 * row + 0.12 * micro_step
                page.box(3.95, y, 1.25, 0.14, ROWS_OF_DP[cell.dp])
                if cell.tp == 0:
                    page.text(3.9, y + 0.07, str(row), 8, ha="right")
            peers = [str(other.rank) for other in cells if other.dp == cell.dp]
            middle = 0.82 + 0.16 * (rows[0] + len(rows) / 2) + 0.12 * micro_step - 0.01
            if cell.tp == 0:
                page.text(4.575, middle, f"ranks {', '.join(peers)}", 8.5, ha="center")
            if cell.rank == 0:
                page.text(3.5, middle + 0.48, f"micro-step {micro_step + 1}", 8.5, ha="center", rotation=90)

    for i, (name, said) in enumerate(CUT.items()):
        x, y, size = 5.75 + 1.63 * i, 1.1, 1.48
        out, into = cells[0].shapes[name]
        page.text(x, 0.62, f"{name} ({out}, {into})", weight="bold")
        page.text(x, 0.85, said, 8)
        for cell in cells:
            top, bottom, left, right = cell.slices[name]
            place = (x + size * left / into, y + size * top / out)
            parts = ((right - left) / into * size, (bottom - top) / out * size)
            page.box(*place, *parts, OF_TP[cell.tp], "white", linewidth=1)
            middle = (place[0] + parts[0] / 2, place[1] + parts[1] / 2)
            page.text(*middle, f"rank {cell.rank}", 8.5, color="white", ha="center")
        page.box(x, y, size, size, "none", "black", linewidth=1)
    for i, line in enumerate(
        (
            "Colour: tp cuts the matrix in two.",
            "Lines: FSDP cuts each half by dp_shard.",
            "A rank keeps its piece all the time. For a block",
            "it gathers the pieces of its colour, no others.",
        )
    ):
        page.text(5.75, 2.85 + 0.19 * i, line, 8.5)
    page.text(0.15, 3.85, "TP peers, side by side: the same rows of tokens, each with its own half of every matrix.")
    page.text(0.15, 4.07, "DP peers, one below the other: other rows, each with a quarter of the same half.")
    page.text(
        0.15, 4.29, "A step's rows are dealt two at a time; four dp ranks take eight, so 16 rows are two micro-steps."
    )
    return save(page.figure, path)


def rows_text(rows: list[list[int]]) -> str:
    return ", ".join(f"{micro_batch[0]}-{micro_batch[-1]}" for micro_batch in rows)


def grid(path: Path) -> str:
    """The numbers as text."""
    found = cells()
    draw_grid(found, path)
    lines = [[c.rank, c.dp, c.tp, c.rows, *(f"[{a}:{b}, {x}:{y}]" for a, b, x, y in c.slices.values())] for c in found]
    return table(["rank", "dp", "tp", "rows", *CUT], lines)


# ---------------------------------------------------------------------------------------------------------------------
# column_row, collectives: small numbers on two ranks


def pair() -> dict[str, Any]:
    """relu(x A) B on one rank, and on two, of which each has half of A's columns and of B's rows."""
    x = torch.tensor([[1, 2], [3, -1]])
    a = torch.tensor([[1, 0, 2, -1], [2, 1, -1, 1]])
    b = torch.tensor([[1, 2], [0, 1], [2, -1], [1, 1]])
    columns, rows = a.chunk(2, dim=1), b.chunk(2, dim=0)
    inner = [(x @ own).relu() for own in columns]
    partial = [part @ own for part, own in zip(inner, rows, strict=True)]
    whole = (x @ a).relu()
    found = {"x": x, "A": a, "B": b, "h": whole, "y": whole @ b, "columns": columns, "rows": rows, "inner": inner}
    return found | {"partial": partial, "sum": partial[0] + partial[1]}


def draw_matrix(
    page: Page, x: float, y: float, values: torch.Tensor, colours: list[list[str]], size: float = 0.3
) -> tuple[float, float]:
    """A cell for each number; without a colour it is empty. Returns its right end and its middle."""
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            colour = colours[i][j]
            page.box(x + size * j, y + size * i, size, size, colour or "white", "#666666", linewidth=0.8)
            if colour:
                ink = "white" if colour in OF_TP else "black"
                page.text(x + size * (j + 0.5), y + size * (i + 0.5), str(value), ha="center", color=ink)
    return x + size * values.shape[1], y + size * values.shape[0] / 2


PAIR_SAYS = (
    "A rank needs no other for h: a column of h depends on one column of A, and relu looks at each number alone.",
    "Then each has one term of all of y. One sum is all that is sent: reduce-scatter gives each rank the sum",
    "for its own tokens. nn.Linear keeps A transposed, so A's columns are rows of its weight.",
)


def draw_pair(found: dict[str, Any], path: Path) -> Figure:
    """Above one rank, below two; a slice stands where it is in the whole."""
    page, plain, light = Page(6.1), "#f1f1f1", ("#cfe0f2", "#fbdcbb")
    page.text(0.15, 0.25, "A column-parallel and a row-parallel matrix: relu(x A) B on two ranks", 12, weight="bold")
    heads = (("x", "two tokens"), ("A", "cut by columns"), ("h = relu(x A)", "cut likewise"), ("B", "cut by rows"))
    heads += (("h B", "partial"),)
    places = (1.15, 2.15, 3.75, 5.35, 6.35)
    for x, (head, said) in zip(places, heads, strict=True):
        page.text(x, 0.6, head, weight="bold")
        page.text(x, 0.78, said, 8.5)
    for line in range(3):
        y = (0.98, 2.48, 3.98)[line]
        rank = line - 1
        own = {2 * rank, 2 * rank + 1} if line else {0, 1, 2, 3}
        strong, weak = (OF_TP[rank], light[rank]) if line else (plain, plain)
        page.text(0.15, y + 0.6, f"rank {rank}" if line else "one rank", weight="bold")
        result = found["partial"][rank] if line else found["y"]
        shown = (
            (found["x"], [[plain] * 2] * 2),
            (found["A"], [[strong if j in own else "" for j in range(4)]] * 2),
            (found["h"], [[weak if j in own else "" for j in range(4)]] * 2),
            (found["B"], [[strong if i in own else ""] * 2 for i in range(4)]),
            (result, [[weak] * 2] * 2),
        )
        for x, (values, colours), sign in zip(places, shown, ("·", "→", "·", "=", ""), strict=True):
            right, middle = draw_matrix(page, x, y + 0.6 - 0.15 * len(values), values, colours)
            page.text(right + 0.2, middle, sign, 14, ha="center")
            if sign == "→":
                page.text(right + 0.2, middle - 0.16, "relu", 8, ha="center")
    page.text(7.1, 1.58, "which is y", 8.5)
    page.text(7.55, 2.7, "y", weight="bold")
    page.text(7.55, 2.88, "the sum of both", 8.5)
    page.text(6.65, 3.83, "+", 14, ha="center")
    page.text(7.2, 3.33, "=", 14, ha="center")
    page.text(7.55, 3.83, "reduce-scatter", weight="bold")
    right, _ = draw_matrix(page, 7.55, 3.03, found["sum"], [[light[0]] * 2, [light[1]] * 2])
    for i in range(2):
        page.text(right + 0.08, 3.18 + 0.3 * i, f"to rank {i}", 8.5)
    for i, line in enumerate(PAIR_SAYS):
        page.text(0.15, 5.5 + 0.2 * i, line)
    return save(page.figure, path)


def column_row(path: Path) -> str:
    """The numbers as text."""
    found = pair()
    draw_pair(found, path)
    return "".join(
        f"{k}: {[v.tolist() for v in of] if isinstance(of, list | tuple) else of.tolist()}\n" for k, of in found.items()
    )


def four_numbers() -> dict[str, tuple[list[list[int]], list[list[int]]]]:
    """For each collective what two ranks have before and after."""
    halves, addends = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2, 3, 4], [10, 20, 30, 40]])
    total = addends.sum(dim=0)
    after = {
        "all-gather": (halves, torch.stack([halves.flatten()] * 2)),
        "reduce-scatter": (addends, total.view(2, 2)),
        "all-reduce": (addends, torch.stack([total] * 2)),
    }
    return {kind: (before.tolist(), then.tolist()) for kind, (before, then) in after.items()}


SAID = {  # of each collective: what it does, and what this code sends by it
    "all-gather": (
        "each rank has a slice, then the full tensor",
        "FSDP: a block's weights, before it runs",
        "TP: a branch's input, cut along the sequence",
    ),
    "reduce-scatter": (
        "each has a full tensor, then a slice of the sum",
        "FSDP: a block's gradients, after its backward",
        "TP: a branch's output, cut along the sequence",
    ),
    "all-reduce": (
        "each has a full tensor, then the full sum",
        "TP: gradients of norms; numbers within the loss",
        "HSDP: gradients, over the copies of the model",
    ),
}


def draw_collectives(found: dict[str, tuple[list[list[int]], list[list[int]]]], path: Path) -> Figure:
    page, light, both, size = Page(4.8), ("#cfe0f2", "#fbdcbb"), "#d9cdea", 0.42
    page.text(1.0, 0.25, "before", weight="bold")
    page.text(3.35, 0.25, "after", weight="bold")
    for k, (kind, states) in enumerate(found.items()):
        top = 0.45 + 1.32 * k
        for column, (x, state) in enumerate(zip((1.0, 3.35), states, strict=True)):
            for rank, numbers in enumerate(state):
                y = top + 0.5 * rank
                if not column:
                    page.text(0.15, y + size / 2, f"rank {rank}")
                for j, number in enumerate(numbers):
                    place = j + 2 * rank * (len(numbers) == 2)  # a part stands where it is in the whole
                    source = (
                        both if column and kind != "all-gather" else light[place // 2 if kind == "all-gather" else rank]
                    )
                    page.box(x + size * place, y, size, size, source, "#666666", linewidth=0.8)
                    page.text(x + size * (place + 0.5), y + size / 2, str(number), ha="center")
        page.text(3.02, top + 0.46, "→", 16, ha="center")
        page.round(5.4, top - 0.03, 1.3, 0.27, OF_COLLECTIVE[kind], False)
        page.text(6.05, top + 0.1, kind, 9.5, ha="center", weight="bold")
        for i, line in enumerate(SAID[kind]):
            page.text(5.4, top + 0.42 + 0.2 * i, line, 8.5)
    page.text(0.15, 4.4, "Colour: from which rank a number comes; violet: a sum of both ranks' numbers.", 8.5)
    page.text(0.15, 4.6, "An all-reduce is a reduce-scatter followed by an all-gather.", 8.5)
    return save(page.figure, path)


def collectives(path: Path) -> str:
    """The numbers as text."""
    found = four_numbers()
    draw_collectives(found, path)
    return table(["", "before", "after"], [[kind, *states] for kind, states in found.items()])


# ---------------------------------------------------------------------------------------------------------------------
# fsdp_block


class Order(Recorder):
    """Also in which order FSDP's collectives, the blocks, and the ends of gathered weights come in a micro-step."""

    def __init__(self, model: Llama, mesh: parallel.DeviceMesh):
        super().__init__(model, mesh, {}, compiled=False, on_gpu=False)
        self.events: list[tuple[str, str]] = []  # what, and of which block; "" is what is in none
        self.whole: list[str] = []  # blocks whose weights are gathered
        self.parts = ["", *(name for name, _ in model.named_modules() if name and block_of(name) == name)]

    def is_whole(self, part: str) -> bool:
        """Where there is no TP: FSDP's slices are DTensors, gathered weights are not."""
        own = (weight for name, weight in self.model.named_parameters() if block_of(name) == part)
        return not any(isinstance(weight, DTensor) for weight in own)

    def see(self, func, args, kwargs, result) -> None:
        super().see(func, args, kwargs, result)
        if self.phase == "update":
            return
        whole = [part for part in self.parts if self.is_whole(part)]
        self.events += [("free", part) for part in self.whole if part not in whole]
        self.whole, fsdp = whole, self.fsdp_module()
        if func.namespace == "c10d":
            kind = next(text for key, text in KINDS.items() if key in func.__name__)
            if kind != "all-reduce":  # over one replica
                self.events.append((kind, fsdp or ""))
        elif fsdp is None and (part := block_of(self.place()[0])) in whole:
            self.events.append((self.phase, part))


LIFE = ["--parallel.tp=1", "--model.num_hidden_layers=3", "--data.tokenizer_vocab_size=1024"]
RUNS = ("forward", "backward")


def without_repeats(events: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A block runs once, though it has many operations, and between them some that autograd gives to no block."""
    found: list[tuple[str, str]] = []
    for event in events:
        if len(found) > 1 and event == found[-2] and event[0] in RUNS and event[1]:
            found.pop()  # what lay between belongs to the block
        elif not found or event != found[-1]:
            found.append(event)
    return found


def life_of_blocks() -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Of three blocks on two ranks: the events in the order of the calls, and the bytes that each gathers."""
    with pretended(0, 2):
        config = explain.load(LIFE, 2, 2)
        recorder = Order(*parallelized(config))
        blocks = {name: [layer] for layer, name in enumerate(recorder.parts[1:])}
        record(config, recorder, blocks, train.make_optimizer)
        return without_repeats(recorder.events), {part: recorder.gathered[part] for part in recorder.parts}


LENGTHS = {"all-gather": 1.0, "reduce-scatter": 1.0, "forward": 1.6, "backward": 2.6}  # not to scale
REST = {"forward": 0.9, "backward": 1.3}  # of what is in no block


@dataclass
class Bar:
    what: str
    part: str
    start: float
    end: float


def schedule(events: list[tuple[str, str]]) -> tuple[list[Bar], list[tuple[float, str, str]]]:
    """Two lanes, each in the order of its calls; and the moments at which memory is taken and freed.

    What runs waits for its weights, a reduce-scatter for its gradients, and a gather in forward, which is called for
    the next block once this one is under way, for nothing but the lane.
    """
    bars: list[Bar] = []
    memory: list[tuple[float, str, str]] = []
    computes, communicates, called, ready, done, running = 0.0, 0.0, 0.0, {}, {}, None
    for what, part in events:
        length = LENGTHS.get(what, 0.0) if part else REST.get(what, LENGTHS.get(what, 0.0))
        if what == "free":
            memory.append((done[part], what, part))
        elif what in RUNS and running == (what, part):
            continue  # a call came in the middle of it
        elif what in RUNS:
            running = what, part
            called = start = max(computes, ready[part])
            computes = done[part] = start + length
            bars.append(Bar(what, part, start, computes))
        else:
            start = max(communicates, done[part] if what == "reduce-scatter" else called)
            communicates = start + length
            bars.append(Bar(what, part, start, communicates))
            if what == "all-gather":
                ready[part] = communicates
                memory.append((start, what, part))
    return bars, sorted(memory, key=lambda each: (each[0], each[1] != "free"))


def part_text(part: str) -> str:
    return f"block {part.removeprefix(LAYERS)}" if part else "rest"


def held(memory: list[tuple[float, str, str]], sizes: dict[str, int]) -> list[tuple[float, int]]:
    """Bytes of gathered weights from each moment on."""
    found, now = [(0.0, 0)], 0
    for moment, what, part in memory:
        now += sizes[part] * (1 if what == "all-gather" else -1)
        found.append((moment, now))
    return found


LIFE_SAYS = (
    "Time goes to the right. The order is that of the calls in a real micro-step; lengths are not to scale.",
    "Drawn as on GPUs, where the gather of a block runs beside the block before it.",
    "rest: embedding, last norm and head. Their weights are gathered once, and freed last.",
)
OF_RUN = {"forward": "#c9dcf0", "backward": "#0b5394"}


@plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
def draw_life(events: list[tuple[str, str]], sizes: dict[str, int], path: Path) -> Figure:
    """Above the two lanes, below what the gathered weights take."""
    bars, memory = schedule(events)
    end = max(bar.end for bar in bars)
    figure, (lanes, below) = plt.subplots(2, 1, figsize=(9, 5.4), dpi=100, sharex=True, height_ratios=(1.25, 1))
    for bar in bars:
        run = bar.what in RUNS
        colour = OF_RUN[bar.what] if run else OF_COLLECTIVE[bar.what]
        hatch = "////" if bar.what == "reduce-scatter" else None
        how = {"color": colour, "edgecolor": "white" if run else "#666666", "hatch": hatch, "linewidth": 0.8}
        lanes.barh(1 if run else 0, bar.end - bar.start, 0.56, bar.start, **how)
        ink = "white" if bar.what == "backward" else "black"
        behind = {"bbox": {"facecolor": colour, "edgecolor": "none", "pad": 1}} if hatch else {}
        words = part_text(bar.part).replace(" ", "\n")
        lanes.text(
            (bar.start + bar.end) / 2, 1 if run else 0, words, ha="center", va="center", color=ink, size=8.5, **behind
        )
    for moment, what, part in memory:
        if what == "free":
            lanes.annotate("", (moment, 0.36), (moment, 0.7), arrowprops={"arrowstyle": "->", "linewidth": 1.2})
            lanes.text(
                moment + 0.06, 0.5, f"free {part.removeprefix(LAYERS) or 'rest'}", size=8, ha="left", va="center"
            )
    turn = next(bar.start for bar in bars if bar.what == "backward")
    for axes in (lanes, below):
        axes.axvline(turn, color="#666666", linestyle=":", linewidth=1)
    lanes.text(turn - 0.1, 1.6, "forward", ha="right", weight="bold")
    lanes.text(turn + 0.1, 1.6, "backward", ha="left", weight="bold")
    lanes.set(xlim=(0, end + 0.6), ylim=(-0.45, 1.7), yticks=[0, 1])
    lanes.set_yticklabels(["communication", "compute"])
    lanes.tick_params(axis="both", length=0, labelbottom=False)
    marks = [(OF_RUN["forward"], None, "forward"), (OF_RUN["backward"], None, "backward")]
    marks += [(OF_COLLECTIVE["all-gather"], None, "all-gather of weights")]
    marks += [(OF_COLLECTIVE["reduce-scatter"], "////", "reduce-scatter of gradients")]
    patches = [plt.Rectangle((0, 0), 1, 1, facecolor=c, hatch=h, edgecolor="#666666", label=t) for c, h, t in marks]
    figure.legend(handles=patches, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.945), frameon=False)
    figure.suptitle("Three blocks under FSDP, on one of two ranks", x=0.02, y=0.98, ha="left", size=12, weight="bold")
    steps = [*held(memory, sizes), (end + 0.6, 0)]
    for (start, nbytes), (stop, _) in pairwise(steps):
        below.fill_between([start, stop], 0, nbytes / 2**20, color="#3a9a6b", linewidth=0)
    whole = sum(sizes.values()) / 2**20
    below.axhline(whole, color="black", linestyle="--", linewidth=1)
    below.text(end + 0.55, whole * 1.03, "all weights of the model", ha="right", va="bottom", size=9)
    below.set(ylim=(0, whole * 1.22), ylabel="gathered weights, MiB", xticks=[])
    below.text(0, -0.1, "\n".join(LIFE_SAYS), transform=below.transAxes, va="top", linespacing=1.5)
    figure.subplots_adjust(left=0.135, right=0.985, top=0.87, bottom=0.19, hspace=0.08)
    return save(figure, path)


def fsdp_block(path: Path) -> str:
    """The events and the bytes as text."""
    events, sizes = life_of_blocks()
    draw_life(events, sizes, path)
    lines = [[what, part_text(part)] for what, part in events]
    top = max(nbytes for _, nbytes in held(schedule(events)[1], sizes))
    sizes_of = ", ".join(f"{part_text(part)} {size_text(nbytes)}" for part, nbytes in sizes.items())
    return table(["event", "of"], lines) + f"gathered: {sizes_of}; at most {size_text(top)} at once\n"


# ---------------------------------------------------------------------------------------------------------------------
# block, memory_by_mesh


def block(path: Path) -> str:
    """What explain.py prints of the same, without its help."""
    report = explain.explain(explain.load(["--parallel.tp=2"], 4, 4), 4, train.make_optimizer)
    save(report_page.draw(report, path), path)
    return explain.text.render(report, explain.IN_SHORT, full=False)


MEMORY_ROWS = 2
MEMORY = [str(ROOT / "configs" / "llama3_1b.toml"), f"--train.micro_batch_size={MEMORY_ROWS}"]
MEMORY += ["--train.global_batch_size=16"]
MESHES = {"1 rank": (1, 1), "dp 2": (2, 1), "tp 2": (2, 2), "dp 2 x tp 2": (4, 2), "dp 4": (4, 1), "tp 4": (4, 4)}
STACK = {  # of a rank's memory, from below: keys of Prediction.bytes, a colour, a hatch
    "parameters": (("parameters",), "#0b5394", None),
    "gradients": (("gradients",), "#6fa8dc", None),
    "AdamW's moments": (("optimizer state",), "#cfe0f2", None),
    "activations kept for backward": (("activations",), "#f0a04b", None),
    "the rest: at work, FSDP's gathered weights": (("at work", "FSDP", "buffers"), "#d0d0d0", "////"),
}


def gib_by_mesh() -> dict[str, dict[str, float]]:
    """For each of MESHES the GiB of STACK at the peak of one rank."""
    found, gpu, keys_of = {}, named("h100"), {part: keys for part, (keys, *_) in STACK.items()}
    for name, (world, tp) in MESHES.items():
        config = explain.load([*MEMORY, f"--parallel.tp={tp}"], world, world)
        found[name] = gib_by_part(config, world, gpu, keys_of)
    return found


@plt.rc_context(STYLE)
def draw_memory_by_mesh(by_mesh: dict[str, dict[str, float]], seq_len: int, path: Path) -> Figure:
    figure, axes = plt.subplots(figsize=(9, 4.8), dpi=100, layout="constrained")
    most = max(sum(parts.values()) for parts in by_mesh.values())
    for x, parts in enumerate(by_mesh.values()):
        below = 0.0
        for part, gib in parts.items():
            _, colour, hatch = STACK[part]
            axes.bar(x, gib, 0.62, below, color=colour, hatch=hatch, edgecolor="white", label=None if x else part)
            if gib > most / 22:
                ink = "white" if part == "parameters" else "black"
                box = {"facecolor": colour, "edgecolor": "none", "pad": 1} if hatch else None
                axes.text(x, below + gib / 2, f"{gib:.1f}", ha="center", va="center", color=ink, size=9.5, bbox=box)
            below += gib
        axes.text(x, below, f"{below:.1f}", ha="center", va="bottom", weight="bold")
    rows = [MEMORY_ROWS * MESHES[mesh][0] // MESHES[mesh][1] for mesh in by_mesh]
    axes.set_xticks(
        range(len(by_mesh)), [f"{mesh}\n{count} rows at once" for mesh, count in zip(by_mesh, rows, strict=True)]
    )
    axes.set(ylabel="GiB of one rank at the peak", ylim=(0, 1.08 * most))
    axes.set_title(
        f"Llama 3.2 1B, predicted for H100s: {MEMORY_ROWS} rows of {seq_len:,} tokens at once on each dp rank",
        loc="left",
        size=12,
        weight="bold",
    )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)
    return save(figure, path)


def memory_by_mesh(path: Path) -> str:
    """The numbers as text."""
    found = gib_by_mesh()
    draw_memory_by_mesh(found, explain.load(MEMORY, 1, 1).data.seq_len, path)
    lines = [
        [mesh, *(f"{gib:.2f}" for gib in parts.values()), f"{sum(parts.values()):.2f}"] for mesh, parts in found.items()
    ]
    return table(["GiB", *STACK, "sum"], lines, len(STACK) + 1)


# ---------------------------------------------------------------------------------------------------------------------
# loss_by_mesh


TRAINED = ("1 rank", "dp 2", "tp 2", "dp 2 x tp 2", "tp 4")  # of MESHES
RUN = ["configs/quickstart.toml", "--train.steps=60", "--train.eval_every=0"]
LINES = {  # of a mesh: colour, dashes, width, marker
    "1 rank": ("#bbbbbb", "-", 7, ""),
    "dp 2": ("#0072b2", "-", 3.5, "o"),
    "tp 2": ("#e69f00", "--", 2.5, "s"),
    "dp 2 x tp 2": ("#009e73", "-.", 1.8, "^"),
    "tp 4": ("#000000", ":", 1.3, "D"),
}


def command(mesh: str, run_dir: str, every: int = 0) -> list[str]:
    """What trains on that mesh, after `python -m`, with a checkpoint every so many steps."""
    ranks, tp = MESHES[mesh]
    launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train.py"]
    return [*launch, *RUN, f"--checkpoint.every={every}", f"--parallel.tp={tp}", f"--run.dir={run_dir}"]


def losses_of(run_dir: Path) -> list[float]:
    """Of the steps that are logged."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def kept_losses(path: Path, train_again: Callable[[], dict[str, Any]]) -> dict[str, list[float]]:
    """Those beside the picture, which are written anew unless --again."""
    kept = path.with_suffix(".json")
    if "--again" not in sys.argv:
        kept.write_text(json.dumps(train_again(), indent=1) + "\n")
    return json.loads(kept.read_text())["losses"]


def distances(own: list[float], first: list[float]) -> list[float]:
    """At each step, relative to `first`."""
    return [abs(a - b) / b for a, b in zip(own, first, strict=True)]


def on_log_axis(values: list[float]) -> list[float]:
    """What is equal to the bit has no point there."""
    return [value or math.nan for value in values]


def trained() -> dict[str, Any]:
    """The commands, and the loss of each step of each mesh: minutes."""
    losses = {}
    for mesh in TRAINED:
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            started = [sys.executable, "-m", *command(mesh, str(run_dir))]
            subprocess.run(started, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
            losses[mesh] = losses_of(run_dir)
    commands = {mesh: " ".join(["python -m", *command(mesh, "DIR")]) for mesh in TRAINED}
    return {"torch": torch.__version__, "commands": commands, "losses": losses}


def differences(losses: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of each mesh but the first its distances from the first."""
    (_, first), *others = losses.items()
    return {mesh: distances(own, first) for mesh, own in others}


@plt.rc_context(STYLE)
def draw_losses(losses: dict[str, list[float]], path: Path) -> Figure:
    """Above the losses, on top of each other; below how far each is from one rank."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6.2), dpi=100, sharex=True, layout="constrained")
    steps = range(1, len(losses["1 rank"]) + 1)
    for mesh, values in losses.items():
        colour, dashes, width, _ = LINES[mesh]
        ranks = MESHES[mesh][0]
        label = mesh if ranks == 1 else f"{mesh} ({ranks} ranks)"
        above.plot(steps, values, dashes, color=colour, linewidth=width, label=label)
    for mesh, values in differences(losses).items():
        colour, dashes, _, marker = LINES[mesh]
        how = {"linewidth": 1.3, "marker": marker, "markersize": 4, "markevery": 5}
        below.plot(steps, on_log_axis(values), dashes, color=colour, label=mesh, **how)
    above.set(ylabel="training loss, nats per token")
    above.set_title(
        "The mesh does not change the result: quickstart.toml on five meshes, one curve",
        loc="left",
        size=12,
        weight="bold",
    )
    above.legend(title="mesh: all on top of each other")
    below.set(yscale="log", xlabel="optimizer step", ylabel="difference, relative")
    below.set_title(
        "How far each is from 1 rank: float32 rounds sums in another order differently. A gap: equal to the bit",
        loc="left",
    )
    below.set(ylim=(1e-8, 1e-3), xlim=(0, steps[-1] + 1))
    below.axhline(1e-5, color="black", linewidth=1)
    below.text(steps[-1], 1.2e-5, "1e-5: what the tests allow", ha="right", va="bottom", size=10)
    below.legend(ncols=4, loc="upper left")
    return save(figure, path)


def loss_by_mesh(path: Path) -> str:
    """Train, unless --again, and write the losses beside the picture; the largest differences as text."""
    losses = kept_losses(path, trained)
    draw_losses(losses, path)
    lines = [[mesh, f"{values[0]:.4f}", f"{values[-1]:.4f}"] for mesh, values in losses.items()]
    largest = ["-", *(f"{max(values):.1e}" for values in differences(losses).values())]
    return table(
        ["mesh", "first loss", "last", "largest difference"], [[*a, b] for a, b in zip(lines, largest, strict=True)], 3
    )


# ---------------------------------------------------------------------------------------------------------------------
# resume


BEFORE, AFTER, CHECKPOINT, KILLED = "dp 2 x tp 2", "tp 4", 30, 40  # meshes; steps


def killed_and_resumed() -> dict[str, Any]:
    """A run on BEFORE that is killed after KILLED steps, and goes on with AFTER from the checkpoint: two minutes."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir, environment = Path(folder) / "run", os.environ | {"OMP_NUM_THREADS": "1"}
        commands = [[sys.executable, "-m", *command(mesh, str(run_dir), CHECKPOINT)] for mesh in (BEFORE, AFTER)]
        first = subprocess.Popen(commands[0], cwd=ROOT, env=environment, start_new_session=True)
        metrics = run_dir / "metrics.jsonl"
        while first.poll() is None and not (metrics.exists() and len(losses_of(run_dir)) >= KILLED):
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        before = losses_of(run_dir)
        subprocess.run(commands[1], cwd=ROOT, env=environment, check=True)
        losses = {"killed": before, "resumed": losses_of(run_dir)[CHECKPOINT:]}
    words = [" ".join(["python -m", *command(mesh, "DIR", CHECKPOINT)]) for mesh in (BEFORE, AFTER)]
    return {"torch": torch.__version__, "commands": words, "losses": losses}


@plt.rc_context(STYLE)
def draw_resume(losses: dict[str, list[float]], reference: list[float], path: Path) -> Figure:
    """Both parts of a run, over one that was never stopped; below how far from it they are."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.6), dpi=100, sharex=True, layout="constrained")
    killed, resumed = losses["killed"], losses["resumed"]
    parts = {
        f"{BEFORE}, killed after step {len(killed)}": (1, killed, "#0072b2", "o"),
        f"{AFTER}, the same command with another tp": (CHECKPOINT + 1, resumed, "#d55e00", "s"),
    }
    above.plot(range(1, len(reference) + 1), reference, color="#bbbbbb", linewidth=7, label="1 rank, never stopped")
    for label, (start, values, colour, marker) in parts.items():
        steps = range(start, start + len(values))
        how = {"color": colour, "marker": marker, "markersize": 7 if start == 1 else 3, "linewidth": 1.5}
        how |= {"markerfacecolor": "none"} if start == 1 else {}  # what lies behind the second part is seen
        above.plot(steps, values, label=label, **how)
        apart = distances(values, reference[start - 1 : start - 1 + len(values)])
        below.plot(steps, on_log_axis(apart), **how)
    for axes in (above, below):
        axes.axvline(CHECKPOINT + 0.5, color="black", linestyle="--", linewidth=1)
        axes.axvspan(CHECKPOINT + 0.5, len(killed) + 0.5, color="#dddddd", zorder=0)
    above.text(CHECKPOINT, above.get_ylim()[0] * 1.01, f"checkpoint of step {CHECKPOINT} ", ha="right", va="bottom")
    above.text(CHECKPOINT + 1, above.get_ylim()[1] * 0.97, "lost, and\ntaken again", va="top")
    above.set(ylabel="training loss, nats per token")
    above.set_title("Killed, and resumed on another mesh: the same curve", loc="left", size=12, weight="bold")
    above.legend()
    below.set(yscale="log", xlabel="optimizer step", ylabel="|loss - that of 1 rank| / that", ylim=(1e-9, 1e-4))
    below.axhline(1e-5, color="black", linewidth=1)
    below.text(1, 1.2e-5, "1e-5: what the tests allow", va="bottom", size=10)
    return save(figure, path)


def resume(path: Path) -> str:
    """Train, unless --again, and write the losses beside the picture; beside them the run that was never stopped."""
    losses = kept_losses(path, killed_and_resumed)
    reference = json.loads(path.with_name("loss_by_mesh.json").read_text())["losses"]["1 rank"]
    draw_resume(losses, reference, path)
    rows = [["1 rank", 1, len(reference), f"{reference[-1]:.4f}"]]
    rows += [[BEFORE, 1, len(losses["killed"]), f"{losses['killed'][-1]:.4f}"]]
    rows += [[AFTER, CHECKPOINT + 1, CHECKPOINT + len(losses["resumed"]), f"{losses['resumed'][-1]:.4f}"]]
    return table(["mesh", "from step", "to", "last loss"], rows, 3)


# ---------------------------------------------------------------------------------------------------------------------


def save(figure: Figure, path: Path) -> Figure:
    """As PNG in 64 colours, which is a third of the bytes."""
    figure.savefig(path, facecolor="white")
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    plt.close(figure)
    return figure


PICTURES = {
    "grid": grid,
    "column_row": column_row,
    "collectives": collectives,
    "fsdp_block": fsdp_block,
    "block": block,
    "memory_by_mesh": memory_by_mesh,
    "loss_by_mesh": loss_by_mesh,
    "resume": resume,
    "tokens_by_tp": tokens_by_tp,
    "memory_by_tp": memory_by_tp,
}
TRAINS = ("loss_by_mesh", "resume")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    names = [word for word in sys.argv[1:] if word != "--again"]
    for name in names or [name for name in PICTURES if name not in TRAINS]:
        if name not in PICTURES:
            sys.exit(f"no picture {name}: there are {', '.join(PICTURES)}")
        print(PICTURES[name](path := FOLDER / f"{name}.png"))
        print(f"wrote docs/pictures/{path.name}, {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()
