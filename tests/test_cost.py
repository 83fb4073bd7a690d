"""What explain.py predicts of memory and time: against real ranks, published figures, and itself."""

import json
import math
import multiprocessing
import re
import statistics
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_explain import command_line
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import configs
import explain
import parallel
import train
from benchmarks import published
from cost import hardware
from cost.choose import CHECKPOINTING, KEYS, Choice, choose
from cost.operations import Tape, kernels, live_bytes
from cost.predict import Prediction, predict
from model import Llama, flops_per_token
from runtime.monitor import PEAK_FLOPS, Forecast

ROOT = Path(__file__).parent.parent
SIZES = {
    "model.vocab_size": 512,
    "model.hidden_size": 96,
    "model.intermediate_size": 256,
    "model.num_hidden_layers": 5,
    "model.num_attention_heads": 8,
    "model.num_key_value_heads": 4,
    "data.tokenizer_vocab_size": 512,
    "data.seq_len": 128,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "parallel.tp": 1,
}


@pytest.fixture(scope="session")
def arguments_of(tmp_path_factory) -> Callable[..., list[str]]:
    """The command line of SIZES with changes, on top of an empty recipe."""
    recipe = tmp_path_factory.mktemp("cost") / "empty.toml"
    recipe.write_text("")
    return lambda changes: [str(recipe), *(f"--{key}={str(x).lower()}" for key, x in (SIZES | changes).items())]


@pytest.fixture(scope="session")
def elsewhere() -> Callable:
    """`elsewhere(function, *arguments)` in a process of its own: the pretended group must not meet this process's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda *call: pool.submit(*call).result()


def predicted(arguments: list[str], world: int, gpu: str = "h100", local_world: int = 8, **changes) -> Prediction:
    card = replace(hardware.named(gpu), **changes)
    config = explain.load(arguments, world, min(world, local_world))
    report = explain.explain(config, world, train.make_optimizer, card.memory_gib)
    return predict(report, card, min(world, local_world))


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Watch(TorchDispatchMode):
    """The most bytes that are alive at once: of everything that any operation has met, whoever made it."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.most, self.alive = 0, {}
        self.meet(known)

    def meet(self, values) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor):  # DTensor's are of no memory
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self.meet((args, kwargs, result))
        storages = {address: reference() for address, reference in self.alive.items()}
        self.alive = {address: self.alive[address] for address, storage in storages.items() if storage is not None}
        self.most = max(self.most, sum(storage.nbytes() for storage in storages.values() if storage is not None))
        return result


def real_peak(arguments: list[str]) -> int:
    """Bytes of this rank at the worst moment of a step, measured on a step that is not the first."""
    world, cpu = dist.get_world_size(), torch.device("cpu")
    config = configs.load(arguments, world, world)
    mesh = parallel.build_mesh(config.parallel, cpu)
    with torch.device("meta"):
        model = Llama(config.model)
    parallel.parallelize(model, mesh, config.parallel)
    model.to_empty(device=cpu)
    model.init_weights(0, parallel.place_shard)
    optimizer = train.make_optimizer(model, config.optim)
    micro_steps = config.train.global_batch_size * config.parallel.tp // (config.train.micro_batch_size * world)
    rows = torch.randint(config.model.vocab_size, (config.train.micro_batch_size, config.data.seq_len))

    def step() -> None:
        for number in range(1, micro_steps + 1):
            parallel.sum_over_replicas(model, config.parallel, number == micro_steps)
            with parallel.loss_context(mesh):
                model(rows, rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    known = [parallel.to_local(tensor.detach()) for tensor in (*model.parameters(), *model.buffers(), *state)]
    with Watch(known) as watch:
        step()
    return watch.most


def predicted_peak(arguments: list[str], world: int) -> int:
    """On a CPU."""
    config = explain.load(arguments, world, world)
    report = explain.explain(config, world, train.make_optimizer)
    return sum(predict(report, hardware.named("h100"), world).bytes.values())


FULL, SELECTIVE = ({"parallel.activation_checkpointing": kind} for kind in ("full", "selective"))
TP2, KEEP = {"parallel.tp": 2}, {"parallel.reshard_after_forward": False}
ONE_MICRO_STEP = {"train.global_batch_size": 4}
MEMORY_CASES = {
    "one rank": (1, {}),
    "dp2, full, one micro-step": (2, FULL | ONE_MICRO_STEP),
    "dp2, reshard off": (2, KEEP),
    "hsdp 2 x 2": (4, {"parallel.dp_replicate": 2}),
    "tp2": (2, TP2 | {"train.global_batch_size": 2}),
    "dp2 x tp2, selective": (4, TP2 | SELECTIVE | ONE_MICRO_STEP),
    "dp2 x tp2, bf16": (4, TP2 | ONE_MICRO_STEP | {"parallel.param_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_predicted_memory_is_what_a_real_rank_reaches(ranks, elsewhere, arguments_of, case):
    world, changes = MEMORY_CASES[case]
    arguments = arguments_of(changes)
    real = max(ranks(world, real_peak, arguments))
    assert elsewhere(predicted_peak, arguments, world) == pytest.approx(real, rel=0.03)


class SwiGLU(nn.Module):
    """The feed-forward of the tutorials on tensor parallelism."""

    def __init__(self, width: int):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def tutorial(tp: int) -> tuple[float, float]:
    """GB at most in its set-up and in a step: width 8192, AdamW, 8 rows, on one of `tp` GPUs."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    try:
        step_number = mock.patch("torch.optim.adam._get_value", return_value=1.0)  # a tensor without memory has none
        mesh = init_device_mesh("cpu", (tp,))
        with FakeTensorMode(allow_non_fake_inputs=True), step_number:
            model = SwiGLU(8192)
            with Tape() as setup:  # each whole matrix goes to the device and is cut there; w2's columns are copies
                slices = [distribute_tensor(torch.zeros(8192, 8192), mesh, [Shard(dim)]) for dim in (0, 1, 0)]
            plan = {"w1": ColwiseParallel(), "w2": RowwiseParallel(), "w3": ColwiseParallel()}
            parallelize_module(model, mesh, plan)
            del slices
            optimizer = torch.optim.AdamW(model.parameters(), foreach=True)  # as on a GPU
            model(torch.ones(8, 8192)).sum().backward()
            optimizer.step()  # now there is what stays
            optimizer.zero_grad()
            tensors = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
            stays = sum(parallel.to_local(tensor).nbytes for tensor in tensors)
            with Tape() as step:
                model(torch.ones(8, 8192)).sum().backward()
                optimizer.step()
    finally:
        dist.destroy_process_group()
    return max(live_bytes(setup)[0]) / 1e9, (stays + max(live_bytes(step)[0])) / 1e9


@pytest.mark.parametrize(("tp", "published_gb", "shows"), [(1, 4.04, 1), (2, 2.03, 1), (4, 1.02, 1), (8, 0.60, 0)])
def test_the_tutorials_table_of_memory(elsewhere, tp, published_gb, shows):
    """Lightning Fabric's page on tensor parallelism. With 8 GPUs it shows the set-up: a step alone takes 0.50 GB."""
    peaks = elsewhere(tutorial, tp)
    assert max(peaks) == peaks[shows]
    assert peaks[shows] == pytest.approx(published_gb, rel=0.05)
    if tp == 8:
        assert peaks[1] == pytest.approx(0.50, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Time


def flops_of(arguments: list[str], world: int) -> tuple[float, float, int]:
    """Of matrix products and of attention on rank 0 in a micro-step; and PaLM's count for its rows."""
    config = explain.load(arguments, world, world)
    report = explain.explain(config, world, train.make_optimizer)
    run, kinds = kernels(report.trace.tape), ("matmul", "attention")
    found = {kind: sum(kernel.flops for kernel in run if kernel.kind == kind) for kind in kinds}
    tokens = config.train.micro_batch_size * config.data.seq_len
    return *found.values(), tokens * flops_per_token(config.model, config.data.seq_len)


def test_counted_flops_are_those_of_the_model(elsewhere, arguments_of):
    """One block stands for all, so one is all. PaLM counts norms too, and attention without mask and recomputing."""
    one = {"model.num_hidden_layers": 1}
    products, attention, palm = elsewhere(flops_of, arguments_of(one), 1)
    tokens, width = 2 * 128, 96
    norms = 6 * tokens * 3 * width
    assert products + attention * 2 * 12 / 14 + norms == palm  # forward 4, backward 10 of T x T x hd; PaLM has 12
    halves = elsewhere(flops_of, arguments_of(one | TP2), 2)
    assert [2 * count for count in halves[:2]] == [products, attention]
    again, *_ = elsewhere(flops_of, arguments_of(one | FULL), 1)
    head = 6 * tokens * width * 512
    assert products < again <= products + (products - head) / 3  # the block's last product is not needed again


def test_parts_add_up_and_follow_what_causes_them(elsewhere):
    """Llama 3 8B on 16 GPUs in two nodes."""
    recipe = [str(ROOT / "configs" / "llama3_8b.toml"), "--train.global_batch_size=64"]

    def of(*changes: str, **card: float) -> Prediction:
        return elsewhere(run_predicted, [*recipe, *changes], card)

    whole = of("--parallel.tp=1")
    assert sum(whole.seconds.values()) == pytest.approx(whole.step_seconds)
    assert whole.seconds["exposed TP"] == 0
    cut = of("--parallel.tp=4")
    assert cut.seconds["exposed TP"] > 0.05 * cut.step_seconds
    assert of("--parallel.tp=4", link=1e10).seconds["exposed TP"] > 10 * cut.seconds["exposed TP"]
    assert of("--parallel.tp=1", node_link=1e9).seconds["exposed FSDP"] > 10 * whole.seconds["exposed FSDP"]
    assert of("--parallel.tp=1", launch=1e-2).seconds["rest"] > whole.step_seconds
    hsdp = ["--parallel.tp=1", "--parallel.dp_replicate=8"]  # bf16: half the bytes, but in each of two micro-steps
    slow = [of(*hsdp, f"--parallel.reduce_dtype={kind}", node_link=1e8) for kind in ("float32", "bfloat16")]
    assert slow[1].seconds["exposed FSDP"] > 0.9 * slow[0].seconds["exposed FSDP"]
    eager = of("--parallel.tp=1", "--parallel.compile=false")
    assert eager.step_seconds > whole.step_seconds
    kinds = [of("--parallel.tp=1", f"--parallel.activation_checkpointing={kind}") for kind in CHECKPOINTING]
    assert [each.seconds["compute"] for each in kinds] == sorted(each.seconds["compute"] for each in kinds)
    assert [each.memory_gib for each in kinds] == sorted((each.memory_gib for each in kinds), reverse=True)
    assert [each.fits for each in kinds] == [False, True, True]


def run_predicted(arguments: list[str], card: dict[str, float]) -> Prediction:
    return predicted(arguments, 16, **card)


@pytest.mark.parametrize(
    ("slow", "changes", "says"),
    [
        ("exposed TP", {}, "50% of the step is exposed TP: TP's collectives stand in the way: a smaller tp"),
        ("exposed FSDP", {}, "50% of the step is exposed FSDP: .*: more rows at once"),
        ("rest", {}, "50% of the step is rest: the host launches kernels more slowly"),
        ("optimizer", {}, "50% of the step is optimizer: .*: a larger global_batch_size"),
        ("", {}, "100% of the step is compute: would help: param_dtype=bfloat16; compile."),
        ("", FULL, "would help: param_dtype=bfloat16; compile; less checkpointing, if it fits."),
        ("", {"parallel.param_dtype": "bfloat16", "parallel.compile": True}, "what is left is the speed of the GPU."),
    ],
)
def test_a_sentence_says_what_bounds_the_step_and_what_would_help(arguments_of, slow, changes, says):
    plan = explain.load(arguments_of(changes), 1, 1).parallel
    seconds = dict.fromkeys(("compute", "exposed TP", "exposed FSDP", "optimizer", "rest"), 0.0) | {"compute": 1.0}
    made = Prediction(hardware.named("h100"), plan, seconds | ({slow: 1.0} if slow else {}), {"gradients": 1}, 1.0, 0.5)
    assert re.search(says, made.bound())
    made.bytes["activations"] = 80 * 2**30
    assert re.match(r"It takes 80.0 GiB, more than 90% of 79.1 GiB: most of it is activations;", made.bound())


def test_a_collective_takes_what_a_ring_takes():
    card = replace(hardware.named("h100"), link=1e9, node_link=1e8, latency=0.5, hop=0.0)
    assert card.collective("all-gather", 10**9, 1, 8) == 0
    assert card.collective("all-gather", 10**9, 4, 8) == pytest.approx(0.5 + 3 / 4)
    assert card.collective("all-reduce", 10**9, 4, 8) == pytest.approx(0.5 + 2 * 3 / 4)
    assert card.collective("reduce-scatter", 10**9, 16, 8) == pytest.approx(0.5 + 15 / 16 / 0.8)  # 8 cards a node
    assert card.collective("all-gather", 10**9, 2, 1) == pytest.approx(0.5 + 1 / 2 / 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Truth


def predictions_of(indices: list[int], folder: Path) -> list[Prediction]:
    (empty := folder / "empty.toml").touch()
    return [published.prediction_of(published.ROWS[index], empty) for index in indices]


def test_published_runs_are_predicted(elsewhere, tmp_path):
    """Those of torchtitan on H100s, all with a memory, and a few of each other source."""
    indices = [*range(8), 10, 14, 15, 18, 22, 25, 26]
    rows, made = [published.ROWS[index] for index in indices], elsewhere(predictions_of, indices, tmp_path)
    errors = [abs(each.tokens_per_second / row.tokens - 1) for row, each in zip(rows, made, strict=True)]
    assert statistics.median(errors) <= 0.10
    assert max(errors) <= 0.25
    assert published.wrong_order(rows, made) == []
    for row, each in zip(rows, made, strict=True):
        if row.memory_gib:
            assert each.memory_gib / 0.9 == pytest.approx(row.memory_gib, rel=0.10)


def test_a_wrong_order_is_found():
    row = published.ROWS[0]
    slow, fast = (mock.Mock(tokens_per_second=speed) for speed in (1, 2))
    pair = [replace(row, tokens=100), replace(row, tokens=111)]
    assert published.wrong_order(pair, [slow, fast]) == []
    assert published.wrong_order(pair, [fast, slow]) == [tuple(pair)]
    assert published.wrong_order([row, replace(row, tokens=1.05 * row.tokens)], [fast, slow]) == []  # not far apart


def predictions_of_recipes(worlds: dict[str, int]) -> list[str]:
    """As their headers say it."""
    texts = []
    for name, world in worlds.items():
        made = predicted([str(ROOT / "configs" / name)], world)
        mfu = f"MFU {100 * made.mfu:.1f} %"
        texts.append(f"{made.tokens_per_second:,.0f} tokens/s per GPU, {mfu}, {made.memory_gib:.1f} GiB")
    return texts


def test_the_headers_of_recipes_say_what_is_predicted(elsewhere):
    headers = {path.name: path.read_text().partition("\n[")[0] for path in (ROOT / "configs").glob("llama*.toml")}
    worlds = {name: int(re.search(r"--world-size=(\d+) --gpu=h100", text)[1]) for name, text in headers.items()}
    assert len(worlds) == 4
    for text, said in zip(headers.values(), elsewhere(predictions_of_recipes, worlds), strict=True):
        assert said in text.replace("\n# ", " ")


# ---------------------------------------------------------------------------------------------------------------------
# Hardware


def test_names_are_case_insensitive_and_those_of_torch_find_their_row():
    assert hardware.named("H100").name == hardware.named("h100").name == "h100"
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100-80"}
    for name, row in (names | {"NVIDIA H200": "h200", "NVIDIA B200": "b200"}).items():
        assert hardware.named(name).name == row
    with pytest.raises(ValueError, match=r"--gpu=NVIDIA H100 PCIe: known are a100-80, .*hardware.toml"):
        hardware.named("NVIDIA H100 PCIe")


def test_a_card_between_nodes_is_given_in_gigabits():
    assert hardware.named("h100", 400).node_link == pytest.approx(47e9)


def test_mfu_is_measured_and_predicted_against_the_same_peak():
    for name, row in hardware.known().items():
        assert row.flops == PEAK_FLOPS[name.partition("-")[0].upper()]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_json_is_one_object_and_what_does_not_fit_is_still_predicted():
    done = command_line("configs/llama3_8b.toml", "--world-size=8", "--gpu=A100-40", "--json", "--parallel.tp=1")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["fits"] is False
    assert sum(said["step_parts_seconds"].values()) == pytest.approx(said["step_seconds"])
    assert sum(said["memory_parts_gib"].values()) == pytest.approx(said["memory_gib"])
    tokens = 512 * 8192 / said["step_seconds"] / 8
    assert said["tokens_per_second_per_gpu"] == pytest.approx(tokens)
    config = configs.load([str(ROOT / "configs" / "llama3_8b.toml")], 64, 8)
    assert said["mfu"] == pytest.approx(tokens * flops_per_token(config.model, 8192) / 312e12)


def test_the_report_ends_with_the_prediction():
    done = command_line("--world-size=2", "--gpu=h100", "--parallel.tp=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    *_, last = done.stdout.split("\n\n")
    assert "of the step is" in last  # what bounds it
    assert "ON 2 x H100: " in done.stdout


SMALL = ["--world-size=4", "--local-world-size=2", "--gpu=h100", "--train.global_batch_size=8"]
SMALL += ["--train.micro_batch_size=3", "--model.num_hidden_layers=1", "--model.hidden_size=1024"]  # 3 is replaced
SMALL += ["--model.intermediate_size=4096", "--data.seq_len=2048"]


def test_choices_are_ordered_fit_and_can_be_pasted():
    done = command_line(*SMALL, "--choose", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    choices = said["choices"]
    assert 2 <= len(choices) <= 10
    assert said["faster"] is None
    assert all(each["fits"] for each in choices)
    assert [each["step_seconds"] for each in choices] == sorted(
        (each["step_seconds"] for each in choices), key=lambda seconds: round(math.log(seconds), 2)
    )
    assert {each["parallel.tp"] for each in choices} == {1, 2}
    best = choices[0]
    pasted = json.loads(command_line(*SMALL, *best["arguments"].split(), "--json").stdout)
    assert pasted["step_seconds"] == pytest.approx(best["step_seconds"], rel=0.01)
    assert pasted["memory_gib"] == pytest.approx(best["memory_gib"], rel=0.01)
    assert best["arguments"].split() == [f"--{key}={str(best[key]).lower()}" for key in KEYS]
    shown = command_line(*SMALL, "--choose").stdout
    assert best["arguments"] in shown


def test_what_fits_comes_before_what_is_faster_and_that_before_what_is_smaller():
    made = [(True, 1.0, 9.0), (True, 1.001, 8.0), (True, 2.0, 1.0), (False, 0.5, 99.0)]  # fits, seconds, GiB
    predictions = [mock.Mock(fits=fits, step_seconds=seconds, memory_gib=gib) for fits, seconds, gib in made]
    order = sorted((Choice((), each) for each in predictions), key=Choice.rank)
    assert [predictions.index(choice.prediction) for choice in order] == [1, 0, 2, 3]  # a thousandth is not faster


def chosen(arguments: list[str], local_world: int, card: dict[str, float]) -> tuple[list, object]:
    config, gpu = explain.load(arguments, 4, local_world), replace(hardware.named("h100"), **card)
    return choose(config, 4, local_world, gpu, train.make_optimizer)


def test_what_is_faster_but_does_not_fit_is_named_and_nothing_is_an_error(elsewhere, arguments_of):
    arguments = arguments_of({"data.seq_len": 4096, "train.global_batch_size": 16, "train.micro_batch_size": 1})
    fitting, faster = elsewhere(chosen, arguments, 4, {"memory_gib": 0.2})
    assert faster is not None
    assert not faster.prediction.fits
    assert faster.prediction.step_seconds < fitting[0].prediction.step_seconds
    with pytest.raises(ValueError, match=r"nothing fits 4 x h100: the least is .* GiB with --parallel.tp="):
        elsewhere(chosen, arguments, 4, {"memory_gib": 0.001})


def test_where_links_between_nodes_are_slow_each_node_has_a_copy_and_weights_are_gathered_once(elsewhere, arguments_of):
    arguments = arguments_of({"train.global_batch_size": 4, "train.micro_batch_size": 1})
    fitting, _ = elsewhere(chosen, arguments, 2, {"node_link": 1e8, "link": 1e9})
    _, dp_replicate, _, _, reshard = next(choice.key for choice in fitting if choice.key[0] == 1)
    assert (dp_replicate, reshard) == (2, False)


def test_a_run_says_what_was_predicted_beside_what_it_measures(tmp_path):
    """Once, without waiting; nothing for a GPU that is not in the table."""
    config = configs.load(["--model.num_hidden_layers=1", "--model.vocab_size=4096"], 2, 2)
    (tmp_path / "config.toml").write_text(configs.to_toml(config))
    line = {"tokens_per_second": 3000.0, "peak_memory_gib": 0.5}
    known, unknown = (Forecast(tmp_path, gpu, 2, 2) for gpu in ("NVIDIA H100 80GB HBM3", "abacus"))
    assert known.beside(line) == ""  # it has only begun
    for each in (known, unknown):
        each.process.wait(timeout=120)
    said = known.beside(line)
    assert said.startswith("predicted ")
    assert said.endswith("measured 1,500 tokens/s per GPU and 0.5 GiB at most")
    assert [known.beside(line), unknown.beside(line)] == ["", ""]
    running = Forecast(tmp_path, "h100", 2, 2)
    start = time.perf_counter()
    for each in (running, known, unknown):
        each.stop()
    assert time.perf_counter() - start < 5
    assert running.process.poll() is not None
