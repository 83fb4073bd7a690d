"""What others have published beside what explain.py predicts for it: `python benchmarks/published.py`.

Each row is our model, plan and step in the shape of theirs. Where their code keeps or sends something else, the row
says so, and that part of ours is replaced for it by theirs (`whole_loss` and so on, below). What is left are
differences that no row can name, such as another RoPE. All rows of a kind of GPU share cost/hardware.toml's constants.
"""

import contextlib
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.utils.checkpoint import CheckpointPolicy

sys.path.insert(0, str(Path(__file__).parent.parent))
import explain
import model
import parallel
import train
from cost.hardware import named
from cost.predict import USABLE, Prediction, predict
from cost.record import Recorder

# ---------------------------------------------------------------------------------------------------------------------
# What others do otherwise


def whole_loss():
    """All logits at once."""
    return mock.patch.object(model, "LOGITS_AT_ONCE", 2**60)


def eager_loss():
    """The cross-entropy is not compiled, though the blocks are."""
    return mock.patch.object(Recorder, "compiles_loss", False)


def norms_in_pieces():
    """RMSNorm is written in Python, so without compiler it is several kernels."""
    return mock.patch.object(Recorder, "norms_are_kernels", False)


def every_second_product():
    """Selective checkpointing that computes every second matrix product of a block again (torchtitan)."""
    counts = Counter()

    def policy(ctx, op, *args, **kwargs):
        counts[ctx.is_recompute] += op == torch.ops.aten.mm.default
        kept = counts[ctx.is_recompute] % 2 if op == torch.ops.aten.mm.default else op in parallel.KEPT_BY_SELECTIVE
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return mock.patch.object(parallel, "selective_policy", policy)


def every_second_block():
    """Selective checkpointing that computes every second block again (torchtitan by layers, fms-fsdp)."""
    turn = Counter()

    def keep(block) -> None:
        turn[0] += 1
        if turn[0] % 2:
            parallel.keep_no_activations(block)

    return mock.patch.object(parallel, "keep_selected_activations", keep)


def gather_for_each_product():
    """TP with an all-gather before each of q, k, v, gate and up (KempnerForge)."""
    plan_of = parallel.block_plan

    def plan(config, tp):
        plan = plan_of(config, tp)
        del plan["self_attn"], plan["mlp"]
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        return plan | {name: ColwiseParallel(input_layouts=parallel.SEQUENCE) for name in names}

    return mock.patch.object(parallel, "block_plan", plan)


# ---------------------------------------------------------------------------------------------------------------------
# What they have published

TITAN = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
ASYNC = "torchtitan benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md"
AGE_OF_A100 = "torchtitan docs/performance.md of 2024 (removed since)"
FMS = "foundation-model-stack/fms-fsdp README.md"
FMS_EAGER = "the same, March 2024"
KEMPNER = "KempnerInstitute/KempnerForge benchmarks/mfu_scaling/mfu_scaling.md"

# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, vocab_size
SHAPES = {
    "3 8B": (4096, 32, 32, 8, 14336, 128256),
    "3 14B": (5120, 40, 40, 8, 17920, 128256),
    "3 70B": (8192, 80, 64, 8, 28672, 128256),
    "2 7B": (4096, 32, 32, 32, 11008, 32000),
    "2 13B": (5120, 40, 40, 40, 13824, 32000),
    "2 34B": (8192, 48, 64, 8, 22016, 32000),
    "2 70B": (8192, 80, 64, 8, 28672, 32000),
}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass
class Row:
    """One published run. `swaps` are what its code does otherwise; memory is what its allocator had reserved."""

    source: str
    model: str  # of SHAPES
    gpu: str
    gpus: int
    seq_len: int
    micro_batch: int
    checkpointing: str
    compile: bool
    tokens: float  # a second, of one GPU
    memory_gib: float | None = None
    tp: int = 1
    dp_replicate: int = 1
    micro_steps: int = 1
    reduce_dtype: str = "float32"
    in_node: int = 8
    node_gbps: float | None = None  # of one GPU
    swaps: tuple[Callable, ...] = (whole_loss,)

    def arguments(self, empty: Path) -> list[str]:
        shape = dict(zip((*NAMES, "vocab_size"), SHAPES[self.model], strict=True))
        values = {f"model.{key}": value for key, value in shape.items()} | {
            "parallel.tp": self.tp,
            "parallel.dp_replicate": self.dp_replicate,
            "parallel.param_dtype": "bfloat16",
            "parallel.reduce_dtype": self.reduce_dtype,
            "parallel.activation_checkpointing": self.checkpointing,
            "parallel.compile": str(self.compile).lower(),
            "data.seq_len": self.seq_len,
            "train.micro_batch_size": self.micro_batch,
            "train.global_batch_size": self.micro_batch * self.micro_steps * self.gpus // self.tp,
        }
        return [str(empty), *(f"--{key}={value}" for key, value in values.items())]


def titan(gpus: int, compiled: bool, tokens: float, memory_gib: float) -> Row:
    swaps = (whole_loss, eager_loss, norms_in_pieces, every_second_product)
    return Row(TITAN, "3 8B", "h100-96", gpus, 8192, 2, "selective", compiled, tokens, memory_gib, swaps=swaps)


def a100(model: str, seq_len: int, rows: int, kept: str, tokens: float, *swaps: Callable) -> Row:
    return Row(AGE_OF_A100, model, "a100-80", 64, seq_len, rows, kept, False, tokens, swaps=(whole_loss, *swaps))


def fms(model: str, gpu: str, kept: str, compiled: bool, tokens: float) -> Row:
    """Its README says neither how many blocks are computed again, here half of them, nor whose the Gb/s are."""
    gpus, gbps, source = 96 if gpu == "h100" else 128, 100 if gpu == "h100" else 50, FMS if compiled else FMS_EAGER
    replicas = gpus // 8 if model == "2 7B" else 1
    swaps = (whole_loss, norms_in_pieces) + (every_second_block,) * (kept == "selective")
    row = Row(source, model, gpu, gpus, 4096, 2, kept, compiled, tokens, dp_replicate=replicas, swaps=swaps)
    row.reduce_dtype, row.node_gbps = "bfloat16", gbps
    return row


def kempner(model: str, dp: int, tp: int, rows: int, steps: int, tokens: float, *, compiled: bool = True) -> Row:
    swaps = (whole_loss, gather_for_each_product)
    row = Row(KEMPNER, model, "h200", dp * tp, 4096, rows, "full", compiled, tokens, tp=tp, swaps=swaps)
    row.micro_steps, row.in_node = steps, 4
    return row


ROWS = [
    titan(8, False, 5762, 82.4),
    titan(8, True, 6667, 77.0),
    titan(128, False, 5605, 67.0),
    titan(128, True, 6514, 62.0),
    Row(ASYNC, "3 70B", "h100-96", 256, 8192, 16, "full", True, 597.3, tp=8),
    Row(
        ASYNC, "3 8B", "h100-96", 64, 8192, 12, "selective", True, 4378, tp=8, swaps=(whole_loss, every_second_product)
    ),
    fms("2 7B", "h100", "none", True, 9600),
    fms("2 13B", "h100", "selective", True, 4850),
    fms("2 34B", "h100", "selective", True, 1830),
    fms("2 70B", "h100", "selective", True, 890),
    fms("2 7B", "h100", "none", False, 7500),
    fms("2 13B", "h100", "selective", False, 3800),
    fms("2 34B", "h100", "full", False, 1550),
    fms("2 70B", "h100", "full", False, 800),
    fms("2 7B", "a100-80", "none", True, 4550),
    fms("2 13B", "a100-80", "selective", True, 2150),
    fms("2 34B", "a100-80", "selective", True, 820),
    fms("2 70B", "a100-80", "selective", True, 410),
    fms("2 7B", "a100-80", "none", False, 3700),
    fms("2 13B", "a100-80", "selective", False, 1800),
    fms("2 34B", "a100-80", "full", False, 700),
    fms("2 70B", "a100-80", "full", False, 370),
    a100("3 8B", 8192, 1, "selective", 2973, every_second_product),
    a100("3 8B", 8192, 1, "selective", 2904, every_second_block),
    a100("3 70B", 8192, 1, "full", 331, norms_in_pieces),
    a100("2 13B", 4096, 2, "none", 2162),
    a100("2 13B", 4096, 2, "selective", 1914, every_second_block),
    a100("2 13B", 4096, 2, "selective", 1904, every_second_product),
    a100("2 70B", 4096, 1, "selective", 355, norms_in_pieces, every_second_product),
    a100("2 70B", 4096, 2, "full", 353, norms_in_pieces),
]
# Parameters and moments in bfloat16, another plan for TP, all logits on each rank, gradients summed once a step. And
# where the whole model is compiled, more FLOP/s than full checkpointing leaves room for. Only their order counts
OTHERS = [
    kempner("3 8B", 1, 1, 2, 4, 10471),
    kempner("3 8B", 2, 1, 2, 4, 9364),
    kempner("3 8B", 1, 2, 4, 2, 6582),
    kempner("3 8B", 4, 1, 4, 2, 9746),
    kempner("3 8B", 1, 4, 4, 2, 6284),
    kempner("3 8B", 2, 2, 4, 2, 6495),
    kempner("3 8B", 2, 4, 4, 2, 5537),
    kempner("3 14B", 8, 1, 4, 4, 4426, compiled=False),
    kempner("3 14B", 2, 4, 4, 4, 3418),
    kempner("3 8B", 4, 4, 4, 2, 5187),
    kempner("3 14B", 4, 4, 4, 4, 3363),
    kempner("3 8B", 8, 4, 4, 2, 4872),
    kempner("3 14B", 8, 4, 4, 4, 3260),
    kempner("3 70B", 8, 4, 2, 4, 552),
]


# ---------------------------------------------------------------------------------------------------------------------


def prediction_of(row: Row, empty: Path) -> Prediction:
    gpu = named(row.gpu, row.node_gbps)
    with contextlib.ExitStack() as stack:
        for swap in row.swaps:
            stack.enter_context(swap())
        config = explain.load(row.arguments(empty), row.gpus, min(row.gpus, row.in_node))
        report = explain.explain(config, row.gpus, train.make_optimizer, gpu.memory_gib)
    return predict(report, gpu, min(row.gpus, row.in_node))


def wrong_order(rows: list[Row], made: list[Prediction]) -> list[tuple[Row, Row]]:
    """Pairs of one model on one machine that were published 10 % apart or more, and are predicted in another order."""
    found = []
    for (a, x), (b, y) in combinations(zip(rows, made, strict=True), 2):
        alike = (a.source, a.model, a.gpu, a.seq_len) == (b.source, b.model, b.gpu, b.seq_len)
        apart = max(a.tokens, b.tokens) >= 1.1 * min(a.tokens, b.tokens)
        if alike and apart and (a.tokens < b.tokens) != (x.tokens_per_second < y.tokens_per_second):
            found.append((a, b))
    return found


def describe(row: Row) -> str:
    dp, swaps = row.gpus // row.tp, [swap.__name__ for swap in row.swaps[1:]]
    mesh = f"{row.dp_replicate} x {dp // row.dp_replicate} x {row.tp}"
    return f"{row.model} | {row.gpu} | {mesh} | {row.micro_batch} x {row.seq_len} | {row.checkpointing} | " + (
        f"{'compiled' if row.compile else 'eager'} | {', '.join(swaps).replace('_', ' ')}"
    )


def show(title: str, rows: list[Row]) -> list[Prediction]:
    print(f"\n{title}\n")
    print("| source | Llama | GPU | mesh | rows | checkpointing | | instead of ours | tokens/s | predicted | error |")
    print("|" + " --- |" * 11)
    made, sources = [], list(dict.fromkeys(row.source for row in rows))
    with tempfile.TemporaryDirectory() as folder:
        (empty := Path(folder) / "empty.toml").touch()
        for row in rows:
            made.append(prediction_of(row, empty))
            error = made[-1].tokens_per_second / row.tokens - 1
            numbers = f"{row.tokens:,.0f} | {made[-1].tokens_per_second:,.0f} | {error:+.1%}"
            print(f"| {sources.index(row.source) + 1} | {describe(row)} | {numbers} |", flush=True)
    print("\n" + "\n".join(f"{number}. {source}" for number, source in enumerate(sources, 1)))
    errors = [abs(a.tokens_per_second / row.tokens - 1) for row, a in zip(rows, made, strict=True)]
    print(f"\nmedian error {statistics.median(errors):.1%}, worst {max(errors):.1%}; ", end="")
    print(f"pairs in the wrong order: {len(wrong_order(rows, made))}")
    return made


def main() -> None:
    made = show("tokens/s of one GPU", ROWS)
    print("\n| GiB reserved | published | predicted | error |\n| --- | --- | --- | --- |")
    for row, prediction in zip(ROWS, made, strict=True):
        if row.memory_gib:
            reserved = prediction.memory_gib / USABLE
            print(f"| {describe(row)} | {row.memory_gib} | {reserved:.1f} | {reserved / row.memory_gib - 1:+.1%} |")
    show("Of code that differs in more than a row can name: the order counts", OTHERS)


if __name__ == "__main__":
    main()
