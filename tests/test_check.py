"""The eight laws on tiny runs: `make check`, what to run after each change.

It is also the shortest tour of what the project promises. Each law is one test here; its own file has the many cases.
With keys of your own: `make check ARGS="--override model.rope_theta=500000"`. A law keeps the keys that it sets itself
(the mesh, say), all others are yours.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
from collections import Counter
from pathlib import Path
from unittest import mock

import laws
import pytest
import torch
import torch.multiprocessing as mp

import configs
import corpus as corpus_on_disk
import data
import parallel
import train
from corpus.tokenizer import without_rules
from generate import load_run
from model import IGNORE_INDEX, Llama, ModelConfig
from runtime import ranks as runtime_ranks

TINY = {  # the default of a law's run
    "model.hidden_size": 48,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 12,
    "model.num_key_value_heads": 4,
    "data.tokenizer_vocab_size": 300,
    "data.seq_len": 32,
    "optim.lr": 3e-3,
    "optim.eps": 1e-4,  # Adam divides by it or more: where a gradient is nothing but rounding, that stays small
    "optim.warmup_steps": 5,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
}
LAW = {  # what it sets itself
    "train.steps": 20,
    "train.log_every": 1,
    "train.eval_every": 10,
    "checkpoint.every": 10,
    "data.streaming": False,  # the ranks of a test cannot start processes
    "data.num_workers": 0,
}
TIMINGS = ("step_seconds", "tokens_per_second", "mfu", "peak_memory_gib", "data_seconds")
TIMINGS += ("slowest_rank", "slowest_ratio")
MESH = {"parallel.tp": 2}  # of four ranks: dp 2 x tp 2
ALONE = {"train.micro_batch_size": 4}  # of one rank: larger, else a mean over a micro-batch would be the same on both
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# What runs on each rank, in a process group that is there


def run(arguments: list[str], leave_at: int = 0) -> None:
    """The training loop, as a launcher calls it; it may leave when the checkpoint of a step is complete."""
    items = train.train(configs.load(arguments), CPU)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.closing(items):
        for kind, item in items:
            if kind == "checkpoint" and item.name == f"step_{leave_at:08d}":
                return


def watched(arguments: list[str]) -> None:
    with laws.watch():
        run(arguments)


def refusal(arguments: list[str]) -> str:
    try:
        run(arguments)
    except runtime_ranks.UserError as error:
        return str(error)
    return "no error"


def never_written(arguments: list[str]) -> list[str]:
    """Parameters and buffers that still hold NaN after they were made as train.py makes them."""
    config = configs.settle(configs.load(arguments), vocabulary=300, num_rows=None)
    with torch.device("meta"):
        model = Llama(config.model)
    parallel.parallelize(model, parallel.build_mesh(config.parallel, CPU), config.parallel)
    model.to_empty(device=CPU)
    tensors = {name: parallel.to_local(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(torch.nan)
    model.init_weights(config.train.seed, parallel.place_shard)
    tensors = {name: parallel.to_local(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return [name for name, tensor in tensors.items() if tensor.isnan().any()]


def targets_of_an_epoch(arguments: list[str], texts: list[str]) -> tuple[Counter, Counter]:
    """How often each token is a target in an epoch of one-row steps, and how often it should be."""
    config, targets = configs.load(arguments), Counter()
    with corpus_on_disk.opened(config.data, Path(config.run.dir), 1, None, lambda: 0) as corpus:
        order = (corpus.source, 1, corpus.num_rows, 1, 1, config.train.seed)
        with data.batches(*order, dp_rank=0, dp_size=1, num_workers=0, device=CPU) as batches:
            for _, row, *_ in batches:
                targets.update(row[row != IGNORE_INDEX].tolist())
        tokenizer = without_rules(corpus.tokenizer, corpus.special)
        documents = [[*tokenizer.encode(text, add_special_tokens=False).ids, corpus.special.eos] for text in texts]
    return targets, Counter(token for document in documents for token in document)


def run_until_killed_in_the_second_save(arguments: list[str], cache: Path) -> None:
    """In a process of its own, at the last moment before the checkpoint would count."""
    runtime_ranks.init_distributed()
    torch.set_num_threads(1)  # as in the other processes: sums in another order have other bits
    rename, saves = Path.rename, []

    def rename_or_die(path: Path, target: Path) -> Path:
        saves.extend([path] if path.name.startswith(".tmp-step_") else [])
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    with mock.patch.object(Path, "rename", rename_or_die), mock.patch("datasets.config.HF_DATASETS_CACHE", cache):
        run(arguments)


# ---------------------------------------------------------------------------------------------------------------------


class Runs:
    """Starts runs on so many ranks, in `folder`. A law's own keys win over those of --override, and these over TINY."""

    def __init__(self, ranks, overrides, corpus: Path, folder: Path):
        self.ranks, self.overrides, self.corpus, self.folder, self.done = ranks, overrides, corpus, folder, {}

    def arguments(self, name: str, own: dict) -> list[str]:
        own = LAW | {"data.dataset": str(self.corpus)} | own | {"run.dir": str(self.folder / name)}
        values = TINY | self.overrides.beside(own) | own
        return [f"--{key}={configs.toml_value(value)}" for key, value in values.items()]

    def __call__(self, world: int, function, name: str, own: dict, *more) -> list:
        """What `function(arguments, *more)` returns on each rank."""
        return self.ranks(world, in_cache, function, self.folder / "cache", self.arguments(name, own), *more)

    def reference(self, world: int) -> Path:
        """The directory of an uninterrupted run on one rank or on four."""
        name = f"on {world}"
        if name not in self.done:
            self.done[name] = self(world, run, name, ALONE if world == 1 else MESH)
        return self.folder / name


def in_cache(function, cache: Path, *arguments) -> object:
    with mock.patch("datasets.config.HF_DATASETS_CACHE", cache):
        return function(*arguments)


@pytest.fixture(scope="module")
def runs(ranks, overrides, corpus, tmp_path_factory) -> Runs:
    return Runs(ranks, overrides, corpus, tmp_path_factory.mktemp("check"))


def metrics(run_dir: Path) -> list[dict]:
    """All that was logged, but for what a clock says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_run(run_dir, CPU)[0].state_dict()


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Bit for bit."""
    assert metrics(run_dir) == metrics(reference)
    ours, theirs = weights(run_dir), weights(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# ---------------------------------------------------------------------------------------------------------------------
# The laws


def test_law_1_the_mesh_does_not_change_the_result(runs, overrides):
    """float32 sums in another order differ by 1e-7; training amplifies that."""
    if (dtype := overrides.values.get("parallel.param_dtype", "float32")) != "float32":
        pytest.skip(f"law 1 speaks of float32, not of parallel.param_dtype={dtype}")
    alone, mesh = metrics(runs.reference(1)), metrics(runs.reference(4))
    assert [line["step"] for line in alone] == [line["step"] for line in mesh]
    assert {line["step"] for line in alone} == set(range(1, 21))
    for ours, theirs in zip(mesh, alone, strict=True):
        tolerance = 1e-6 if theirs["step"] == 1 else 1e-5
        for key in theirs.keys() & {"loss", "grad_norm", "val_loss"}:
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), f"step {theirs['step']}, {key}"
        assert ours.get("tokens") == theirs.get("tokens")
    validated = [line["val_loss"] for line in alone if "val_loss" in line]
    assert validated == sorted(set(validated), reverse=True), "nothing was learned, so that nothing was compared"


def test_law_2_stopping_does_not_change_the_result(runs):
    """Half a run, left as a launcher may leave it; then the same command again."""
    runs(4, run, "stopped", MESH, 10)
    assert 10 <= metrics(runs.folder / "stopped")[-1]["step"] < 20
    runs(4, run, "stopped", MESH)
    assert_same_run(runs.folder / "stopped", runs.reference(4))


def test_law_3_no_token_is_lost_or_repeated(runs, corpus):
    own = {"data.val_fraction": 0, "train.global_batch_size": 1, "train.micro_batch_size": 1}
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    ((targets, expected),) = runs(1, targets_of_an_epoch, "epoch", own, texts)
    assert targets == expected


def test_law_4_it_is_a_llama(overrides):
    """Weights move in with no key map; logits and gradients are those of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = {key: value for key, value in TINY.items() if key.startswith("model.")}
    keys |= {"model.vocab_size": 384, "model.max_position_embeddings": 32} | overrides.beside(only="model.")
    model_config = ModelConfig(**{key.removeprefix("model."): value for key, value in keys.items()})
    shape = dataclasses.asdict(model_config)
    scaling, theta = shape.pop("rope_scaling"), shape.pop("rope_theta")
    unknown = [f"model.{key}" for key in shape if not hasattr(LlamaConfig(), key)]
    if other := [key for key in unknown if shape[key.removeprefix("model.")] != configs.defaults()[key]]:
        pytest.skip(f"law 4 cannot apply: transformers' LlamaConfig has no {', '.join(other)}")
    known = {key: value for key, value in shape.items() if f"model.{key}" not in unknown}
    rope = {"rope_type": "default", **scaling, "rope_theta": theta}
    theirs = LlamaForCausalLM(LlamaConfig(**known, rope_parameters=rope))
    ours = Llama(model_config)
    ours.init_weights(seed=0)
    with torch.no_grad():
        for parameter in ours.parameters():  # larger than at the start, so that attention is not almost uniform
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.3)
    theirs.load_state_dict(ours.state_dict(), strict=True)

    tokens = torch.randint(384, (3, 33), generator=torch.Generator().manual_seed(0))
    input_ids, targets = tokens[:, :-1], tokens[:, 1:]
    logits = theirs(input_ids).logits
    torch.testing.assert_close(ours(input_ids), logits, rtol=1e-5, atol=1e-5)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours(input_ids, targets).backward()
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(name).grad
        assert (parameter.grad - other).norm() < 1e-5 * other.norm(), name


def test_law_5_nothing_is_uninitialised(runs):
    """Every parameter and buffer is NaN first, on each rank of the mesh."""
    assert runs(4, never_written, "poisoned", MESH) == [[], [], [], []]


def test_law_6_a_crash_costs_the_steps_since_the_last_checkpoint(runs):
    arguments = runs.arguments("killed", ALONE)
    killed = mp.get_context("spawn").Process(
        target=run_until_killed_in_the_second_save, args=(arguments, runs.folder / "cache")
    )
    killed.start()
    killed.join(timeout=120)
    assert killed.exitcode == -signal.SIGKILL
    left = {path.name for path in (runs.folder / "killed" / "checkpoints").iterdir()}
    assert left == {"step_00000010", ".tmp-step_00000020"}, "what was not complete does not count"
    runs(1, run, "killed", ALONE)
    assert_same_run(runs.folder / "killed", runs.reference(1))


def test_law_7_bad_input_gets_one_clear_message(runs):
    """With value, rule and remedy; all that is wrong at once; on all ranks alike; and nothing is written."""
    wrong = ["--optim.lr=0", "--data.seq_len=33", "--parallel.tp=2", "--train.stepz=3"]
    with pytest.raises(configs.ConfigError) as error:
        configs.load([*runs.arguments("wrong", {"model.num_hidden_layers": 2}), *wrong], world=2)
    messages = str(error.value).splitlines()
    assert len(messages) == 3
    assert messages[0] == "optim.lr=0.0 is not above 0"
    assert "did you mean train.steps?" in messages[1]
    assert "data.seq_len=33 is not divisible by parallel.tp=2: use tp in {1}" in messages[2]

    missing = {"data.dataset": str(runs.folder / "missing.jsonl")}
    (message, *others) = runs(4, refusal, "refused", MESH | missing)
    assert f"data.dataset='{missing['data.dataset']}' cannot be loaded" in message
    assert others == [message] * 3
    assert not (runs.folder / "refused").exists()


def test_law_8_tp_peers_see_the_same_rows_and_dp_ranks_others(runs):
    runs(4, watched, "watched", MESH | {"train.steps": 5})
