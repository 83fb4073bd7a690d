"""What explain.py says against what a real step on real gloo ranks sends and holds."""

import contextlib
import functools
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_model import WINDOW, window_in_every_second_block
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import PrepareModuleInput, parallelize_module

import configs
import explain
import model as model_module
import parallel
import train
from cost import text as cost_text
from cost.record import Report
from model import Llama

ROOT = Path(__file__).parent.parent
BLOCK = "model.layers.0"  # where all blocks are alike, it is shown
SIZES = {
    "model.vocab_size": 384,
    "model.hidden_size": 50,  # odd on 3 and 4 ranks
    "model.intermediate_size": 72,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 12,
    "model.num_key_value_heads": 4,
    "model.head_dim": 4,
    "data.tokenizer_vocab_size": 384,
    "data.seq_len": 24,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 1,
}
TP2, TP4, HSDP = {"parallel.tp": 2}, {"parallel.tp": 4, "model.hidden_size": 48}, {"parallel.dp_replicate": 2}
KEEP = {"parallel.reshard_after_forward": "false"}
BF16 = {"parallel.param_dtype": "bfloat16"}
CASES = {
    "one rank": (1, {}),
    "tp2": (2, TP2),
    "dp2": (2, {}),
    "dp3, uneven slices": (3, {"train.global_batch_size": 6}),
    "dp4, reshard off": (4, KEEP | {"train.global_batch_size": 8}),
    "dp2 x tp2": (4, TP2),
    "hsdp 2 x 1": (2, HSDP),
    "hsdp 2 x 2": (4, HSDP),
    "hsdp 2 x 1 x tp2": (4, HSDP | TP2),
    "3 kv heads, dp2 x tp2": (4, TP2 | {"model.num_key_value_heads": 3, "train.micro_batch_size": 2}),
    "2 kv heads, tp4": (4, TP4 | {"model.num_key_value_heads": 2}),
    "tied, dp2": (2, {"model.tie_word_embeddings": "true"}),
    "tied, dp2 x tp2": (4, TP2 | {"model.tie_word_embeddings": "true"}),
    "document mask, dp2 x tp2": (4, TP2 | {"data.layout": "pack", "data.document_mask": "true"}),
    "bf16, dp2 x tp2": (4, TP2 | BF16),
    "bf16, reduced in bf16, hsdp 2 x 2": (4, HSDP | BF16 | {"parallel.reduce_dtype": "bfloat16"}),
    "selective, dp2 x tp2": (4, TP2 | {"parallel.activation_checkpointing": "selective"}),
    "full, dp2 x tp2": (4, TP2 | {"parallel.activation_checkpointing": "full"}),
    "full, 3 kv heads, hsdp 2 x 1 x tp2, reshard off": (
        4,
        HSDP | TP2 | KEEP | {"model.num_key_value_heads": 3, "parallel.activation_checkpointing": "full"},
    ),
}


@pytest.fixture(scope="session")
def arguments_of(tmp_path_factory) -> Callable[[dict], list[str]]:
    """The command line of SIZES with changes, on top of an empty recipe."""
    recipe = tmp_path_factory.mktemp("explain") / "empty.toml"
    recipe.write_text("")
    defaults = {"parallel.tp": 1} | SIZES
    return lambda changes: [str(recipe), *(f"--{key}={value}" for key, value in (defaults | changes).items())]


def run_explain(arguments: tuple[str, ...], world: int, fork: Callable | None) -> tuple[Report, str]:
    with fork() if fork else contextlib.nullcontext():
        report = explain.explain(explain.load(list(arguments), world, world), world, train.make_optimizer)
    assert not dist.is_initialized()
    text = cost_text.render(report, explain.HOW_TO_READ, full=True)
    return replace(report, trace=None), text  # a trace cannot be sent


@pytest.fixture(scope="session")
def explained() -> Callable[..., tuple[Report, str]]:
    """`explained(arguments, world)` in a process of its own: the pretended group must not meet this process's state.

    It is the same process for all calls, so they must not meet each other's either. `fork` is a context in which the
    code is another one.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        run = functools.cache(lambda *given: pool.submit(run_explain, *given).result())
        yield lambda arguments, world, fork=None: run(tuple(arguments), world, fork)


# ---------------------------------------------------------------------------------------------------------------------
# A real step

WIDTHS = {"Float": 4, "BFloat16": 2, "Double": 8, "Long": 8, "Byte": 1}
KINDS = {"gather": "all-gather", "reducescatter": "reduce-scatter", "allreduce": "all-reduce"}


def flight_records(after: list[dict]) -> list[dict]:
    """What torch's flight recorder saw gloo do in this process, below Python, and in which group."""
    entries = pickle.loads(torch._C._distributed_c10d._dump_fr_trace(includeStackTraces=False))["entries"]
    return entries if not after else [entry for entry in entries if entry["record_id"] > after[-1]["record_id"]]


def size_of(entry: dict, ranks: int) -> int:
    """Bytes of the whole tensor. gloo sums the whole of a reduce-scatter before it scatters."""
    sizes = zip(entry["input_sizes"], entry["input_dtypes"], strict=True)
    given = sum(math.prod(shape) * WIDTHS[dtype] for shape, dtype in sizes)
    return given * ranks if entry["profiling_name"] == "gloo:all_gather" else given


def real_step(arguments: list[str]) -> dict:
    """One optimizer step as train.py takes it: what it sends, holds, and hands from module to module on this rank."""
    config, cpu = configs.load(arguments), torch.device("cpu")
    mesh = parallel.build_mesh(config.parallel, cpu)
    with torch.device("meta"):
        model = Llama(config.model)
    parallel.parallelize(model, mesh, config.parallel)
    model.to_empty(device=cpu)
    model.init_weights(0, parallel.place_shard)
    optimizer = train.make_optimizer(model, config.optim)
    sharded, borders, gathered = {id(parameter) for parameter in model.parameters()}, {}, []

    @torch.no_grad()
    def watch(name, side, tensor):
        borders.setdefault((name, side), tuple(parallel.to_local(tensor).shape))
        unsharded = (parameter for parameter in model.parameters() if id(parameter) not in sharded)
        gathered.append(sum(parallel.to_local(parameter).nbytes for parameter in unsharded))

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, "in", inputs[0]), prepend=True)
        module.register_forward_hook(lambda _, inputs, output, name=name: watch(name, "out", output))

    rows, (dp_rank, dp) = config.train.micro_batch_size, parallel.dp_rank_and_size(mesh)
    generator = torch.Generator().manual_seed(dp_rank)  # TP peers see the same rows
    earlier, kinds = flight_records([]), Counter()
    micro_steps = config.train.global_batch_size // (rows * dp)
    for number in range(1, micro_steps + 1):
        parallel.sum_over_replicas(model, config.parallel, number == micro_steps)
        tokens = torch.randint(config.model.vocab_size, (rows, config.data.seq_len), generator=generator)
        positions = [torch.zeros_like(tokens)] if config.data.document_mask else []
        with CommDebugMode() as comms, parallel.loss_context(mesh):
            loss = model(tokens, tokens, *positions)
            loss.backward()
        for op, count in comms.get_comm_counts().items():
            kinds[next(text for part, text in KINDS.items() if part in str(op).replace("_", ""))] += count
    entries = flight_records(earlier)
    loss = parallel.to_local(loss.detach())
    parallel.sum_over_ranks(loss, loss, parallel.gradient_square(model))
    updates = flight_records(earlier + entries)
    parallel.scale_gradients(model, torch.tensor(0.1))
    optimizer.step()

    axes = {mesh.get_group(axis).group_name: axis for axis in mesh.mesh_dim_names}
    calls, alone = Counter(), 0
    for entry in entries:
        axis = axes[entry["process_group"][0]]
        size = mesh[axis].size()
        alone += size == 1  # FSDP calls HSDP's all-reduce whatever the number of replicas
        if size > 1:
            calls[axis, entry["profiling_name"].removeprefix("gloo:"), size_of(entry, size)] += 1
    kinds["all-reduce"] -= alone
    local = [parallel.to_local(parameter) for parameter in model.parameters()]
    states = [parallel.to_local(value) for state in optimizer.state.values() for value in state.values()]
    return {
        "calls": calls,
        "kinds": {kind: count for kind, count in kinds.items() if count},
        "update": [size_of(entry, dist.get_world_size()) for entry in updates],
        "parameters": sum(tensor.nbytes for tensor in local),
        "gradients": sum(parallel.to_local(parameter.grad).nbytes for parameter in model.parameters()),
        "optimizer state": sum(tensor.nbytes for tensor in states),
        "gathered": gathered,
        "borders": borders,
        "weights": {
            name.removesuffix(".weight"): (tuple(p.shape), list(p.placements), tuple(p.to_local().shape))
            for name, p in model.named_parameters()
        },
    }


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, ranks, explained, arguments_of) -> tuple[Report, list[dict]]:
    """The report of a case, and the real step's of every rank."""
    world, overrides = CASES[request.param]
    arguments = arguments_of(overrides)
    report, _ = explained(arguments, world)
    return report, ranks(world, real_step, arguments)


def test_every_collective_of_a_real_step_is_listed_with_its_axis_and_bytes(pair):
    """Below Python, on every rank: gloo turns a reduce-scatter into an all-reduce of its input, so both are sums."""
    report, steps = pair
    said = Counter()
    for call in report.collectives:
        if call.phase != "update":
            kind = "all_gather" if call.kind == "all-gather" else "all_reduce"
            said[call.axis, kind, call.nbytes] += call.count
    for step in steps:
        assert said == step["calls"]


def test_kinds_of_collectives_are_those_of_comm_debug_mode(pair):
    report, steps = pair
    said = Counter()
    for call in report.collectives:
        if call.phase != "update":
            said[call.kind] += call.count
    assert all(said == step["kinds"] for step in steps)


def test_the_update_is_one_all_reduce(pair):
    report, steps = pair
    said = [call for call in report.collectives if call.phase == "update"]
    if len(steps) == 1:
        assert not said
        return
    assert [(call.kind, call.axis, call.count) for call in said] == [("all-reduce", "all ranks", 1)]
    assert all(step["update"] == [said[0].nbytes] for step in steps)


def test_bytes_of_parameters_gradients_and_optimizer_state_are_those_of_rank_0(pair):
    report, steps = pair
    for key in ("parameters", "gradients", "optimizer state"):
        assert report.memory[key] == steps[0][key], key
        assert report.memory[key] == max(step[key] for step in steps), f"another rank has more {key}"


def test_gathered_bytes_are_what_fsdp_gathers(pair):
    """In forward, right after FSDP's hooks: embedding, norm and head alone, then the most that there ever is."""
    report, steps = pair
    for step in steps:
        seen = [count for count in step["gathered"] if count]
        assert seen[0] == report.memory["gathered rest"]
        assert max(seen) == report.memory["gathered at once"]
        assert seen[0] + report.memory["gathered block"] in seen


def test_weights_and_activations_have_the_shapes_and_placements_of_the_real_model(pair):
    report, steps = pair
    for name, (_, full, placements, local) in report.weights.items():
        last = name.replace(BLOCK, "model.layers.1")  # what is said of block 0 holds for every block
        arrives, *_, leaves = report.activations[name]
        assert (arrives[0], leaves[0]) == (steps[0]["borders"][last, "in"], steps[0]["borders"][last, "out"])
        if full == "-":
            continue
        real = steps[0]["weights"].get(last) or steps[0]["weights"]["model.embed_tokens"]  # tied
        assert (full, local) == (real[0], real[2])
        texts = ["R" if placement.is_replicate() else f"S({placement.dim})" for placement in real[1]]
        assert placements == ", ".join(texts)


def test_layouts_agree_with_the_shapes_without_tensor_parallelism(explained, arguments_of):
    """S(d) is 1/tp of the whole along d, everything else that has a layout is the whole."""
    whole, _ = explained(arguments_of({}), 1)
    cut, _ = explained(arguments_of(TP2), 2)
    assert whole.activations.keys() == cut.activations.keys()
    for name in cut.weights:
        for (shape, layout), (full, none) in zip(cut.activations[name], whole.activations[name], strict=True):
            dim = int(layout[2:-1]) if layout.startswith("S") else None
            assert none == "-"
            assert layout != "-", name
            assert shape == tuple(size // 2 if i == dim else size for i, size in enumerate(full)), name
    assert [cut.activations[name][-1][1] for name in ("model.embed_tokens", "lm_head")] == ["S(1)", "S(1)"]


# ---------------------------------------------------------------------------------------------------------------------
# Causes


def causes(report: Report) -> Counter:
    """{(module, phase, kind, axis): calls}, where the block's are those of one block and one micro-step."""
    found = Counter()
    for call in report.collectives:
        layers = report.config.model.num_hidden_layers if call.module.startswith(BLOCK) else 1
        micro_steps = 1 if call.phase == "update" or call.axis == "dp_replicate" else report.micro_steps  # float32
        count, rest = divmod(call.count, layers * micro_steps)
        assert rest == 0
        found[call.module.replace(BLOCK, "block"), call.phase, call.kind, call.axis] += count
    return found


GATHER_TP, SCATTER_TP, SUM_TP = ("all-gather", "tp"), ("reduce-scatter", "tp"), ("all-reduce", "tp")
# The table at the top of parallel.py: forward's collective of each module, and backward's, which mirrors it.
MIRRORED = {
    "model.embed_tokens": (SCATTER_TP, GATHER_TP),
    "block.self_attn": (GATHER_TP, SCATTER_TP),
    "block.self_attn.o_proj": (SCATTER_TP, GATHER_TP),
    "block.mlp": (GATHER_TP, SCATTER_TP),
    "block.mlp.down_proj": (SCATTER_TP, GATHER_TP),
    "loss": (GATHER_TP, SCATTER_TP),
}
PLAN = {
    **{(name, "forward", *forward): 1 for name, (forward, _) in MIRRORED.items()},
    **{(name, "backward", *backward): 1 for name, (_, backward) in MIRRORED.items()},
    ("loss", "forward", *SUM_TP): 3,  # the loss: largest logit, sum of exponentials, the target's logit
    **{
        (name, "backward", *SUM_TP): 1  # gradients of norms over tp
        for name in ("block.input_layernorm", "block.post_attention_layernorm", "model.norm")
    },
}
FSDP = {
    **{(name, "forward", "all-gather", "dp_shard"): 1 for name in (" (FSDP)", "block (FSDP)")},
    **{(name, "backward", "reduce-scatter", "dp_shard"): 1 for name in (" (FSDP)", "block (FSDP)")},
}
UPDATE = {("", "update", "all-reduce", "all ranks"): 1}
AGAIN = {("block (FSDP)", "backward", "all-gather", "dp_shard"): 1}
REPLICAS = {(name, "backward", "all-reduce", "dp_replicate"): 1 for name in (" (FSDP)", "block (FSDP)")}
KV = {(f"block.self_attn.{name}", "backward", *SUM_TP): 1 for name in ("k_proj", "v_proj")}
FULL = {  # not the last reduce-scatter: nothing in backward needs the block's output
    ("block.self_attn", "recompute", *GATHER_TP): 1,
    ("block.self_attn.o_proj", "recompute", *SCATTER_TP): 1,
    ("block.mlp", "recompute", *GATHER_TP): 1,
}
SELECTIVE = {key: count for key, count in FULL.items() if key[2] == "all-gather"}  # reduce-scatters are kept
CAUSES = {
    "one rank": {},
    "tp2": PLAN | UPDATE,
    "dp2": FSDP | AGAIN | UPDATE,
    "dp4, reshard off": FSDP | UPDATE,
    "dp2 x tp2": PLAN | FSDP | AGAIN | UPDATE,
    "hsdp 2 x 2": FSDP | AGAIN | REPLICAS | UPDATE,
    "hsdp 2 x 1": REPLICAS | UPDATE,
    "3 kv heads, dp2 x tp2": PLAN | KV | FSDP | AGAIN | UPDATE,
    "tied, dp2 x tp2": PLAN | FSDP | AGAIN | UPDATE,
    "selective, dp2 x tp2": PLAN | SELECTIVE | FSDP | AGAIN | UPDATE,
    "full, dp2 x tp2": PLAN | FULL | FSDP | AGAIN | UPDATE,
}


@pytest.mark.parametrize("case", CAUSES)
def test_each_collective_belongs_to_the_module_that_causes_it(explained, arguments_of, case):
    world, overrides = CASES[case]
    report, _ = explained(arguments_of(overrides), world)
    assert causes(report) == CAUSES[case]


def test_a_step_counts_layers_and_micro_steps(explained, arguments_of):
    """Twice the layers double the block's calls and bytes, twice the micro-batch halves the calls of everything."""

    def counts(**changes) -> dict:
        overrides = TP2 | {key.replace("__", "."): value for key, value in changes.items()}
        report, _ = explained(arguments_of(overrides), 4)
        return {(c.module, c.phase, c.kind, c.axis): c.count for c in report.collectives}

    base = counts()
    deep, wide = counts(model__num_hidden_layers=4), counts(train__micro_batch_size=2)
    assert base.keys() == deep.keys() == wide.keys()
    for key, count in base.items():
        assert deep[key] == count * (2 if key[0].startswith(BLOCK) else 1)
        assert wide[key] == (count if key[1] == "update" else count / 2)


def test_compile_does_not_change_the_report(explained, arguments_of):
    """Shown is what the modules call one by one, also where a recipe compiles them."""
    compiled, _ = explained(arguments_of(TP2 | {"parallel.compile": "true"}), 4)
    eager, _ = explained(arguments_of(TP2), 4)
    assert compiled.config.parallel.compile
    assert (compiled.collectives, compiled.activations) == (eager.collectives, eager.activations)


# ---------------------------------------------------------------------------------------------------------------------
# Forks: another plan, blocks that differ

DEEP = TP2 | {"model.num_hidden_layers": 4}


def plan_with_wildcards(model, tp: int) -> dict:
    """The lines of a block's plan that are alike, in one."""
    plan, wild = real_block_plan(model, tp), {"*norm": "input_layernorm", "self_attn.[kv]_proj": "self_attn.k_proj"}
    wild |= {"m*.gate_*": "mlp.gate_proj", "mlp.up_proj": "mlp.up_proj", "?lp": "mlp"}
    wild |= {name: name for name in ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}
    return {key: plan[line] for key, line in wild.items()}


real_block_plan, real_apply_tp = parallel.block_plan, parallel.apply_tp


def with_wildcards():
    return mock.patch.object(parallel, "block_plan", plan_with_wildcards)


def with_windows():
    return mock.patch.object(model_module, "mask_of", window_in_every_second_block)


class WideBlock(model_module.Block):
    """The last one's feed-forward is twice as wide."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        if layer == config.num_hidden_layers - 1:
            self.mlp = model_module.FeedForward(replace(config, intermediate_size=2 * config.intermediate_size))


def with_a_wide_block():
    return mock.patch.object(model_module, "Block", WideBlock)


class NumberedBlock(model_module.Block):
    """It knows its layer, which changes nothing."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.layer = layer


def with_numbers():
    return mock.patch.object(model_module, "Block", NumberedBlock)


class Bare(torch.nn.Module):
    """A parameter that a plan can name. It is called without an input."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size))

    def forward(self) -> torch.Tensor:
        return self.weight


class ScaledBlock(model_module.Block):
    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.scale = Bare(config.hidden_size)

    def forward(self, *inputs) -> torch.Tensor:
        return super().forward(*inputs) * self.scale()


def with_a_bare_parameter():
    return mock.patch.object(model_module, "Block", ScaledBlock)


def apply_tp_but_once(model: Llama, mesh: parallel.DeviceMesh) -> None:
    """The second block's feed-forward is whole on every tp rank: another layout."""
    real_apply_tp(model, mesh)
    block = model.model.layers[1]
    whole = Llama(replace(model.config, num_hidden_layers=2)).model.layers[1].to("meta").mlp
    for part in (whole.gate_proj, whole.up_proj, whole.down_proj):
        distribute_module(part, mesh)
    whole.register_forward_hook(lambda _, inputs, output: output.redistribute(placements=[Shard(1)]).to_local())
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    block.mlp = parallelize_module(whole, mesh, gather)


def with_another_layout():
    return mock.patch.object(parallel, "apply_tp", apply_tp_but_once)


def calls_of(report: Report, *, by_block: bool = False) -> Counter:
    found = Counter()
    for call in report.collectives:
        found[call.module if by_block else "", call.phase, call.kind, call.axis, call.nbytes] += call.count
    return found


def test_a_plan_with_wildcards_is_reported_as_torch_reads_it(explained, arguments_of):
    plain, text = explained(arguments_of(TP2), 4)
    wild, wild_text = explained(arguments_of(TP2), 4, with_wildcards)
    assert wild.weights == plain.weights
    assert wild_text == text


def test_blocks_that_differ_in_their_mask_are_shown_apart(explained, arguments_of):
    report, text = explained(arguments_of(DEEP), 4, with_windows)
    plain, plain_text = explained(arguments_of(DEEP), 4)
    assert report.blocks == {
        "model.layers.0": ([0, 2], "causal"),
        "model.layers.1": ([1, 3], f"Window(size={WINDOW})"),
    }
    assert plain.blocks == {"model.layers.0": ([0, 1, 2, 3], "causal")}
    assert (calls_of(report), report.memory) == (calls_of(plain), plain.memory)
    lines = [line.split() for line in text.splitlines()]
    assert ["Block", "0", "2", "0,", "2", "causal"] in lines
    assert ["Block", "1", "2", "1,", "3", f"Window(size={WINDOW})"] in lines
    assert "4 blocks of 2 kinds;" in text
    assert "4 blocks;" in plain_text
    for kind in "01":
        assert ["Block", kind, "(FSDP)", "forward", "all-gather", "dp_shard"] in [line[:6] for line in lines]
        assert [f"{kind}.mlp", "PrepareModuleInput"] in [line[:2] for line in lines]


def test_documents_are_shown_with_the_mask(explained, arguments_of):
    report, _ = explained(arguments_of(CASES["document mask, dp2 x tp2"][1]), 4)
    assert report.blocks == {"model.layers.0": ([0, 1], "causal, in its document")}


def test_blocks_that_differ_in_their_shapes_are_counted_each_by_itself(explained, arguments_of):
    """The memory of one rank is that of all parameters, by their shapes."""
    report, _ = explained(arguments_of({"model.num_hidden_layers": 3}), 2, with_a_wide_block)
    plain, _ = explained(arguments_of({"model.num_hidden_layers": 3}), 2)
    assert report.blocks == {"model.layers.0": ([0, 1], "causal"), "model.layers.2": ([2], "causal")}
    assert report.weights["model.layers.2.mlp.up_proj"][1:] == [(144, 50), "R, S(0)", (72, 50)]
    more = 3 * 72 * 50 * 4 // 2  # three matrices of float32, half of them on each rank
    for key in ("parameters", "gradients"):
        assert report.memory[key] == plain.memory[key] + more
    for key in ("gathered block", "gathered at once"):
        assert report.memory[key] == plain.memory[key] + 2 * more
    gathers = {
        call.module: call for call in report.collectives if call.kind == "all-gather" and call.phase == "forward"
    }
    wide, narrow = gathers["model.layers.2 (FSDP)"], gathers["model.layers.0 (FSDP)"]
    assert (narrow.count, wide.count, wide.nbytes - narrow.nbytes) == (2 * 2, 2, 2 * more)


def test_a_module_without_an_input_is_shown(explained, arguments_of):
    report, text = explained(arguments_of({}), 2, with_a_bare_parameter)
    hidden = report.config.model.hidden_size
    assert report.weights["model.layers.0.scale"][1:] == [(hidden,), "R, S(0)", (hidden // 2,)]
    assert ["scale", "()", "-", "()", "-", f"({hidden},)", "-"] in [line.split() for line in text.splitlines()]


def test_blocks_that_differ_in_their_layout_are_shown_apart(explained, arguments_of):
    report, _ = explained(arguments_of(DEEP), 4, with_another_layout)
    assert {kind: layers for kind, (layers, _) in report.blocks.items()} == {
        "model.layers.0": [0, 2, 3],
        "model.layers.1": [1],
    }
    assert report.weights["model.layers.0.mlp.up_proj"][2] == "R, S(0), S(0)"
    assert report.weights["model.layers.1.mlp.up_proj"][2] == "R, S(0), R"


def test_blocks_that_only_know_their_number_are_one_kind(explained, arguments_of):
    plain, text = explained(arguments_of(DEEP), 4)
    numbered, numbered_text = explained(arguments_of(DEEP), 4, with_numbers)
    assert numbered_text == text
    assert numbered.collectives == plain.collectives


def test_the_optimizer_is_the_one_that_trains(explained, arguments_of):
    """Here one that keeps a single moment, so half the state."""
    adam, _ = explained(arguments_of({}), 2)
    sgd, _ = explained(arguments_of({}), 2, with_momentum)
    assert sgd.memory["optimizer state"] == sgd.memory["parameters"]
    assert 2 * adam.memory["parameters"] < adam.memory["optimizer state"] < 2.01 * adam.memory["parameters"]


def with_momentum():
    return mock.patch.object(
        train, "make_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), momentum=0.9)
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


@pytest.mark.parametrize(
    ("config", "world", "more"),
    [
        ("quickstart", 8, []),
        ("quickstart", 1, []),
        ("llama_125m", 8, ["--parallel.tp=2"]),
        ("llama3_1b", 8, []),
        ("llama3_8b", 64, []),
        ("llama3_70b", 512, []),
        ("llama3_70b", 4096, ["--parallel.tp=16", "--parallel.dp_replicate=4", "--train.global_batch_size=2048"]),
    ],
)
def test_recipes_fit_into_100_columns(explained, config, world, more):
    report, text = explained([str(ROOT / "configs" / f"{config}.toml"), *more], world)
    assert max(map(len, text.splitlines())) <= 100
    for name in report.weights:
        assert cost_text.name_text(name) in text
    assert "nan" not in text
    assert len(text.splitlines()) < 150


def test_the_printed_numbers_are_the_reports(explained, arguments_of):
    report, text = explained(arguments_of(TP2 | HSDP), 4)
    lines = [line.split() for line in text.splitlines()]
    call = next(call for call in report.collectives if call.module == f"{BLOCK}.mlp" and call.phase == "forward")
    assert (call.count, call.nbytes) == (4, 24 * 50 * 4)  # 2 blocks x 2 micro-steps; (1, 24, 50) float32
    assert ["mlp", "forward", "all-gather", "tp", "4", "4.7", "KiB", "18.8", "KiB"] in lines
    gathers = [call for call in report.collectives if (call.kind, call.axis) == ("all-gather", "tp")]
    total = sum(call.count * call.nbytes for call in gathers)
    assert ["tp", "all-gather", str(sum(call.count for call in gathers)), *cost_text.size_text(total).split()] in lines
    assert ["parameters", *cost_text.size_text(report.memory["parameters"]).split()] in lines


@pytest.mark.parametrize(
    ("config", "world", "more"),
    [("quickstart", 1, []), ("quickstart", 8, []), ("llama3_8b", 64, []), ("llama3_70b", 512, [])],
)
def test_without_full_the_report_is_one_screen_that_says_where_the_rest_is(explained, config, world, more):
    report, _ = explained([str(ROOT / "configs" / f"{config}.toml"), *more], world)
    lines = cost_text.render(report, explain.IN_SHORT, full=False).splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100
    words = [line.split()[:1] for line in lines]
    assert all([head] in words for head in ("MODULE", "TOTAL", "MEMORY", "--full"))


@pytest.mark.parametrize(("changes", "world"), [({}, 1), ({}, 2), (TP2, 2), (TP2, 4), (TP2 | HSDP, 4), (KEEP, 2)])
def test_the_short_report_has_each_modules_shapes_and_what_it_sends(explained, arguments_of, changes, world):
    report, _ = explained(arguments_of(changes), world)
    rows = cost_text.overview(report)
    heads = [row[0] for row in rows if row[0]]
    assert len(heads) == len(set(heads))
    shown: dict[str, list] = {}
    for head, *rest in rows:
        shown.setdefault(head or next(reversed(shown)), []).append(rest)
    for name, row in report.weights.items():
        here, leaves, *_ = shown[cost_text.name_text(name)][0]
        assert here == row[-1]
        assert leaves.startswith(str(report.activations[name][-1][0]))
    sent = {(head, i, row[2 + i]) for head, those in shown.items() for row in those for i in (0, 1) if row[2 + i]}
    calls = [call for call in report.collectives if call.phase != "update"]
    names = [cost_text.name_text(call.module.removesuffix(" (FSDP)")) for call in calls]
    assert sent == {(name, int(c.phase != "forward"), c.kind) for name, c in zip(names, calls, strict=True)}


def test_the_mesh_is_drawn_with_its_ranks():
    small = torch.arange(8).view(2, 2, 2).tolist()
    rows = [line.split() for line in cost_text.mesh_text(small).splitlines()]
    assert rows == [
        ["dp_replicate", "0", "tp", "0", "tp", "1"],
        ["dp_shard", "0", "0", "1"],
        ["dp_shard", "1", "2", "3"],
        [],
        ["dp_replicate", "1", "tp", "0", "tp", "1"],
        ["dp_shard", "0", "4", "5"],
        ["dp_shard", "1", "6", "7"],
    ]
    large = cost_text.mesh_text(torch.arange(16 * 64 * 16).view(16, 64, 16).tolist())
    assert max(map(len, large.splitlines())) <= 100
    assert len(large.splitlines()) == 9 + 3 + 9  # two sheets, and dots between
    assert large.split()[-1] == str(16 * 64 * 16 - 1)


def command_line(*arguments: str) -> subprocess.CompletedProcess:
    """`python explain.py`, in a shell that holds what torchrun or a cluster may have left."""
    environment = os.environ | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "nowhere"}
    command = [sys.executable, "-W", "error", str(ROOT / "explain.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_prints_the_report_and_nothing_else():
    done = command_line("--parallel.tp=2", "--train.micro_batch_size=4", "--world-size=8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "dp_shard 3     6     7" in done.stdout
    assert explain.IN_SHORT in done.stdout
    assert "what an all-gather" not in done.stdout
    assert explain.HOW_TO_READ in command_line("--world-size=1", "--full").stdout


def test_a_picture_is_drawn_beside_the_text(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["explain.py", "--world-size=1", f"--picture={tmp_path / 'page.svg'}"])
    explain.main()
    assert "MEMORY" in capsys.readouterr().out
    drawn = (tmp_path / "page.svg").read_text()
    assert drawn.startswith("<?xml") and "</svg>" in drawn


@pytest.mark.parametrize(
    ("picture", "message"), [("page.jpg", "a picture is .png or .svg"), ("no/page.png", "cannot be written: No such")]
)
def test_a_picture_that_cannot_be_drawn_gets_one_message(monkeypatch, capsys, tmp_path, picture, message):
    monkeypatch.setattr(sys, "argv", ["explain.py", "--world-size=1", f"--picture={tmp_path / picture}"])
    with pytest.raises(SystemExit, match="2"):
        explain.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / picture).exists()


def test_without_matplotlib_a_picture_is_refused_with_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.delitem(sys.modules, "docs.report", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.setattr(sys, "argv", ["explain.py", "--world-size=1", f"--picture={tmp_path / 'page.png'}"])
    with pytest.raises(SystemExit, match="2"):
        explain.main()
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size=0"], "--world-size=0"),
        (["--world-size=-2"], "--world-size=-2"),
        (["--world-size=many"], "invalid int value: 'many'"),
        (["--world-size=8", "--local-world-size=3"], "--local-world-size=3"),
        (["--world-size=8", "--parallel.tp=3"], "parallel.tp=3"),
        (["--world-size=2", "--model.hiden_size=64"], "did you mean model.hidden_size?"),
        (["nowhere.toml"], "nowhere.toml: cannot be read"),
        (["--world-size=2", "--data.tokenizer=some/where"], "--model.vocab_size="),
        (["--gpu=abacus"], "--gpu=abacus: known are a100-80, "),
        (["--json"], "--gpu=NAME"),
        (["--choose"], "--gpu=NAME"),
        (["--gpu=h100", "--choose", "--picture=a.png"], "--picture show one configuration"),
        (["--gpu=h100", "--choose", "--full"], "--full and"),
        (["--gpu=h100", "--node-link-gbps=0"], "--node-link-gbps=0"),
        (["--gpu=h100", "--world-size=12"], "--world-size=12 with --local-world-size=8"),
        (["--gpu=h100", "--choose", "--model.hiden_size=64"], "did you mean model.hidden_size?"),
    ],
)
def test_bad_input_gets_one_message_and_status_2(monkeypatch, capsys, arguments, message):
    """In this process: it stops before there is a process group."""
    monkeypatch.setattr(sys, "argv", ["explain.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        explain.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("error: ") == 1
    assert not dist.is_initialized()
