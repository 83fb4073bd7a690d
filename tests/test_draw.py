"""The pictures of docs/: that they show what the code does, and the commands of docs/mesh.md.

Each is drawn anew. What it shows is compared with another source: real ranks, the report, the losses of real runs.
"""

import contextlib
import json
import math
import re
import shlex
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import configs
import data
import explain
import parallel
import train
from benchmarks.lines import ROOT
from benchmarks.published import ROWS
from cost.choose import candidates, with_values
from cost.hardware import known, named
from cost.predict import predict
from cost.record import Report, block_of
from cost.text import size_text
from docs import draw
from docs import report as report_page

PAGE = (ROOT / "docs" / "mesh.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^python .*$", PAGE, re.MULTILINE)]
TINY = ["--model.num_hidden_layers=2", "--model.vocab_size=4096", "--train.micro_batch_size=2"]
H100 = named("h100")


@pytest.fixture(scope="module")
def config():
    return explain.load(TINY, 4, 4)


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def is_picture(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and 0 < path.stat().st_size < 100_000


def test_each_tp_has_its_fastest_that_fits(config, tmp_path):
    """Of all candidates: to take the last of an order for the first would show here."""
    every = list(candidates(config, 2, 2, H100, train.make_optimizer))
    best = draw.best_by_tp(config, 2, H100)
    assert list(best) == [1, 2]
    for tp, choice in best.items():
        assert choice.prediction.fits
        assert 0 < choice.prediction.tokens_per_second < math.inf
        assert choice.rank() == min(each.rank() for each in every if each.key[0] == tp)
    made = SimpleNamespace(tokens_per_second=6000.0)
    draw.draw_tokens({2: best, 4: best}, [(ROWS[0], made), (ROWS[1], made)], tmp_path / "tokens.png")
    assert is_picture(tmp_path / "tokens.png")


def test_memory_is_positive_and_its_parts_add_up_to_what_is_predicted(config, tmp_path):
    found = {kept: draw.gib_by_tp(config, 4, H100, (1, 2), kept) for kept in ("none", "full")}
    for kept, by_tp in found.items():
        for tp, parts in by_tp.items():
            assert all(0 < gib < math.inf for gib in parts.values())
            report = explain.explain(with_values(config, tp, 2, kept), 4, train.make_optimizer, H100.memory_gib)
            assert sum(parts.values()) == pytest.approx(predict(report, H100, 4).memory_gib)
    draw.draw_memory(found, H100, tmp_path / "memory.png")
    assert is_picture(tmp_path / "memory.png")


def test_the_published_runs_are_those_of_8b_on_one_kind_of_gpu(monkeypatch):
    monkeypatch.setattr(draw.published, "prediction_of", lambda row, config: row.gpus)
    found = [(row.gpus, row.tp, row.tokens, made) for row, made in draw.beside_published()]
    assert found == [(8, 1, 6667, 8), (128, 1, 6514, 128), (64, 8, 4378, 64)]


def test_a_picture_that_does_not_exist_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw.py", "tokens_by_pp"])
    with pytest.raises(SystemExit, match="no picture tokens_by_pp: there are grid, column_row, "):
        draw.main()


def test_the_page_shows_its_two_pictures():
    assert sorted(re.findall(r"\]\(pictures/(\w+)\.png\)", PAGE)) == ["memory_by_tp", "tokens_by_tp"]


def test_every_picture_is_there_and_there_is_no_other():
    assert {path.stem for path in draw.FOLDER.glob("*.png")} == set(draw.PICTURES)
    assert all(is_picture(draw.FOLDER / f"{name}.png") for name in draw.PICTURES)


def test_without_a_name_all_are_drawn_that_need_no_training(monkeypatch, tmp_path):
    drawn = []
    pictures = {name: lambda path: drawn.append(path.stem) or path.touch() for name in draw.PICTURES}
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    monkeypatch.setattr(draw, "PICTURES", pictures)
    monkeypatch.setattr(sys, "argv", ["draw.py"])
    draw.main()
    assert drawn == [name for name in pictures if name not in ("loss_by_mesh", "resume")]


# ---------------------------------------------------------------------------------------------------------------------
# grid: against four real ranks


class OneFile:
    """A source whose rows hold their own number."""

    window, first_window, counts = 0, 0, [16]

    def prepare(self, files, upcoming, step, meet):
        return self.counts

    def open(self, file):
        return SimpleNamespace(row=lambda row: (np.full(2, row), np.full(2, row)))


def rows_and_owners(arguments: list[str]) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """Where the rows that a real rank trains on stand in the global batch, and of each number of a weight the rank."""
    config = configs.settle(configs.load(arguments), 4096, None)
    model, mesh = draw.parallelized(config)
    model.to_empty(device="cpu")
    size, micro, seed = config.train.global_batch_size, config.train.micro_batch_size, config.train.seed
    batch = data.rows_of_step(OneFile(), 1, size, seed).tolist()
    order = (OneFile(), 1, 1, size, micro, seed, *parallel.dp_rank_and_size(mesh))
    with data.batches(*order, num_workers=0, device=torch.device("cpu")) as batches:
        rows = [[batch.index(row) for row in inputs[:, 0].tolist()] for inputs, _ in batches]
    owners = {}
    for name in draw.CUT:
        weight = model.model.layers[0].self_attn.get_submodule(name).weight.detach()
        weight.to_local().fill_(dist.get_rank())
        owners[name] = weight.full_tensor().int().tolist()
    return rows, owners


def test_rows_and_slices_of_the_grid_are_those_of_four_real_ranks(ranks):
    real = ranks(4, rows_and_owners, draw.GRID)
    cells = draw.cells(4)
    assert [cell.rows for cell in cells] == [rows for rows, _ in real]
    for name in draw.CUT:
        owners = torch.tensor(real[0][1][name])
        for cell in cells:
            top, bottom, left, right = cell.slices[name]
            assert (owners[top:bottom, left:right] == cell.rank).all()
            assert (owners == cell.rank).sum() == (bottom - top) * (right - left)


def test_the_grid_says_of_eight_ranks_which_rows_they_see(tmp_path):
    cells = draw.cells()
    figure = draw.draw_grid(cells, tmp_path / "grid.png")
    text = words(figure)
    for cell in cells:
        assert {tuple(other.rows[0]) for other in cells if other.dp == cell.dp} == {tuple(cell.rows[0])}
        assert text.count(f"rank {cell.rank}") == 1 + len(draw.CUT)
        assert f"rows {cell.rows[0][0]}-{cell.rows[0][-1]}, {cell.rows[1][0]}-{cell.rows[1][-1]}" in text
        assert f"ranks {2 * cell.dp}, {2 * cell.dp + 1}" in text
    assert sorted(row for cell in cells for rows in cell.rows for row in rows) == sorted([*range(16)] * 2)
    assert is_picture(tmp_path / "grid.png")


# ---------------------------------------------------------------------------------------------------------------------
# column_row, collectives: against two real ranks


def real_pair(a: list[list[int]], b: list[list[int]], x: list[list[int]]) -> tuple[list, list, list]:
    """What a rank has between two real linear layers, behind them, and after the sum."""
    weights = [torch.tensor(matrix, dtype=torch.float32) for matrix in (a, b)]
    layers = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        for layer, matrix in zip((layers[0], layers[2]), weights, strict=True):
            layer.weight.copy_(matrix.T)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(output_layouts=Shard(0))}
    parallelize_module(layers, init_device_mesh("cpu", (2,)), plan)
    seen = []
    layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    layers[2].register_forward_hook(lambda module, inputs, output: seen.append(output.to_local()), prepend=True)
    seen.append(layers(torch.tensor(x, dtype=torch.float32)))
    return tuple(value.int().tolist() for value in seen)


def test_the_pair_of_matrices_has_the_numbers_of_two_real_ranks(ranks, tmp_path):
    found = draw.pair()
    real = ranks(2, real_pair, *(found[name].tolist() for name in ("A", "B", "x")))
    for rank, (inner, partial, own) in enumerate(real):
        assert found["inner"][rank].tolist() == inner
        assert found["partial"][rank].tolist() == partial
        assert found["sum"][[rank]].tolist() == own, "reduce-scatter gives each rank its token"
    assert torch.equal(found["sum"], found["y"])
    assert not torch.equal(found["partial"][0], found["y"])
    shown = Counter(
        word for word in words(draw.draw_pair(found, tmp_path / "pair.png")) if re.fullmatch(r"-?\d+", word)
    )
    several = (
        (found["x"],) * 3,
        (found["A"],) * 2,
        (found["h"],) * 2,
        (found["B"],) * 2,
        found["partial"],
        (found["y"],) * 2,
    )
    assert shown == Counter(str(number) for group in several for each in group for number in each.flatten().tolist())
    assert is_picture(tmp_path / "pair.png")


def collect(before: dict[str, list[list[int]]]) -> dict[str, list[int]]:
    rank, after = dist.get_rank(), {}
    for kind, numbers in before.items():
        own = torch.tensor(numbers[rank])
        if kind == "all-gather":
            dist.all_gather_into_tensor(result := torch.zeros(2 * len(own), dtype=own.dtype), own)
        elif kind == "reduce-scatter":
            dist.reduce_scatter_tensor(result := torch.zeros(len(own) // 2, dtype=own.dtype), own)
        else:
            dist.all_reduce(result := own.clone())
        after[kind] = result.tolist()
    return after


def test_the_collectives_leave_what_two_real_ranks_have_afterwards(ranks, tmp_path):
    found = draw.four_numbers()
    assert list(found) == ["all-gather", "reduce-scatter", "all-reduce"]
    real = ranks(2, collect, {kind: before for kind, (before, _) in found.items()})
    for kind, (_, after) in found.items():
        assert after == [own[kind] for own in real]
    text = words(draw.draw_collectives(found, tmp_path / "collectives.png"))
    assert set(found) <= set(text)
    numbers = Counter(str(number) for states in found.values() for state in states for row in state for number in row)
    assert numbers == Counter(word for word in text if word.isdigit())
    assert is_picture(tmp_path / "collectives.png")


# ---------------------------------------------------------------------------------------------------------------------
# fsdp_block: against a micro-step of two real ranks


def real_life(arguments: list[str]) -> tuple[list[tuple[str, int]], list[list[int]]]:
    """What happens in its order, and at the start of each block which blocks are whole: with hooks and wrappers."""
    config = configs.settle(configs.load(arguments), 1024, None)
    model, _ = draw.parallelized(config)
    model.to_empty(device="cpu")
    model.init_weights(0, parallel.place_shard)
    events, whole = [], []
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in model.model.layers]

    def starts(what, layer):
        events.append((what, layer))
        blocks = enumerate(model.model.layers)
        whole.append([i for i, block in blocks if not any(isinstance(w, DTensor) for w in block.parameters())])

    def listened(kind, function):
        def call(*args, **kwargs):
            size = max(each.numel() for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
            events.append((kind, int(size == sizes[0])))
            return function(*args, **kwargs)

        return call

    for layer, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda module, inputs, layer=layer: starts("forward", layer))
        block.register_forward_hook(
            lambda module, inputs, output, layer=layer: (
                output.register_hook(lambda _: starts("backward", layer)) and None
            )
        )
    names = {"all_gather_single": "all-gather", "all_gather_into_tensor": "all-gather"}  # the first from torch 2.12 on
    names |= {"reduce_scatter_single": "reduce-scatter", "reduce_scatter_tensor": "reduce-scatter"}
    with contextlib.ExitStack() as stack:
        for name, kind in names.items():
            if function := getattr(dist, name, None):
                stack.enter_context(mock.patch.object(dist, name, listened(kind, function)))
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        model(tokens, tokens).backward()
    return events, whole


@pytest.fixture(scope="module")
def life():
    return draw.life_of_blocks()


def test_the_life_of_blocks_has_the_order_of_a_real_micro_step(ranks, life):
    """Of the collectives a real rank hears only for how many numbers they are: for a block (1) or the rest (0)."""
    events, _ = life
    for real, whole in ranks(2, real_life, draw.LIFE):
        layer = {part: i - 1 for i, part in enumerate(life[1])}
        drawn = [
            (what, layer[part] if what in draw.RUNS else int(bool(part))) for what, part in events if what != "free"
        ]
        assert [event for event in drawn if event[0] not in draw.RUNS or event[1] >= 0] == real
        runs = [(what, part) for what, part in events if what in draw.RUNS and part]
        assert whole == [[layer[part]] for _, part in runs], "each block is whole alone"


def test_each_block_is_gathered_run_and_freed_in_forward_and_again_in_backward(life):
    events, sizes = life
    rest, *blocks = sizes
    for part in blocks:
        own = [what for what, of in events if of == part]
        again = ["all-gather", "backward", "free", "reduce-scatter"]
        assert own == ["all-gather", "forward", "free", *again]
    assert [what for what, of in events if of == rest and what not in draw.RUNS] == [
        "all-gather",
        "free",
        "reduce-scatter",
    ]


def test_the_timeline_keeps_the_order_and_runs_nothing_without_its_weights(life, tmp_path):
    events, sizes = life
    bars, memory = draw.schedule(events)
    for lane in (draw.RUNS, ("all-gather", "reduce-scatter")):
        own = [bar for bar in bars if bar.what in lane]
        assert all(before.end <= after.start for before, after in pairwise(own))
    for run in (bar for bar in bars if bar.what in draw.RUNS):
        gathers = [bar for bar in bars if bar.what == "all-gather" and bar.part == run.part and bar.end <= run.start]
        frees = [moment for moment, what, part in memory if what == "free" and part == run.part]
        assert gathers
        assert not [moment for moment in frees if gathers[-1].start < moment < run.end]
    for part in list(sizes)[2:]:
        before = next(
            bar for bar in bars if bar.what == "forward" and bar.part == list(sizes)[list(sizes).index(part) - 1]
        )
        gather = next(bar for bar in bars if bar.what == "all-gather" and bar.part == part)
        assert before.start <= gather.start < before.end, "it goes beside the block before"
    held = [nbytes for _, nbytes in draw.held(memory, sizes)]
    assert held[-1] == 0
    assert max(held) == sizes[""] + 2 * sizes["model.layers.0"] < sum(sizes.values())
    figure = draw.draw_life(events, sizes, tmp_path / "life.png")
    text = words(figure)
    assert {"compute", "communication", "forward", "backward", "all-gather of weights", "free rest"} <= set(text)
    assert any("lengths are not to scale" in line for line in text)
    assert len([p for p in figure.axes[0].patches if isinstance(p, Rectangle)]) == len(bars)
    assert is_picture(tmp_path / "life.png")


# ---------------------------------------------------------------------------------------------------------------------
# block, memory_by_mesh: against the report


PAGES = {  # arguments, ranks
    "one rank": (["--parallel.tp=1"], 1),
    "two by two": (["--parallel.tp=2"], 4),
    "hsdp, full": (["--parallel.tp=2", "--parallel.dp_replicate=2", "--parallel.activation_checkpointing=full"], 4),
    "many": (["--parallel.tp=8", "--train.global_batch_size=512", "--model.num_key_value_heads=8"], 512),
}


def report_of(name: str) -> Report:
    arguments, world = PAGES[name]
    small = [] if "global_batch_size" in str(arguments) else ["--train.micro_batch_size=2"]
    config = explain.load([*arguments, *small], world, world)
    return explain.explain(config, world, train.make_optimizer, quick=True)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_has_every_shape_collective_and_size_of_the_block(name, tmp_path):
    report = report_of(name)
    text = words(report_page.draw(report, tmp_path / "page.png"))
    (block,) = report.blocks
    for module in report_page.modules_of(report, block):
        assert module.rpartition(".")[2] in text
        if (row := report.weights.get(module)) and row[1] != "-":
            whole, local = (str(tuple(shape)) for shape in (row[1], row[3]))
            assert {f"of {whole}", local} <= set(text)
        _, (shape, layout), _, _ = report.activations[module]
        said = "" if layout == "-" else layout
        assert any(line.startswith(f"{tuple(shape)} ") and line.endswith(said) for line in text)
    of_block = [call for call in report.collectives if block_of(call.module) == block]
    again = Counter(("again: " * (call.phase == "recompute") + call.kind) for call in of_block)
    assert {kind: text.count(kind) for kind in again} == again
    sizes = Counter(f"{call.axis} {size_text(call.nbytes)}" for call in of_block)
    assert {size: text.count(size) for size in sizes} == sizes
    assert {size_text(report.memory[key]) for key in report_page.BARS} <= set(text)
    assert bool(of_block) == (PAGES[name][1] > 1)
    assert ("recompute" in {call.phase for call in of_block}) == (name == "hsdp, full")


def test_the_page_of_many_ranks_leaves_some_out_and_says_so(tmp_path):
    text = words(report_page.draw(report_of("many"), tmp_path / "page.svg"))
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")
    assert {"tp 7", "dp_shard 63", "504", "511", "..."} <= set(text)
    assert not {"tp 5", "dp_shard 40"} & set(text)


def test_of_several_kinds_of_block_the_page_shows_the_first_and_says_so(tmp_path):
    report = report_of("two by two")
    kinds = {"model.layers.0": ([0, 2], "causal"), "model.layers.1": ([1, 3], "Window(size=8)")}
    text = words(report_page.draw(replace(report, blocks=kinds), tmp_path / "page.png"))
    assert "the first of 2 kinds: layers 0, 2 of 4; mask causal" in text


def test_nothing_on_a_page_leaves_it(tmp_path):
    figure = report_page.draw(report_of("hsdp, full"), tmp_path / "page.png")
    canvas = FigureCanvasAgg(figure).get_renderer()
    for text in figure.axes[0].texts:
        box = text.get_window_extent(canvas)
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text.get_text()
        assert box.y0 >= 0 and box.y1 <= figure.bbox.height, text.get_text()


def test_bars_of_memory_add_up_to_what_is_predicted_and_fall_as_the_mesh_cuts(monkeypatch, tmp_path):
    monkeypatch.setattr(draw, "MEMORY", TINY)
    found = draw.gib_by_mesh()
    for mesh, (world, tp) in draw.MESHES.items():
        config = explain.load([*TINY, f"--parallel.tp={tp}"], world, world)
        made = predict(explain.explain(config, world, train.make_optimizer, H100.memory_gib), H100, world)
        assert sum(found[mesh].values()) == pytest.approx(made.memory_gib)
    for part in ("parameters", "AdamW's moments"):
        for mesh, (world, _) in draw.MESHES.items():
            assert found[mesh][part] == pytest.approx(found["1 rank"][part] / world, rel=0.01)
    kept = "activations kept for backward"
    assert found["dp 4"][kept] == pytest.approx(found["1 rank"][kept])
    assert found["tp 4"][kept] < found["tp 2"][kept] < found["dp 2"][kept]
    figure = draw.draw_memory_by_mesh(found, 256, tmp_path / "memory.png")
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sorted(heights) == pytest.approx(sorted(gib for parts in found.values() for gib in parts.values()))
    assert {f"{sum(parts.values()):.1f}" for parts in found.values()} <= set(words(figure))
    assert is_picture(tmp_path / "memory.png")


# ---------------------------------------------------------------------------------------------------------------------
# loss_by_mesh


@pytest.fixture(scope="module")
def kept():
    return json.loads((draw.FOLDER / "loss_by_mesh.json").read_text())


def test_the_losses_of_five_meshes_are_kept_and_equal_to_1e_5(kept):
    """Law 1's tolerance. Real differences, not the same run five times: some step differs on each mesh."""
    losses = kept["losses"]
    assert list(losses) == list(draw.TRAINED) == ["1 rank", "dp 2", "tp 2", "dp 2 x tp 2", "tp 4"]
    steps = int(re.search(r"--train\.steps=(\d+)", " ".join(draw.RUN))[1])
    assert {len(values) for values in losses.values()} == {steps}
    assert losses["1 rank"][-1] < 0.7 * losses["1 rank"][0]
    for values in draw.differences(losses).values():
        assert 0 < max(values) < 1e-5
    for mesh, command in kept["commands"].items():
        ranks, tp = draw.MESHES[mesh]
        assert {f"--nproc_per_node={ranks}", f"--parallel.tp={tp}", *draw.RUN} <= set(command.split())


def test_the_drawn_lines_are_the_kept_losses_and_their_differences(kept, tmp_path):
    losses = kept["losses"]
    figure = draw.draw_losses(losses, tmp_path / "losses.png")
    above, below = figure.axes
    assert [list(line.get_ydata()) for line in above.lines] == list(losses.values())
    drawn = [np.nan_to_num(np.array(line.get_ydata())) for line in below.lines if line.get_label() in losses]
    first = np.array(losses["1 rank"])
    expected = [np.abs(np.array(values) - first) / first for mesh, values in losses.items() if mesh != "1 rank"]
    assert np.allclose(drawn, expected, rtol=1e-12, atol=0)
    assert below.get_yscale() == "log"
    low, high = below.get_ylim()
    assert all(low < value < high for values in expected for value in values[values > 0])
    assert [text.get_text().split(" (")[0] for text in above.get_legend().get_texts()] == list(losses)
    assert is_picture(tmp_path / "losses.png")


def test_a_training_of_two_meshes_keeps_what_their_runs_have_logged(monkeypatch, corpus, tmp_path):
    tiny = [
        "--model.hidden_size=32",
        "--model.intermediate_size=32",
        "--model.num_hidden_layers=1",
        "--data.seq_len=16",
    ]
    tiny += ["--model.num_attention_heads=4", "--model.num_key_value_heads=2", "--data.tokenizer_vocab_size=300"]
    tiny += [f"--data.dataset={corpus}", "--train.steps=3", "--optim.warmup_steps=1"]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(draw, "RUN", tiny)
    monkeypatch.setattr(draw, "TRAINED", ("1 rank", "tp 2"))
    monkeypatch.setattr(sys, "argv", ["draw.py"])
    text = draw.loss_by_mesh(tmp_path / "loss.png")
    losses = json.loads((tmp_path / "loss.json").read_text())["losses"]
    assert {mesh: len(values) for mesh, values in losses.items()} == {"1 rank": 3, "tp 2": 3}
    assert max(draw.differences(losses)["tp 2"]) < 1e-5
    assert f"{losses['1 rank'][0]:.4f}" in text
    trained = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr(draw, "trained", trained)
    monkeypatch.setattr(sys, "argv", ["draw.py", "--again"])
    assert draw.loss_by_mesh(Path(tmp_path / "loss.png")) == text


# ---------------------------------------------------------------------------------------------------------------------
# resume


def test_the_run_that_was_killed_goes_on_from_its_checkpoint_with_the_losses_of_one_that_was_not(kept):
    """Law 2 on another mesh, and law 6: the steps since the checkpoint are taken again."""
    losses, whole = json.loads((draw.FOLDER / "resume.json").read_text())["losses"], kept["losses"]["1 rank"]
    killed, resumed = losses["killed"], losses["resumed"]
    assert len(killed) >= draw.KILLED > draw.CHECKPOINT
    assert draw.CHECKPOINT + len(resumed) == len(whole)
    assert killed == pytest.approx(whole[: len(killed)], rel=1e-5)
    assert resumed == pytest.approx(whole[draw.CHECKPOINT :], rel=1e-5)
    assert resumed != whole[draw.CHECKPOINT :]


def test_the_drawn_run_is_the_kept_one(kept, tmp_path):
    losses, whole = json.loads((draw.FOLDER / "resume.json").read_text())["losses"], kept["losses"]["1 rank"]
    above, below = draw.draw_resume(losses, whole, tmp_path / "resume.png").axes
    parts = {line.get_label(): line for line in above.lines if not line.get_label().startswith("_")}
    assert [list(line.get_ydata()) for line in parts.values()] == [whole, losses["killed"], losses["resumed"]]
    assert [line.get_xdata()[0] for line in parts.values()] == [1, 1, draw.CHECKPOINT + 1]
    first = np.array(whole[draw.CHECKPOINT :])
    drawn = np.nan_to_num(np.array(below.lines[1].get_ydata()))
    assert np.allclose(drawn, np.abs(np.array(losses["resumed"]) - first) / first, rtol=1e-12, atol=0)
    assert is_picture(tmp_path / "resume.png")


# ---------------------------------------------------------------------------------------------------------------------
# The commands of docs/mesh.md


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_of_the_page_is_accepted(command, monkeypatch):
    """What it prints takes a minute for all; here its files exist and its keys are valid together."""
    monkeypatch.chdir(ROOT)
    assert (ROOT / command[1]).exists()
    if command[1] == "explain.py":
        tools = ("--world-size=", "--local-world-size=", "--gpu=", "--node-link-gbps=", "--choose", "--json")
        options = dict(word.partition("=")[::2] for word in command if word.startswith(tools))
        arguments = [word for word in command[2:] if not word.startswith(tools)]
        explain.load(arguments, int(options["--world-size"]), int(options.get("--local-world-size", 8)))
        assert options.get("--gpu", "h100") in known()


def test_there_are_commands():
    assert len(COMMANDS) > 5
