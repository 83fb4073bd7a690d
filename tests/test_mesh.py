"""Law 1: the mesh does not change the result. The real training loop, on every mesh, against one rank.

Kernels round differently from CPU to CPU, and the tolerances are to hold on any. Other machines are imitated by
running the tests again with ATEN_CPU_CAPABILITY=default or =avx2 (PyTorch's own kernels), with DNNL_MAX_CPU_ISA=AVX2
(bf16 matrix products) or with MKL_CBWR=COMPATIBLE (float32 ones) in the environment; each with a
TORCHINDUCTOR_CACHE_DIR of its own, as the compiler's cache does not tell them apart.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import configs
import data
import model
import train

STEPS = 20
SIZES = {
    "model.hidden_size": 48,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 12,
    "model.num_key_value_heads": 4,
    "data.tokenizer_vocab_size": 300,
    "data.seq_len": 32,
    "optim.lr": 3e-3,
    "optim.warmup_steps": 5,
    "optim.eps": 1e-4,  # far above the rounding of a gradient, which Adam would otherwise blow up to a step of lr
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
}
# What the cases rely on: all other keys may come from --override.
LAW = {"train.steps": STEPS, "train.log_every": 1, "train.eval_every": 10, "parallel.param_dtype": "float32"}


def batches_with_gaps(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
    """The real rows of each step, but the first two of a global batch are all padding.

    With four data-parallel ranks or a micro-batch of 1 or 2, some rank then has micro-batches without any target.
    """
    for batch in real_global_batches(*arguments, **options):
        rows = batch.clone()
        rows[:2] = data.PADDING
        yield rows


real_global_batches = data.global_batches


def run_training(arguments: list[str], cache: str) -> None:
    """On each rank: the training loop as `train.py` runs it, in the process group that is already there."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    chunk = 23 * 384 if dist.get_world_size() > 1 else model.LOGITS_AT_ONCE  # 23 rows of logits at once, against all
    gaps = mock.patch.object(data, "global_batches", batches_with_gaps)
    chunks = mock.patch.object(model, "LOGITS_AT_ONCE", chunk)
    with gaps, chunks, contextlib.redirect_stdout(io.StringIO()):
        for _ in train.train(configs.load(arguments), torch.device("cpu")):
            pass


class Runs:
    """Runs the training loop and remembers the result of each (world size, overrides)."""

    def __init__(self, ranks, corpus: Path, folder: Path, overrides=None):
        self.ranks, self.corpus, self.folder, self.overrides, self.done = ranks, corpus, folder, overrides, {}

    def __call__(self, world: int, **overrides) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """metrics.jsonl and the final parameters. Keys are written with __ for the dot."""
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        name = f"run{len(self.done)}"
        if (found := self.done.get((world, str(keys)))) is None:
            own = {**LAW, "data.dataset": str(self.corpus), "run.dir": str(self.folder / name), **keys}
            values = SIZES | (self.overrides.beside(own) if self.overrides else {}) | own
            (self.folder / "empty.toml").write_text("")
            arguments = [str(self.folder / "empty.toml")]
            arguments += [f"--{key}={configs.toml_value(value)}" for key, value in values.items()]
            self.ranks(world, run_training, arguments, str(self.folder / "cache"))
            found = self.read(Path(values["run.dir"]))
            self.done[world, str(keys)] = found
        return found

    def read(self, run_dir: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
        from generate import load_run

        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        model, _, _ = load_run(run_dir, torch.device("cpu"))
        return lines, model.state_dict()


@pytest.fixture(scope="session")
def runs(ranks, corpus, tmp_path_factory, overrides) -> Runs:
    return Runs(ranks, corpus, tmp_path_factory.mktemp("runs"), overrides)


def worst_difference(ours: list[dict], reference: list[dict], key: str) -> float:
    """Largest relative difference of a metric over all lines that have it."""
    pairs = [(a[key], b[key]) for a, b in zip(ours, reference, strict=True) if key in b]
    assert pairs
    return max(abs(a - b) / abs(b) for a, b in pairs)


def assert_same(ours, reference, tolerance: float = 1e-5) -> None:
    """Law 1's tolerance: float32 sums in another order, over 20 steps. What was measured is a twentieth of it.

    Before the first step of Adam only the sums differ, by an ulp or two of 6e-8: a run's first line holds to 1e-6.
    """
    (lines, parameters), (reference_lines, reference_parameters) = ours, reference
    if reference_lines[0]["step"] == 1:
        for key in ("loss", "grad_norm"):
            assert worst_difference(lines[:1], reference_lines[:1], key) < 1e-6, f"{key} of step 1"
    for key in ("loss", "grad_norm", "val_loss"):
        assert worst_difference(lines, reference_lines, key) < tolerance, key
    for key in ("step", "tokens", "val_tokens"):
        assert [line.get(key) for line in lines] == [line.get(key) for line in reference_lines]
    # As shares of the longest way that Adam could have gone. An ulp of a norm's weight, near 1, is 4e-6 of it, 1.2e-5
    # where only the last ten steps are compared, and more was not seen: a gradient's rounding, some 1e-9, moves an
    # element by at most 1e-9 / eps = 1e-5.
    path = sum(line["lr"] for line in reference_lines if "lr" in line)
    for name, theirs in reference_parameters.items():
        difference = (parameters[name] - theirs).abs()
        assert difference.max() < 1e-4 * path, name
        assert difference.mean() < 1e-5 * path, name


MESHES = {
    "tp2": (2, {"parallel__tp": 2}),
    "tp4": (4, {"parallel__tp": 4}),
    "dp2": (2, {"parallel__tp": 1}),
    "dp4": (4, {"parallel__tp": 1}),
    "dp2 x tp2": (4, {"parallel__tp": 2}),
    "hsdp 2 x 1": (2, {"parallel__tp": 1, "parallel__dp_replicate": 2}),
    "hsdp 2 x 2": (4, {"parallel__tp": 1, "parallel__dp_replicate": 2}),
    "hsdp 2 x 1 x tp2": (4, {"parallel__tp": 2, "parallel__dp_replicate": 2}),
}
# Each mesh meets two micro-batches; checkpointing and resharding go round so that each meets 1-D, 2-D and HSDP meshes.
# TP is slow where ranks share two cores, so the meshes with it have larger ones, and fewer micro-steps.
LARGER = {"tp2": (2, 4), "tp4": (4, 8), "dp2 x tp2": (2, 4), "hsdp 2 x 1 x tp2": (2, 4)}
CASES = [
    (mesh, LARGER.get(mesh, (1, 2))[turn], ("none", "selective", "full")[i % 3], bool(i % 2))
    for i, (mesh, turn) in enumerate((mesh, turn) for turn in (0, 1) for mesh in MESHES)
]


@pytest.mark.parametrize(("mesh", "micro_batch", "checkpointing", "reshard"), CASES)
def test_the_mesh_does_not_change_the_result(runs, mesh, micro_batch, checkpointing, reshard):
    world, parallel = MESHES[mesh]
    ours = runs(
        world,
        train__micro_batch_size=micro_batch,
        parallel__activation_checkpointing=checkpointing,
        parallel__reshard_after_forward=reshard,
        **parallel,
    )
    assert_same(ours, runs(1))


# From a 2 x 2 mesh to each of these: mesh, micro-batch.
MOVES = [("tp2", 8), ("tp4", 4), ("dp2", 4), ("dp4", 1), ("dp2 x tp2", 2), ("hsdp 2 x 2", 2), ("hsdp 2 x 1 x tp2", 4)]


@pytest.mark.parametrize(("mesh", "micro_batch"), [*MOVES, ("one rank", 8)])
def test_a_run_goes_on_as_it_was_on_any_other_mesh(runs, mesh, micro_batch):
    """Law 2 on another mesh: weights, moments and data order move along; the last ten steps are those of one rank."""
    half = STEPS // 2
    first = {"parallel__tp": 2, "train__micro_batch_size": 4, "checkpoint__every": half}
    runs(4, run__dir=str(runs.folder / "moving"), **first)
    world, parallel = MESHES.get(mesh, (1, {}))
    resume = {"checkpoint__resume": str(runs.folder / f"moving/checkpoints/step_{half:08d}")}
    lines, parameters = runs(world, train__micro_batch_size=micro_batch, **resume, **parallel)
    reference_lines, reference_parameters = runs(1)
    assert [line["step"] for line in lines if "loss" in line] == list(range(half + 1, STEPS + 1))
    assert_same((lines, parameters), ([line for line in reference_lines if line["step"] > half], reference_parameters))


KV = {"model__num_key_value_heads": 3}
MASK = {"data__layout": "pack", "data__document_mask": True}
OTHER_MODELS = [
    ("3 kv heads, tp2", 2, {**KV, "parallel__tp": 2}),
    ("3 kv heads, tp4", 4, {**KV, "parallel__tp": 4, "parallel__activation_checkpointing": "selective"}),
    ("3 kv heads, dp2 x tp2", 4, {**KV, "parallel__tp": 2, "parallel__activation_checkpointing": "full"}),
    ("2 kv heads, tp4", 4, {"model__num_key_value_heads": 2, "parallel__tp": 4}),
    ("tied, tp2", 2, {"model__tie_word_embeddings": True, "parallel__tp": 2}),
    ("tied, dp2", 2, {"model__tie_word_embeddings": True, "parallel__tp": 1}),
    ("tied, dp2 x tp2", 4, {"model__tie_word_embeddings": True, "parallel__tp": 2}),
    ("packed, dp2 x tp2", 4, {"data__layout": "pack", "parallel__tp": 2}),
    ("packed, dp4", 4, {"data__layout": "pack", "parallel__tp": 1}),
    ("document mask, dp2 x tp2", 4, {**MASK, "parallel__tp": 2, "parallel__activation_checkpointing": "full"}),
    ("document mask, dp4", 4, {**MASK, "parallel__tp": 1, "parallel__activation_checkpointing": "selective"}),
    ("document mask, tp2, compiled", 2, {**MASK, "parallel__tp": 2, "parallel__compile": True}),
]


@pytest.mark.parametrize(("world", "changes"), [case[1:] for case in OTHER_MODELS], ids=[c[0] for c in OTHER_MODELS])
def test_other_models_and_layouts_hold_law_1_too(runs, world, changes):
    alone = {key: value for key, value in changes.items() if not key.startswith("parallel")}
    micro_batch = 8 // (2 * world // changes["parallel__tp"])  # two micro-steps a step
    assert_same(runs(world, train__micro_batch_size=micro_batch, **changes), runs(1, **alone))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(("world", "tp"), [(1, 1), (4, 2)], ids=["one rank", "dp2 x tp2"])
def test_compiled_blocks_compute_the_same(runs, world, tp, checkpointing):
    """The compiler fuses and reorders float32 arithmetic: the same tolerance holds."""
    compiled = {"parallel__compile": True, "parallel__activation_checkpointing": checkpointing}
    assert_same(runs(world, parallel__tp=tp, train__micro_batch_size=4, **compiled), runs(1))


LONG = {"train__steps": 50, "train__eval_every": 0}
BF16 = {**LONG, "parallel__param_dtype": "bfloat16"}


def tail(run: tuple[list[dict], dict]) -> float:
    """Mean loss of the last ten steps, since single losses vary with the rows."""
    losses = [line["loss"] for line in run[0] if "loss" in line]
    assert len(losses) == 50
    return sum(losses[-10:]) / 10


def assert_within_noise(loss: float, alone: list[float]) -> None:
    """Twice the spread of runs on one rank, and at least 1e-3, as four runs can lie close together by chance.

    On four kinds of CPU the spread was 4e-4 of the loss, and no mesh further away than 3e-4.
    """
    center = sum(alone) / len(alone)
    assert abs(loss - center) < max(2 * (max(alone) - min(alone)), 1e-3 * center), f"{loss} against {alone}"


def test_bf16_differs_between_meshes_by_no_more_than_its_noise(runs):
    """The noise is measured: the spread, on one rank, of runs that only differ in their micro-batch.

    They compute the same sums in another order, as meshes do.
    """
    alone = [tail(runs(1, **BF16, train__micro_batch_size=size)) for size in (8, 4, 2, 1)]
    assert max(alone) > min(alone)
    for world, tp in ((2, 2), (2, 1), (4, 2)):
        assert_within_noise(tail(runs(world, **BF16, parallel__tp=tp, train__micro_batch_size=4)), alone)
    float32, center = tail(runs(1, **LONG)), sum(alone) / len(alone)
    assert abs(center - float32) < 2e-3 * float32, "bf16 rounds to 8 bits, 4e-3, and most of it averages out"
