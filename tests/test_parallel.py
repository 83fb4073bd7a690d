"""Plans, slices, dtypes and activation checkpointing: what each rank holds and computes."""

import contextlib
import io
import math
import os
import platform
import resource
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from laws import watch
from test_mesh import SIZES, run_training
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import configs
import data
import model as model_module
import parallel
import runtime.ranks
import train
from benchmarks.loss_memory import FULL, WAYS, PeakBytes
from configs import OptimConfig
from model import Llama, ModelConfig
from parallel import ParallelConfig

MODEL = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 32}


def build(parallel_config: ParallelConfig, **changes) -> tuple[Llama, parallel.DeviceMesh]:
    mesh = parallel.build_mesh(parallel_config, torch.device("cpu"))
    with torch.device("meta"):
        model = Llama(ModelConfig(**{**MODEL, **changes}))
    parallel.parallelize(model, mesh, parallel_config)
    model.to_empty(device="cpu")
    with torch.no_grad():  # law 5: whatever is not written shows
        for tensor in (*map(parallel.to_local, model.parameters()), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights(0, parallel.place_shard)
    return model, mesh


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def page_faults_of_tensors(mebibytes: int) -> list[int]:
    """When the same memory is taken, written and given back again and again."""
    counts = []
    for _ in range(16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(mebibytes, 2**18).fill_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return counts


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_a_step_frees_is_not_faulted_in_again_by_the_next(ranks):
    (faults,) = ranks(1, page_faults_of_tensors, 64)
    assert max(faults[-4:]) < 100, f"{faults}: 64 MiB are 16,384 pages, and the first times the heap grows"


def policies_of_new_threads() -> list[tuple[str, int]]:
    """Name and scheduling policy of the threads that the process group of a run starts."""
    dist.destroy_process_group()
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    tasks = Path("/proc/self/task")
    before = {task.name for task in tasks.iterdir()}
    with mock.patch.dict(os.environ):
        del os.environ["RANK"]
        runtime.ranks.init_distributed()
    torch.set_num_threads(1)
    threads, until = [], time.monotonic() + 20  # seconds: a thread names itself when its turn comes
    while not any("gloo" in name for name, _ in threads) and time.monotonic() < until:
        new = [task for task in tasks.iterdir() if task.name not in before]
        threads = [((task / "comm").read_text().strip(), os.sched_getscheduler(int(task.name))) for task in new]
    return threads


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a policy of Linux")
def test_a_thread_of_gloo_that_wakes_up_waits_for_its_turn(ranks):
    (threads,) = ranks(1, policies_of_new_threads)
    assert any("gloo" in name for name, _ in threads)
    assert {policy for _, policy in threads} == {os.SCHED_BATCH}, threads


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def placements_of_parameters(tp: int, kv_heads: int) -> dict[str, tuple]:
    model, _ = build(ParallelConfig(tp=tp), num_key_value_heads=kv_heads)
    return {
        name: (str(p.placements[-1]), p.device_mesh.mesh_dim_names, tuple(p.to_local().shape))
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("kv_heads", [4, 3])
def test_every_plan_entry_places_its_weight(ranks, kv_heads):
    found = ranks(4, placements_of_parameters, 2, kv_heads)[0]
    head, hidden, ffn = 4, 48, 80
    cut_kv = kv_heads % 2 == 0
    kv = ("S(0)", kv_heads * head // 4, hidden) if cut_kv else ("R", kv_heads * head // 2, hidden)
    expected = {  # placement on tp, and the slice that is left by tp = 2 and dp = 2
        "model.embed_tokens.weight": ("S(0)", 256 // 4, hidden),
        "model.norm.weight": ("R", hidden // 2),
        "lm_head.weight": ("S(0)", 256 // 4, hidden),
    }
    for i in range(2):
        block = {
            "input_layernorm": ("R", hidden // 2),
            "self_attn.q_proj": ("S(0)", 12 * head // 4, hidden),
            "self_attn.k_proj": kv,
            "self_attn.v_proj": kv,
            "self_attn.o_proj": ("S(1)", hidden // 2, 12 * head // 2),
            "post_attention_layernorm": ("R", hidden // 2),
            "mlp.gate_proj": ("S(0)", ffn // 4, hidden),
            "mlp.up_proj": ("S(0)", ffn // 4, hidden),
            "mlp.down_proj": ("S(1)", hidden // 2, ffn // 2),
        }
        expected |= {f"model.layers.{i}.{name}.weight": value for name, value in block.items()}
    assert found.keys() == expected.keys()
    for name, (placement, *shape) in expected.items():
        assert found[name] == (placement, ("dp_replicate", "dp_shard", "tp"), tuple(shape)), name


def local_heads_and_residual(tp: int) -> dict[str, tuple]:
    shapes, (model, mesh) = {}, build(ParallelConfig(tp=tp))
    block = model.model.layers[1]
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "self_attn.o_proj", "mlp"):
        block.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: shapes.__setitem__(name, tuple(output.shape))
        )
    tokens = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))
    with parallel.loss_context(mesh):
        model(tokens, tokens)
    return shapes


def test_each_rank_computes_its_own_heads_and_its_part_of_the_residual_stream(ranks):
    for shapes in ranks(4, local_heads_and_residual, 4):
        assert shapes == {
            "self_attn.q_proj": (3, 32, 12),  # 3 of 12 heads
            "self_attn.k_proj": (3, 32, 4),  # 1 of 4
            "mlp.gate_proj": (3, 32, 20),
            "self_attn.o_proj": (3, 8, 48),  # 8 of 32 positions
            "mlp": (3, 8, 48),
        }


def said_without(plan: str, line: str) -> str:
    """The error of `parallelize` when a plan has forgotten a line."""
    real = getattr(parallel, plan)
    without = mock.Mock(side_effect=lambda *sizes: {key: style for key, style in real(*sizes).items() if key != line})
    with mock.patch.object(parallel, plan, without), pytest.raises(RuntimeError) as caught:
        build(ParallelConfig(tp=2))
    return str(caught.value)


@pytest.mark.parametrize(
    ("plan", "line", "left_out"),
    [
        ("top_level_plan", "model.norm", ["model.norm.weight"]),
        ("top_level_plan", "lm_head", ["lm_head.weight"]),
        *(
            ("block_plan", line, [f"model.layers.{i}.{line}.weight" for i in range(2)])
            for line in ("post_attention_layernorm", "self_attn.k_proj", "mlp.down_proj")
        ),
    ],
)
def test_a_forgotten_line_of_a_plan_is_an_error_that_names_the_parameters(ranks, plan, line, left_out):
    for said in ranks(2, said_without, plan, line):
        assert [word.strip(",:") for word in said.split() if word.strip(",:").endswith(".weight")] == left_out


def said_of_an_unused_parameter() -> str:
    model, mesh = build(ParallelConfig(tp=2))
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    last = model.model.layers[-1].mlp
    with parallel.loss_context(mesh), mock.patch.object(last, "forward", lambda _: 0):
        model(tokens, tokens).backward()
    with pytest.raises(RuntimeError) as caught:
        parallel.gradient_square(model)
    return str(caught.value)


def test_a_parameter_that_no_gradient_reaches_is_named(ranks):
    names = ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    unused = ", ".join(f"model.layers.1.{name}.weight" for name in names)
    for said in ranks(2, said_of_an_unused_parameter):
        assert said.startswith(f"no gradient has reached {unused}: ")


class OwnShare(parallel.ReplicatedLinear):
    """Each rank goes on with its share of the output features."""

    def own_part(self, output: torch.Tensor, mesh: parallel.DeviceMesh) -> torch.Tensor:
        return output.chunk(mesh.size(), -1)[mesh.get_local_rank()]


def gradients(tp: int, style: type[parallel.ParallelStyle] | None) -> dict[str, torch.Tensor]:
    """The whole gradients of a micro-step, with `style` for gate_proj, which the other matrices take a part of."""
    real = parallel.block_plan
    changed = {"mlp.gate_proj": style()} if style else {}
    with mock.patch.object(parallel, "block_plan", lambda *sizes: real(*sizes) | changed):
        model, mesh = build(ParallelConfig(tp=tp))
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    with parallel.loss_context(mesh):
        model(tokens, tokens).backward()
    return {name: gather_full(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("tp", "style"), [(2, OwnShare), (4, OwnShare), (2, None)])
def test_what_is_computed_whole_and_used_in_parts_has_the_gradient_of_one_rank(ranks, tp, style):
    """Of the weight and of what was there before it; float32, summed in another order."""
    (expected,) = ranks(1, gradients, 1, None)
    for found in ranks(tp, gradients, tp, style):
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


# ---------------------------------------------------------------------------------------------------------------------
# Slices


def full_parameters(config: ParallelConfig, changes: dict) -> dict[str, torch.Tensor]:
    model, _ = build(config, **changes)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert parallel.to_local(tensor).isfinite().all(), name
    gathered = {name: gather_full(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parallel.whole(parameter), gathered[name]), name
    return gathered


def gather_full(parameter: torch.Tensor) -> torch.Tensor:
    """The whole parameter from every rank's slice, put together by hand: `full_tensor` is not what is tested."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (tuple(parameter.device_mesh.get_coordinate()), parameter.to_local().detach()))
    for placement in parameter.placements:  # outermost axis first: FSDP cut what TP had left
        groups = {}
        for coordinate, piece in sorted(gathered, key=lambda pair: pair[0]):
            groups.setdefault(coordinate[1:], []).append(piece)
        joined = (
            pieces[0] if placement.is_replicate() else torch.cat(pieces, placement.dim) for pieces in groups.values()
        )
        gathered = list(zip(groups, joined, strict=True))
    return gathered[0][1]


@pytest.mark.parametrize(
    ("world", "config"),
    [
        (2, ParallelConfig(tp=2)),
        (4, ParallelConfig(tp=1)),
        (4, ParallelConfig(tp=2)),
        (4, ParallelConfig(tp=2, dp_replicate=2)),
        (4, ParallelConfig(tp=1, dp_replicate=2)),
    ],
    ids=str,
)
def test_initial_weights_are_the_same_on_every_mesh(ranks, world, config):
    """Also where rows do not divide: 3 kv heads of 2 over 4 ranks leave 2, 2, 2 and none.

    `parallel.whole` puts them together again.
    """
    changes = {"num_key_value_heads": 3, "head_dim": 2, "vocab_size": 250, "intermediate_size": 30}
    with torch.device("meta"):
        alone = Llama(ModelConfig(**{**MODEL, **changes}))
    alone.to_empty(device="cpu")
    alone.init_weights(0)
    for whole in ranks(world, full_parameters, config, changes):
        for name, parameter in alone.named_parameters():
            assert torch.equal(whole[name], parameter), name


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def bytes_of_a_step(config: ParallelConfig) -> list[int]:
    """Of this rank's parameters, gradients and optimizer state, after a step."""
    model, mesh = build(config)
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    with parallel.loss_context(mesh):
        model(tokens, tokens).backward()
    optimizer = train.make_optimizer(model, OptimConfig())
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = (model.parameters(), (parameter.grad for parameter in model.parameters()), states)
    return [sum(parallel.to_local(tensor).nbytes for tensor in tensors) for tensors in held]


@pytest.mark.parametrize(
    ("tp", "dp_shard", "dp_replicate"), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2)]
)
def test_memory_falls_as_one_over_tp_times_dp_shard(ranks, tp, dp_shard, dp_replicate):
    """To the byte: float32, two moments, norms whole on every tp rank, a step count of 4 bytes for each parameter.

    And to 2 % of everything / (tp * dp_shard), which norms and step counts are small enough for.
    """
    with torch.device("meta"):
        parameters = list(Llama(ModelConfig(**MODEL)).parameters())
    held = sum(4 * p.numel() // (dp_shard * (tp if p.ndim > 1 else 1)) for p in parameters)
    share = sum(4 * p.numel() for p in parameters) / (tp * dp_shard)
    for found in ranks(tp * dp_shard * dp_replicate, bytes_of_a_step, ParallelConfig(tp=tp, dp_replicate=dp_replicate)):
        assert found == [held, held, 2 * held + 4 * len(parameters)]
        assert found == pytest.approx([share, share, 2 * share], rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def ops_of_a_step(tp: int, mode: str) -> Counter:
    model, mesh = build(ParallelConfig(tp=tp, activation_checkpointing=mode))
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    with CountOps() as ops, parallel.loss_context(mesh):
        model(tokens, tokens).backward()
    names = {"mm": torch.ops.aten.mm.default, "silu": torch.ops.aten.silu.default}
    names["attention"] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    names["reduce_scatter"] = torch.ops._c10d_functional.reduce_scatter_tensor.default
    return {name: ops.counts[op] for name, op in names.items()}


@pytest.mark.parametrize("tp", [1, 2])
def test_checkpointing_recomputes_what_it_says(ranks, tp):
    none, selective, full = (ranks(tp, ops_of_a_step, tp, mode)[0] for mode in ("none", "selective", "full"))
    assert none["attention"] == none["silu"] == 2
    assert full["attention"] == full["silu"] == 4
    assert full["mm"] == none["mm"] + 2 * 6, "both blocks' matrices once more, but the last: backward needs no output"
    assert selective["silu"] == 4
    assert {k: v for k, v in selective.items() if k != "silu"} == {k: v for k, v in none.items() if k != "silu"}


def test_parameter_names_do_not_depend_on_checkpointing_or_compile(ranks):
    plain, wrapped = (
        ranks(1, parameter_names, ParallelConfig(tp=1, activation_checkpointing=mode, compile=compiled))[0]
        for mode, compiled in (("none", False), ("full", True))
    )
    assert plain == wrapped


def parameter_names(config: ParallelConfig) -> list[str]:
    return [name for name, _ in build(config)[0].named_parameters()]


# ---------------------------------------------------------------------------------------------------------------------
# Memory of the loss


def loss_peaks(tp: int) -> list[int]:
    """The most bytes of a small model's step at 8k tokens x 128k words, on tensors without memory: whole, in chunks."""
    config, peaks = ParallelConfig(tp=tp), []
    mesh = parallel.build_mesh(config, torch.device("cpu"))
    shape = {"vocab_size": FULL[1], "num_hidden_layers": 1, "max_position_embeddings": FULL[0]}
    for way in WAYS.values():
        with torch.device("meta"):
            model = Llama(ModelConfig(**MODEL | shape))
        parallel.parallelize(model, mesh, config)
        model.loss.forward = way
        with FakeTensorMode(allow_non_fake_inputs=True), PeakBytes() as counted, parallel.loss_context(mesh):
            model.to_empty(device="cpu")
            rows = torch.zeros(1, FULL[0], dtype=torch.int64)
            model(rows, rows).backward()
        peaks.append(counted.peak)
    return peaks


@pytest.mark.parametrize("tp", [1, 2])
def test_the_loss_takes_at_most_a_quarter_of_the_memory_of_whole_logits(ranks, tp):
    for whole, chunks in ranks(tp, loss_peaks, tp):
        assert whole > 3 * FULL[0] * FULL[1] * 4 / tp, "logits, their logarithms and gradients, in float32"
        assert chunks < whole / 4


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes


def dtypes_of_a_step(config: ParallelConfig) -> dict[str, set]:
    """What flows in bf16 training: recorded where RoPE is applied, where the loss is computed, and in the gradients."""
    dtypes = {"rope tables": set(), "rope input": set(), "logits": set()}
    apply_rope, cross_entropy = model_module.apply_rope, torch.nn.functional.cross_entropy

    def rope(x, cos, sin):
        dtypes["rope tables"] |= {cos.dtype, sin.dtype}
        dtypes["rope input"].add(x.dtype)
        return apply_rope(x, cos, sin)

    def loss(logits, *arguments, **keywords):
        dtypes["logits"].add(logits.dtype)
        return cross_entropy(logits, *arguments, **keywords)

    model, mesh = build(config)
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch, parallel.loss_context(mesh):
        patch.setattr(model_module, "apply_rope", rope)
        patch.setattr(torch.nn.functional, "cross_entropy", loss)
        result = model(tokens, tokens)
        result.backward()
    dtypes["loss"] = {result.dtype}
    dtypes["parameters"] = {parameter.dtype for parameter in model.parameters()}
    dtypes["gradients"] = {parameter.grad.dtype for parameter in model.parameters()}
    return dtypes


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_rope_loss_weights_and_gradients_stay_float32_in_bf16_blocks(ranks, tp, mode):
    config = ParallelConfig(tp=tp, param_dtype="bfloat16", activation_checkpointing=mode)
    for dtypes in ranks(tp, dtypes_of_a_step, config):
        assert dtypes.pop("rope input") == {torch.bfloat16}
        assert dtypes.keys() == {"rope tables", "logits", "loss", "parameters", "gradients"}
        for what, found in dtypes.items():
            assert found == {torch.float32}, what


# ---------------------------------------------------------------------------------------------------------------------
# Laws 1 and 8, inside a real run


def watched_training(arguments: list[str], cache: str, broken: str) -> str:
    """What `laws.watch` has to say of a training run, in which one rank may be broken on purpose."""
    last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        if last and broken == "rows":
            patch.setattr(data, "deal", shifted(data.deal))
        if last and broken == "norm":
            scale = parallel.scale_gradients
            patch.setattr(parallel, "scale_gradients", lambda model, factor: nudge(model, scale(model, factor)))
        try:
            with watch():
                run_training(arguments, cache)
        except AssertionError as error:
            return str(error)
    return ""


def shifted(deal):
    return lambda rows, micro_batch_size, dp_rank, dp_size: deal(rows.roll(1), micro_batch_size, dp_rank, dp_size)


def nudge(model: Llama, _: None) -> None:
    model.model.norm.weight.grad.to_local().mul_(1.5)


@pytest.mark.parametrize(
    ("broken", "message"),
    [("", ""), ("rows", "TP peers of dp rank 1 saw different rows"), ("norm", "copies of model.norm.weight differ")],
)
def test_peers_share_rows_and_copies_stay_equal_and_one_broken_rank_is_noticed(
    ranks, corpus, tmp_path, broken, message
):
    (tmp_path / "empty.toml").write_text("")
    values = SIZES | {"data.dataset": corpus, "run.dir": tmp_path / "run", "parallel.tp": 2}
    values |= {"train.steps": 3, "optim.warmup_steps": 1, "train.micro_batch_size": 2, "train.eval_every": 0}
    arguments = [str(tmp_path / "empty.toml"), *(f"--{key}={value}" for key, value in values.items())]
    for said in ranks(4, watched_training, arguments, str(corpus.parent / "cache"), broken):
        assert said.startswith(message) if message else said == ""


def test_configuration_reaches_the_mesh(ranks):
    assert ranks(4, mesh_shape, ["--parallel.dp_replicate=2", "--parallel.tp=2"]) == [(2, 1, 2)] * 4
    assert ranks(4, mesh_shape, []) == [(1, 2, 2)] * 4, "auto makes four ranks of one node a 2-D mesh"


def mesh_shape(arguments: list[str]) -> tuple[int, ...]:
    return tuple(parallel.build_mesh(configs.load(arguments).parallel, torch.device("cpu")).shape)
