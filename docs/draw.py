"""Draw the pictures of docs/mesh.md from what explain.py predicts: `python docs/draw.py [tokens_by_tp|memory_by_tp]`.

It needs no GPU, and about a minute. The numbers in each picture are printed too.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))
import explain
import train
from benchmarks import published
from configs import Config
from cost.choose import Choice, candidates, with_values
from cost.hardware import Hardware, named
from cost.predict import USABLE, Prediction, predict
from cost.text import table

FOLDER = Path(__file__).parent / "pictures"
RECIPE, NODE = [str(FOLDER.parents[1] / "configs" / "llama3_8b.toml"), "--parallel.tp=1"], 8
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


def gib_by_tp(config: Config, world: int, gpu: Hardware, tps: Iterable[int], kept: str) -> dict[int, dict[str, float]]:
    """For each tp the GiB of PARTS at the peak, with the configuration's micro-batch and this checkpointing."""
    found = {}
    for tp in tps:
        asked = with_values(config, tp, config.train.micro_batch_size, kept)
        report = explain.explain(asked, world, train.make_optimizer, gpu.memory_gib, quick=True)
        nbytes = predict(report, gpu, min(world, NODE)).bytes
        found[tp] = {part: sum(nbytes[key] for key in keys) / 2**30 for part, (keys, _) in PARTS.items()}
    return found


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


PICTURES = {"tokens_by_tp": tokens_by_tp, "memory_by_tp": memory_by_tp}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        if name not in PICTURES:
            sys.exit(f"no picture {name}: there are {', '.join(PICTURES)}")
        print(PICTURES[name](path := FOLDER / f"{name}.png"))
        print(f"wrote docs/pictures/{path.name}, {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()
