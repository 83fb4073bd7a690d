"""How a configuration is read, checked and resolved; law 7 for what a user can write. No process group, no data."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from itertools import takewhile
from pathlib import Path

import pytest
import torch

import configs
import train
from benchmarks.lines import ROOT
from configs import HINTS, SECTIONS, Config, ConfigError, OptimConfig, TrainConfig, flatten, to_toml, toml_value
from model import Llama, ModelConfig, parameter_count
from runtime import hardware
from runtime.ranks import UserError

RECIPES = sorted(Path(configs.__file__).parent.glob("*.toml"))
LLAMA_3_1 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3_1 |= {"original_max_position_embeddings": 8192}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Neither torchrun's environment nor this machine's GPUs and memory decide what a test sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "memory_per_rank", lambda local_world: math.inf)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def on_ranks(monkeypatch):
    """`on_ranks(16, 8)`: as if torchrun had started 16 processes, 8 a node."""

    def start(world: int, local_world: int = 0) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world or world))

    return start


@pytest.fixture
def memory(monkeypatch):
    """`memory(2**30)`: as if so many bytes were left on each machine, or if `gpu`, on each GPU."""

    def set_to(size: float, gpu: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        monkeypatch.setattr(hardware, "memory_per_rank", lambda local_world: size / (1 if gpu else local_world))

    return set_to


@pytest.fixture
def toml(tmp_path):
    """`toml(text)`: the path of a config file."""

    def write(text: str = "", name: str = "recipe.toml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def value_of(config: Config, name: str):
    return flatten(config)[name]


def errors_of(*arguments: str) -> list[str]:
    """A line each."""
    with pytest.raises(ConfigError) as refusal:
        configs.load(list(arguments))
    return str(refusal.value).splitlines()


def arguments_of(values: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Precedence and the command line


def test_defaults_then_file_then_command_line(toml):
    file = toml("[optim]\nlr = 0.5\nbetas = [0.1, 0.2]\n\n[train]\nsteps = 200\n")
    config = configs.load([file, "--optim.lr=0.25", "--train.seed=3"])
    assert (config.optim.lr, config.train.seed) == (0.25, 3)
    assert (config.optim.betas, config.train.steps) == ((0.1, 0.2), 200)
    assert (config.optim.eps, config.train.log_every) == (configs.OptimConfig().eps, configs.TrainConfig().log_every)


def test_overrides_stand_anywhere_and_the_last_one_counts(toml):
    assert configs.load(["--train.seed=1", toml("[train]\nseed = 9\n"), "--train.seed=2"]).train.seed == 2


def test_without_a_file_it_is_quickstart_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load([]) == configs.load([str(configs.QUICKSTART)])
    assert configs.load([]).run.dir == "runs/quickstart"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("train.seed=12", 12),
        ("train.seed=-1_000", -1000),
        ("optim.lr=3", 3.0),
        ("optim.lr=3e-4", 3e-4),
        ("parallel.compile=true", True),
        ("parallel.reshard_after_forward=false", False),
        ("data.layout=pack", "pack"),
        ('data.layout="pack"', "pack"),
        ("parallel.tp=1", 1),
        ("optim.betas=[0.5, 0]", (0.5, 0.0)),
        ("run.profile_steps=[3, 7]", [3, 7]),
        ("run.profile_steps=[]", []),
        (f"model.rope_scaling={toml_value(LLAMA_3_1)}", LLAMA_3_1),
        # strings need no quotes, whatever they look like
        ("run.dir=7", "7"),
        ("run.dir=true", "true"),
        ("run.dir=[1]", "[1]"),
        ("run.dir=a b=c # d", "a b=c # d"),
        ("run.dir='a b'", "a b"),
        ("run.dir=über/日本", "über/日本"),
        ("data.bos_token=<|begin_of_text|>", "<|begin_of_text|>"),
        ("data.eos_token=", ""),
    ],
)
def test_values_on_the_command_line(argument, expected):
    value = value_of(configs.load([f"--{argument}"]), argument.partition("=")[0])
    assert value == expected
    assert type(value) is type(expected)


def test_every_key_can_be_set_in_a_file_and_on_the_command_line(toml):
    """Its own default, written out, changes nothing."""
    defaults = configs.load([toml()])
    for name, value in flatten(defaults).items():
        section, key = name.split(".")
        text = json.dumps(value)
        assert configs.load([toml(f"[{section}]\n{key} = {text}\n")]) == defaults, name
        assert configs.load([toml(), f"--{name}={text}"]) == defaults, name


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("model.hiden_size", "model.hidden_size"),
        ("modle.hidden_size", "model.hidden_size"),
        ("train.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("trian.stepz", "train.steps"),
        ("model.num_atention_heads", "model.num_attention_heads"),
        ("parallel.dp", "parallel.tp"),
    ],
)
def test_an_unknown_key_names_the_nearest(toml, written, meant):
    section, _, key = written.rpartition(".")
    in_file = f"[{section}]\n{key} = 1\n" if section else f"{key} = 1\n"
    for arguments in ([f"--{written}=1"], [toml(in_file)]):
        (error,) = errors_of(*arguments)
        assert written in error
        assert f"did you mean {meant}?" in error


@pytest.mark.parametrize("argument", ["--zebra=1", "--=1", "--zebra.quagga=1"])
def test_an_unknown_key_that_is_near_nothing_names_the_sections(argument):
    (error,) = errors_of(argument)
    assert all(section in error for section in SECTIONS)
    assert "--help" in error


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("train.steps", "1e3", "integer"),
        ("train.steps", "true", "integer"),
        ("train.steps", "ten", "integer"),
        ("train.steps", "", "integer"),
        ("optim.lr", "fast", "number"),
        ("optim.lr", "nan", "number"),
        ("optim.lr", "true", "number"),
        ("parallel.compile", "1", "true | false"),
        ("parallel.compile", "True", "true | false"),
        ("parallel.timeout_seconds", "0.5", "integer"),
        ("checkpoint.async_save", "yes", "true | false"),
        ("parallel.tp", "all", 'integer | "auto"'),
        ("parallel.tp", "2.0", 'integer | "auto"'),
        ("data.layout", "packed", '"pad" | "pack"'),
        ("parallel.param_dtype", "float16", '"float32" | "bfloat16"'),
        ("run.wandb", "false", '"disabled" | "offline" | "online"'),
        ("optim.betas", "[0.9]", "[number, number]"),
        ("optim.betas", "0.9,0.95", "[number, number]"),
        ("run.profile_steps", "[1.5, 2]", "[integer]"),
        ("model.rope_scaling", "8.0", "table"),
    ],
)
def test_a_wrong_type_names_value_and_type(name, value, takes):
    (error,) = errors_of(f"--{name}={value}")
    assert error.startswith(f"{name}=")
    assert value in error
    assert error.endswith(f"it takes {takes}")


@pytest.mark.parametrize(
    ("line", "takes"), [('steps = "3"', "integer"), ("steps = 3.0", "integer"), ("steps = [3]", "")]
)
def test_a_file_is_typed(toml, line, takes):
    (error,) = errors_of(toml(f"[train]\n{line}\n"))
    assert "train.steps=" in error
    assert takes in error


@pytest.mark.parametrize("name", [name for name, value in flatten(Config()).items() if isinstance(value, float)])
def test_an_infinite_number_is_refused(name):
    """config.toml could not say it: resuming would fail to read what the run wrote."""
    for value in ("inf", "-inf", "1e400"):
        assert any(error.startswith(f"{name}=") for error in errors_of(f"--{name}={value}"))


def test_a_missing_file_names_those_that_are_there(toml, tmp_path):
    toml(name="there.toml")
    (error,) = errors_of(str(tmp_path / "their.toml"))
    assert "their.toml: cannot be read" in error
    assert "there.toml" in error.partition("name a file")[2]


@pytest.mark.parametrize(
    "content", [b"[train\nsteps = 3", b"[train]\nsteps = ", b"[train]\nseed = 1\nseed = 2", b"\xff\xfe"]
)
def test_a_file_that_is_no_toml_is_named(tmp_path, content):
    (tmp_path / "broken.toml").write_bytes(content)
    (error,) = errors_of(str(tmp_path / "broken.toml"))
    assert "broken.toml: " in error
    assert "TOML" in error or "cannot be read" in error


def test_a_folder_is_no_file(tmp_path):
    assert "cannot be read" in errors_of(str(tmp_path))[0]


def test_a_value_outside_a_section_names_its_place(toml):
    (error,) = errors_of(toml("steps = 3\n"))
    assert "steps stands outside a section" in error
    assert "did you mean train.steps?" in error


def test_an_argument_without_a_value_shows_how_to_write_it():
    (error,) = errors_of("--train.steps", "--train.seed=1")
    assert "--train.steps has no value" in error
    assert "--train.steps=value" in error


def test_two_files_are_one_too_many(toml):
    first, second = toml(name="a.toml"), toml(name="b.toml")
    (error,) = errors_of(first, second)
    assert first in error
    assert second in error
    assert "--section.key=value" in error


def test_everything_that_is_wrong_is_reported_at_once(toml):
    file = toml('[optim]\nlr = "fast"\n[modle]\nhidden_size = 4\n[train]\nmicro_batch_size = 5\n')
    wrong = ["--train.stepz=3", "--data.layout=packed", "--optim.eps=0", "--model.num_key_value_heads=3", "--run.dir"]
    errors = errors_of(file, *wrong)
    names = ["optim.lr", "modle.hidden_size", "train.micro_batch_size", "train.stepz", "data.layout", "optim.eps"]
    names += ["model.num_key_value_heads", "--run.dir"]
    assert all(sum(name in error for error in errors) == 1 for name in names), errors
    assert len(errors) == len(names)


# ---------------------------------------------------------------------------------------------------------------------
# Impossible combinations: the message's own remedies must work

SHAPE = {
    "model.num_attention_heads": 24,
    "model.num_key_value_heads": 24,
    "model.hidden_size": 48,
    "model.intermediate_size": 96,
    "model.vocab_size": 384,
    "data.tokenizer_vocab_size": 300,
    "data.seq_len": 48,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 24,
}  # 1, 2, 3, 4, 6, 8 and 12 divide all of it, 24 too


def remedies(error: str) -> list[int]:
    """The numbers of "use ... in {1, 2}" or "use one of [1, 2]"."""
    numbers = re.search(r"[{\[]([\d, ]+)[}\]]", error)
    return [int(number) for number in numbers[1].split(",")]


@pytest.mark.parametrize(
    ("tp", "changes", "value"),
    [
        (4, {"model.num_attention_heads": 6, "model.num_key_value_heads": 6, "model.hidden_size": 96}, 6),
        (4, {"model.hidden_size": 50, "model.head_dim": 2}, 50),
        (4, {"model.intermediate_size": 94}, 94),
        (4, {"model.vocab_size": 386}, 386),
        (4, {"data.seq_len": 42}, 42),
        (8, {"data.seq_len": 36}, 36),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_tp_must_divide_what_it_shards(on_ranks, tp, changes, value):
    on_ranks(24)
    (error,) = errors_of(*arguments_of(SHAPE | changes), f"--parallel.tp={tp}")
    name = next(iter(changes))
    assert f"{name}={value} is not divisible by parallel.tp={tp}" in error
    assert f"a multiple of {tp} for {name}" in error
    works = remedies(error)
    for other in range(1, 25):
        arguments = [*arguments_of(SHAPE | changes), f"--parallel.tp={other}"]
        if other in works:
            assert configs.load(arguments).parallel.tp == other
        else:
            assert errors_of(*arguments), f"tp={other} works too and was not named"


def test_tp_must_divide_the_processes(on_ranks):
    on_ranks(6)
    (error,) = errors_of(*arguments_of(SHAPE), "--parallel.tp=4")
    assert "processes=6 is not divisible by parallel.tp=4" in error
    assert remedies(error) == [1, 2, 3, 6]


@pytest.mark.parametrize("vocab_size", [0, 384])
def test_a_vocabulary_that_waits_for_the_tokenizer_is_a_multiple_of_128(on_ranks, vocab_size):
    """So tp = 3 may not divide it, and the message does not make up a size that nobody wrote."""
    on_ranks(3)
    arguments = [*arguments_of(SHAPE | {"model.vocab_size": vocab_size}), "--parallel.tp=3"]
    if vocab_size:
        assert configs.load(arguments).parallel.tp == 3
        return
    (error,) = errors_of(*arguments)
    assert "model.vocab_size=128" not in error
    assert "multiple of 128" in error


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp"), [(24, 3, 2), (24, 1, 8), (24, 2, 4), (24, 3, 24), (12, 4, 6), (24, 8, 12)]
)
def test_tp_need_not_divide_the_kv_heads(on_ranks, heads, kv_heads, tp):
    on_ranks(24)
    shape = SHAPE | {"model.num_attention_heads": heads, "model.num_key_value_heads": kv_heads}
    assert configs.load([*arguments_of(shape), f"--parallel.tp={tp}"]).model.num_key_value_heads == kv_heads


def test_a_document_mask_is_for_packed_rows():
    (error,) = errors_of("--data.document_mask=true")
    assert 'data.document_mask=true with data.layout="pad"' in error
    assert 'use data.layout="pack"' in error
    assert configs.load(["--data.document_mask=true", "--data.layout=pack"]).data.document_mask


def test_a_document_mask_needs_wide_heads_on_a_gpu(monkeypatch):
    narrow = ["--data.document_mask=true", "--data.layout=pack", "--model.head_dim=8"]
    assert configs.load(narrow).model.head_dim == 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (error,) = errors_of(*narrow)
    assert "model.head_dim=8 is below 16" in error


@pytest.mark.parametrize("kv_heads", [5, 16, 48])
def test_kv_heads_must_divide_heads(kv_heads):
    (error,) = errors_of(*arguments_of(SHAPE | {"model.num_key_value_heads": kv_heads}))
    assert f"model.num_key_value_heads={kv_heads} does not divide model.num_attention_heads=24" in error
    assert remedies(error) == [1, 2, 3, 4, 6, 8, 12, 24]


def test_hidden_size_must_be_a_multiple_of_the_heads_unless_head_dim_is_set():
    shape = SHAPE | {"model.hidden_size": 50}
    (error,) = errors_of(*arguments_of(shape))
    assert "model.hidden_size=50 is not divisible by model.num_attention_heads=24" in error
    assert "model.head_dim" in error
    assert configs.load([*arguments_of(shape), "--model.head_dim=4"]).model.head_dim == 4


@pytest.mark.parametrize(
    ("world", "global_batch_size", "micro_batch_size", "works"),
    [(1, 24, 5, [1, 2, 3, 4, 6, 8, 12, 24]), (4, 24, 4, [1, 2, 3, 6]), (4, 24, 8, [1, 2, 3, 6]), (4, 6, 1, [])],
)
def test_the_global_batch_must_be_whole(on_ranks, world, global_batch_size, micro_batch_size, works):
    on_ranks(world)
    arguments = [*arguments_of(SHAPE), f"--train.global_batch_size={global_batch_size}", "--parallel.tp=1"]
    (error,) = errors_of(*arguments, f"--train.micro_batch_size={micro_batch_size}")
    assert f"train.global_batch_size={global_batch_size} is not divisible by" in error
    assert f"train.micro_batch_size={micro_batch_size} x {world} data-parallel ranks" in error
    assert f"a multiple of {world * micro_batch_size} rows" in error
    assert (remedies(error) if works else []) == works
    for micro in works:
        configs.load([*arguments, f"--train.micro_batch_size={micro}"])
    rows = f"--train.global_batch_size={3 * world * micro_batch_size}"
    configs.load([*arguments, f"--train.micro_batch_size={micro_batch_size}", rows])


def test_tensor_parallel_ranks_do_not_count_for_the_global_batch(on_ranks):
    on_ranks(4)
    arguments = [*arguments_of(SHAPE), "--train.global_batch_size=6", "--train.micro_batch_size=3"]
    assert configs.load([*arguments, "--parallel.tp=2"]).train.global_batch_size == 6
    assert "x 4 data-parallel ranks" in errors_of(*arguments, "--parallel.tp=1")[0]


def test_dp_replicate_must_divide_the_data_parallel_ranks(on_ranks):
    on_ranks(12)
    arguments = [*arguments_of(SHAPE), "--parallel.tp=2"]
    (error,) = errors_of(*arguments, "--parallel.dp_replicate=4")
    assert "parallel.dp_replicate=4 does not divide the 6 data-parallel ranks" in error
    assert remedies(error) == [1, 2, 3, 6]
    assert configs.load([*arguments, "--parallel.dp_replicate=3"]).parallel.dp_replicate == 3


def test_warm_up_is_no_longer_than_the_run():
    (error,) = errors_of("--train.steps=10", "--optim.warmup_steps=11")
    assert "optim.warmup_steps=11 is longer than the run of 10 steps" in error
    assert configs.load(["--train.steps=10", "--optim.warmup_steps=10"]).optim.warmup_steps == 10
    assert configs.load(["--train.steps=0", "--optim.warmup_steps=11"]).train.steps == 0  # the data decide


def test_the_vocabulary_holds_the_trained_tokenizer():
    (error,) = errors_of("--model.vocab_size=1024", "--data.tokenizer_vocab_size=1025")
    assert "model.vocab_size=1024 is smaller than data.tokenizer_vocab_size=1025" in error
    assert "set it to 0" in error
    configs.load(["--model.vocab_size=1024", "--data.tokenizer_vocab_size=1024"])
    configs.load(["--model.vocab_size=1024", "--data.tokenizer_vocab_size=1025", "--data.tokenizer=some.json"])


def test_more_processes_than_gpus_are_refused(on_ranks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_ranks(4)
    (error,) = errors_of()
    assert "4 processes" in error
    assert "--nproc_per_node=2" in error
    on_ranks(4, 2)
    configs.load([])


@pytest.mark.parametrize(
    "argument",
    [
        *(f"model.{key}={value}" for key in ("hidden_size", "num_hidden_layers") for value in (0, -8)),
        *(f"model.{key}={value}" for key in ("num_attention_heads", "num_key_value_heads") for value in (0, -4)),
        *("model.intermediate_size=0", "model.vocab_size=-1", "model.head_dim=-2", "model.head_dim=7"),
        *("model.max_position_embeddings=255", "model.rope_theta=0", "model.rms_norm_eps=0"),
        *("model.initializer_range=-0.1", "parallel.tp=0", "parallel.tp=-1", "parallel.dp_replicate=0"),
        *("data.seq_len=0", "data.seq_len=-256", "data.num_workers=-1", "data.tokenizer_train_mib=0"),
        *("data.tokenizer_vocab_size=257", "data.val_fraction=1", "data.val_fraction=-0.01"),
        *("optim.lr=0", "optim.lr=-1", "optim.min_lr_ratio=1.1", "optim.min_lr_ratio=-0.1", "optim.warmup_steps=-1"),
        *("optim.betas=[1, 0.9]", "optim.betas=[0.9, -0.1]", "optim.eps=0", "optim.weight_decay=-1"),
        *("optim.grad_clip=-1", "train.steps=-1", "train.epochs=0", "train.global_batch_size=0"),
        *("train.micro_batch_size=0", "train.micro_batch_size=-8", "train.log_every=0", "train.eval_every=-1"),
        *("train.eval_batches=-1", "train.max_skipped_steps=-1", "checkpoint.every=-1", "checkpoint.keep=0"),
        *("checkpoint.keep=-1", "parallel.timeout_seconds=0", "parallel.timeout_seconds=-600"),
        *(
            "run.profile_steps=[1]",
            "run.profile_steps=[0, 2]",
            "run.profile_steps=[3, 2]",
            "run.profile_steps=[1, 2, 3]",
        ),
    ],
)
def test_a_value_out_of_range_is_named(argument):
    name = argument.partition("=")[0]
    assert any(name in error for error in errors_of(f"--{argument}"))


@pytest.mark.parametrize(
    "change",
    [{"rope_type": "yarn"}, {"factor": 0}, {"factor": "8"}, {"factor": True}, {"low_freq_factor": 4.0}, {"extra": 1}],
)
def test_a_rope_scaling_that_is_not_llama_3s_is_named_with_what_it_takes(change):
    (error,) = errors_of(f"--model.rope_scaling={toml_value(LLAMA_3_1 | change)}")
    assert error.startswith("model.rope_scaling={rope_type = ")
    assert all(key in error for key in LLAMA_3_1)
    (error,) = errors_of('--model.rope_scaling={rope_type = "llama3"}')
    assert all(key in error for key in LLAMA_3_1)


@pytest.mark.parametrize(
    "argument",
    [
        *("data.val_fraction=0", "optim.betas=[0, 0]", "optim.min_lr_ratio=0", "optim.min_lr_ratio=1"),
        *("optim.grad_clip=0", "optim.weight_decay=0", "optim.warmup_steps=0", "train.seed=-1", "checkpoint.keep=1"),
        *("data.tokenizer_vocab_size=258", "run.profile_steps=[2, 2]", "model.max_position_embeddings=256"),
        *("train.max_skipped_steps=0", "parallel.timeout_seconds=1"),
    ],
)
def test_the_ends_of_a_range_belong_to_it(argument):
    configs.load([f"--{argument}"])


# ---------------------------------------------------------------------------------------------------------------------
# Bounds stand beside the fields

BOUNDED = [name for name in HINTS if configs.bounds_of(name)]
NUMBERS = [name for name in HINTS if {"integer", "number"} & set(re.findall(r"\w+", configs.type_name(HINTS[name])))]
NO_BOUNDS = {
    "train.seed": "any number will do",
    "data.tokenizer_vocab_size": "it only counts where a tokenizer is trained",
    "run.profile_steps": "its numbers are tied to each other",
}


def test_every_number_has_a_bound_or_a_reason_why_not():
    assert {name for name in NUMBERS if name not in BOUNDED} == set(NO_BOUNDS)
    assert set(BOUNDED) <= set(NUMBERS)


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_are_plain_data_that_the_default_meets(name):
    bounds = configs.bounds_of(name)
    signs = [sign for sign, _ in bounds]
    assert len(bounds) == 1 or (signs[0] in (">=", ">") and signs[1] in ("<=", "<") and len(bounds) == 2)
    assert all(sign in configs.HOLDS and type(limit) in (int, float) for sign, limit in bounds)
    assert configs.check_value(name, configs.defaults()[name]) == configs.defaults()[name]


@pytest.mark.parametrize("name", BOUNDED)
def test_a_number_beyond_its_bound_is_refused_with_the_bound(name):
    words = {">=": "is below {}", ">": "is not above {}", "<=": "is above {}", "<": "is not below {}"}
    bounds = configs.bounds_of(name)
    for sign, limit in bounds:
        beyond = {">=": limit - 1, ">": limit, "<=": limit + 1, "<": limit}[sign]
        default = configs.defaults()[name]
        value = [default[0], beyond] if isinstance(default, tuple) else beyond
        error = next(error for error in errors_of(f"--{name}={value}") if error.startswith(f"{name}="))
        shown = float(beyond) if "number" in configs.type_name(HINTS[name]) else beyond
        assert error == f"{name}={shown} {words[sign].format(limit)}"


def test_a_bad_value_is_reported_once_and_no_message_speaks_of_what_stands_in_its_place(on_ranks):
    on_ranks(8)
    assert errors_of("--train.global_batch_size=0", "--train.micro_batch_size=7") == [
        "train.global_batch_size=0 is below 1"
    ]
    assert errors_of("--train.global_batch_size=many", "--parallel.tp=1") == [
        "train.global_batch_size='many' has the wrong type: it takes integer"
    ]
    assert errors_of("--parallel.tp=0", "--train.micro_batch_size=7") == ["parallel.tp=0 is below 1"]
    assert errors_of("--model.num_attention_heads=0", "--model.hidden_size=4") == [
        "model.num_attention_heads=0 is below 1"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# For other machines than this one


def test_the_ranks_can_be_given_and_are_then_not_asked_of_the_environment(on_ranks):
    on_ranks(3)
    arguments = arguments_of(SHAPE)
    assert configs.load(arguments).parallel.tp == 3
    assert configs.load(arguments, world=16, local_world=8).parallel.tp == 8
    assert configs.load(arguments, world=8).parallel.tp == 4  # one node
    with pytest.raises(ConfigError, match=r"the number of processes=4 is not divisible by parallel\.tp=3"):
        configs.load([*arguments, "--parallel.tp=3"], 4, 4)


def test_the_gpus_of_this_machine_have_no_say_about_another(on_ranks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    on_ranks(8)
    narrow = ["--data.document_mask=true", "--data.layout=pack", "--model.head_dim=8"]
    assert len(errors_of(*narrow)) == 2
    assert "8 processes on this node but 1 GPUs" in errors_of()[0]
    assert configs.load(narrow, world=8, local_world=8).parallel.tp == 4


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit this machine

WIDE = ["--model.num_attention_heads=2", "--model.num_key_value_heads=1"]


@pytest.mark.parametrize(
    ("name", "value", "more"),
    [
        *(("model.hidden_size", 10**power, []) for power in (9, 10, 19, 40, 400)),
        *(("model.intermediate_size", 10**power, []) for power in (12, 19, 40)),
        *(("model.num_hidden_layers", 10**power, []) for power in (6, 12, 40, 400)),
        *(("model.vocab_size", 10**power, []) for power in (12, 19, 40)),
        *(("model.head_dim", 10**power, WIDE) for power in (12, 18, 40)),
        *(("model.num_attention_heads", 10**power, ["--model.head_dim=2"]) for power in (9, 18, 40)),
        ("data.tokenizer_vocab_size", 10**12, []),
        *(("data.seq_len", length, []) for length in (10**8, 2**62, 2**63, 10**20, 10**40)),
        ("model.max_position_embeddings", 10**12, []),
        *(("train.micro_batch_size", 10**p, [f"--train.global_batch_size={10**p}"]) for p in (9, 400)),
    ],
    ids=lambda value: f"{math.log10(value):.0f}" if isinstance(value, int) else None,
)
def test_a_size_that_no_machine_holds_is_named_with_what_there_is(memory, name, value, more):
    memory(64 * 2**30)
    (error,) = errors_of(f"--{name}={value}", *more)
    sizes, _, rest = error.partition(": ")
    assert f"{name}={value}" in sizes.split(", ")
    assert len(sizes.split(", ")) <= 2, "what is small beside it is not to blame"
    needs = re.fullmatch(r".* take at least ([\d,]+\.\d) GiB on each rank, which has 64\.0 GiB \(.* 1\): (.+)", rest)
    assert float(needs[1].replace(",", "")) > 64
    assert needs[2].startswith("lower these values")
    assert value < 10**18 or needs[2] == "lower these values", "how many ranks it takes is beyond counting"


def test_what_is_counted_is_what_training_holds():
    """To the byte: parameters, gradients, moments; and beside them the RoPE tables, tokens and hidden states."""
    arguments = ["--model.vocab_size=384", "--data.tokenizer_vocab_size=300", "--data.seq_len=16"]
    config = configs.load([*arguments, "--model.num_hidden_layers=10", "--train.micro_batch_size=2"])
    model, tokens = Llama(config.model), torch.zeros(2, 16, dtype=torch.long)
    hidden = model.model.embed_tokens(tokens)
    optimizer = train.make_optimizer(model, config.optim)
    model(tokens, tokens).backward()
    optimizer.step()
    held = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
    held += [moments[name] for moments in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    state, beside = configs.memory_needed(config)
    assert state == sum(tensor.nbytes for tensor in held)
    assert beside == model.rope.nbytes + tokens.nbytes + hidden.nbytes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
@pytest.mark.parametrize("layers", [0, 1, 8, 9, 100])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_few_blocks_are_built_and_all_are_counted(recipe, layers, tied, on_ranks, monkeypatch):
    on_ranks(*worlds_of(recipe)[0])
    depth = [f"--model.num_hidden_layers={layers}"] * (layers > 0)
    config = configs.load([str(recipe), *depth, f"--model.tie_word_embeddings={tied}"])
    vocab_size = config.model.vocab_size or config.data.tokenizer_vocab_size
    expected, built = parameter_count(dataclasses.replace(config.model, vocab_size=vocab_size)), []
    monkeypatch.setattr(configs, "Llama", lambda shape: built.append(shape.num_hidden_layers) or Llama(shape))
    assert configs.memory_needed(config)[0] == 16 * expected
    assert built[0] <= 8


def test_a_vocabulary_that_waits_for_a_tokenizer_from_elsewhere_counts_as_the_smallest_there_is():
    waits = configs.load(["--data.tokenizer=some.json", "--data.tokenizer_vocab_size=1000000000000"])
    small = configs.load(["--data.tokenizer=some.json", "--model.vocab_size=128"])
    assert configs.memory_needed(waits) == configs.memory_needed(small)


def test_blocks_of_several_kinds_count_as_the_smallest_where_they_are_not_built(monkeypatch):
    """A refusal must be sure, in a fork too."""

    def every_second_without_mlp(shape: ModelConfig) -> Llama:
        model = Llama(shape)
        for block in model.model.layers[1::2]:
            del block.mlp
        return model

    config = configs.load(["--model.vocab_size=4096", "--model.num_hidden_layers=20"])
    counts = {}
    for build in (Llama, every_second_without_mlp):
        monkeypatch.setattr(configs, "Llama", build)
        counts[build] = configs.memory_needed(config)[0] // 16
    mlp = 3 * config.model.hidden_size * config.model.intermediate_size
    assert counts[Llama] - counts[every_second_without_mlp] == (4 + 12) * mlp


def test_an_error_of_a_forks_model_is_not_taken_for_a_size(memory, monkeypatch):
    def broken(shape: ModelConfig) -> Llama:
        raise TypeError("'int' object is not callable")

    memory(2**30)
    monkeypatch.setattr(configs, "Llama", broken)
    with pytest.raises(TypeError, match="not callable"):
        configs.load([])


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("world", "local_world", "plan", "slices"),
    [
        (1, 1, {}, 1),
        (4, 4, {"parallel.tp": 2}, 4),
        (4, 4, {"parallel.tp": 4}, 4),
        (8, 4, {"parallel.tp": 1}, 8),
        (8, 8, {"parallel.dp_replicate": 2, "parallel.tp": 4}, 4),
        (8, 8, {"parallel.dp_replicate": 4, "parallel.tp": 2, "parallel.param_dtype": "bfloat16"}, 2),
    ],
)
def test_what_just_fits_passes_and_a_byte_less_is_refused(on_ranks, memory, gpu, world, local_world, plan, slices):
    """Slices share the state, a CPU's ranks its memory, and nobody the rest."""
    on_ranks(world, local_world)
    arguments = arguments_of(SHAPE | {"model.num_hidden_layers": 12} | plan)
    state, beside = configs.memory_needed(config := configs.load(arguments))
    rope, tokens = 2 * 48 * 2 * 4, 48  # head_dim is 2
    width = 48 // config.parallel.tp * (2 if "parallel.param_dtype" in plan else 4)
    assert beside == rope + tokens * (8 + width)
    needed = (state / slices + beside) * (1 if gpu else local_world)
    memory(needed, gpu)
    assert configs.load(arguments) == config
    memory(needed - 1, gpu)
    (error,) = [line for line in errors_of(*arguments) if "FlexAttention" not in line]
    assert f"(ranks on this machine: {local_world})" in error
    assert ("or parallel.dp_replicate" in error) == ("parallel.dp_replicate" in plan)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("local_world", "plan", "enough"),
    [(1, {}, 3), (1, {}, 8), (2, {}, 4), (2, {"parallel.dp_replicate": 2}, 12), (3, {}, 24)],
)
def test_as_many_ranks_as_the_message_asks_for_are_enough(on_ranks, memory, gpu, local_world, plan, enough):
    arguments = arguments_of(SHAPE | {"model.num_hidden_layers": 12, "parallel.tp": 1} | plan)
    on_ranks(enough, local_world)
    state, beside = configs.memory_needed(configs.load(arguments))
    replicas = plan.get("parallel.dp_replicate", 1)
    memory((state / (enough // replicas) + beside) * (1 if gpu else local_world), gpu)
    on_ranks(local_world)
    (error,) = errors_of(*arguments)
    number, kind = re.search(r"or use at least (\d+) (.*)$", error).groups()
    assert kind == ("GPUs like this one" if gpu else f"ranks, {local_world} on each machine")
    assert int(number) == enough
    on_ranks(enough, local_world)
    configs.load(arguments)
    on_ranks(enough - local_world, local_world)
    assert any("take at least" in line for line in errors_of(*arguments))


def test_more_ranks_are_no_remedy_for_what_each_holds_whole(on_ranks, memory):
    arguments = arguments_of(SHAPE | {"model.max_position_embeddings": 100_000})
    memory(2 * 100_000 * 2 * 4)
    (error,) = errors_of(*arguments)
    assert error.startswith("model.max_position_embeddings=100000: ")
    assert error.endswith(": lower these values")
    memory(sum(configs.memory_needed(configs.load(arguments, world=1))))
    configs.load(arguments)
    on_ranks(2)
    assert "(ranks on this machine: 2)" in errors_of(*arguments)[0], "each has tables of its own"


def test_what_does_not_fit_is_reported_with_all_else_that_is_wrong(memory):
    memory(2**30)
    wrong = ["--optim.warmup_steps=1000", "--train.stepz=3", "--train.micro_batch_size=5", "--optim.lr=fast"]
    errors = errors_of("--model.hidden_size=1000000000", *wrong)
    names = [
        "model.hidden_size=1000000000",
        "optim.warmup_steps",
        "train.stepz",
        "train.micro_batch_size=5",
        "optim.lr",
    ]
    assert all(sum(name in error for error in errors) == 1 for name in names), errors
    assert len(errors) == len(names)


@pytest.mark.parametrize(
    "argument",
    [
        "model.hidden_size=0",
        "model.hidden_size=4",
        "model.num_attention_heads=0",
        "model.num_hidden_layers=-1",
        "model.vocab_size=many",
        "model.rope_scaling={rope_type = 'llama3'}",
        "model.head_dim=-1",
        "data.seq_len=0",
        "data.tokenizer_vocab_size=-1000000000000",
        "parallel.tp=0",
        "parallel.tp=7",
        "parallel.dp_replicate=0",
        "parallel.dp_replicate=7",
        "parallel.param_dtype=float8",
        "train.micro_batch_size=0",
    ],
)
def test_what_is_wrong_by_itself_is_not_counted(memory, argument):
    """Where memory is short or not, its own message is there, and no other one speaks of it."""
    own, name = errors_of(f"--{argument}"), argument.partition("=")[0]
    memory(2**40)
    assert errors_of(f"--{argument}") == own
    memory(1)
    errors = errors_of(f"--{argument}")
    assert set(own) <= set(errors)
    assert all("take at least" in error and f"{name}=" not in error for error in errors if error not in own)


def test_the_memory_of_this_machine_has_no_say_about_another(memory):
    memory(1)
    assert configs.load([], world=1).parallel.tp == 1
    assert configs.load([str(Path(configs.__file__).parent / "llama3_70b.toml")], world=64, local_world=8)
    assert len(errors_of()) == 1


@pytest.mark.parametrize("argument", ["--model.hidden_size=1000000000", "--data.seq_len=100000000"])
def test_the_command_refuses_what_cannot_fit_in_one_line_and_leaves_nothing_behind(argument, tmp_path):
    if hardware.main_memory() > 390 * 2**30:
        pytest.skip("such rows fit here")
    command = [sys.executable, str(ROOT / "train.py"), argument]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert argument.removeprefix("--") in line
    assert "GiB on each rank" in line
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# What is resolved


@pytest.mark.parametrize(
    ("world", "local_world", "changes", "tp"),
    [
        (1, 1, {}, 1),
        (2, 2, {}, 2),
        (3, 3, {}, 3),
        (4, 4, {}, 2),  # a single node of 4 or more: at most half, so that the mesh is 2-D
        (6, 6, {}, 3),
        (8, 8, {}, 4),
        (12, 12, {}, 6),
        (7, 7, {}, 1),
        (8, 4, {}, 4),  # several nodes: a whole node
        (16, 8, {}, 8),
        (12, 6, {}, 6),
        (8, 1, {}, 1),
        (16, 8, {"data.seq_len": 36}, 4),
        (16, 8, {"model.num_key_value_heads": 1}, 8),
        (3, 3, {"model.vocab_size": 0}, 1),
        (8, 8, {"parallel.dp_replicate": 8}, 1),
        (16, 8, {"parallel.dp_replicate": 4}, 4),
    ],
)
def test_tp_auto_is_the_largest_that_works_inside_a_node(on_ranks, world, local_world, changes, tp):
    on_ranks(world, local_world)
    arguments = arguments_of(SHAPE | {"train.global_batch_size": 24 * world} | changes)
    assert configs.load([*arguments, "--parallel.tp=auto"]).parallel.tp == tp


@pytest.mark.parametrize(
    ("world", "changes", "tp"),
    [(8, {"global_batch_size": 64}, 1), (8, {}, 4), (16, {"micro_batch_size": 2}, 2), (8, {"micro_batch_size": 3}, 1)],
)
def test_on_gpus_tp_auto_is_the_smallest_that_the_batch_allows(world, changes, tp):
    """quickstart has 16 rows, 8 at once: enough for two data-parallel ranks."""
    config = configs.load(["--parallel.tp=1"], world=1)
    config.train = dataclasses.replace(config.train, **changes)
    assert configs.automatic_tp(config, world, 8, on_gpus=True) == tp


def test_divisors_come_in_order_and_of_large_numbers_too():
    assert [configs.divisors(n) for n in (1, 7, 12, 16)] == [[1], [1, 7], [1, 2, 3, 4, 6, 12], [1, 2, 4, 8, 16]]
    (error,) = errors_of("--train.global_batch_size=1000000000000", "--train.micro_batch_size=7")
    assert error.startswith("train.global_batch_size=1000000000000 is not divisible by train.micro_batch_size=7")


def test_run_dir_is_named_after_the_file_unless_it_is_set(toml):
    assert configs.load([toml(name="my.run.toml")]).run.dir == "runs/my.run"
    assert configs.load([toml('[run]\ndir = "elsewhere"\n')]).run.dir == "elsewhere"
    assert configs.load([toml(), "--run.dir=there"]).run.dir == "there"


def test_zeros_are_resolved_from_what_is_there():
    config = configs.load([*arguments_of(SHAPE), "--data.seq_len=192", "--model.hidden_size=192"])
    assert (config.model.head_dim, config.model.max_position_embeddings) == (8, 192)
    longer = configs.load([*arguments_of(SHAPE), "--model.max_position_embeddings=512"])
    assert longer.model.max_position_embeddings == 512


def settled(config: Config, vocabulary: int, num_rows: int | None) -> Config:
    """`configs.settle`, which must leave alone what it was given."""
    before = to_toml(config)
    after = configs.settle(config, vocabulary, num_rows)
    assert to_toml(config) == before
    after.model.rope_scaling["factor"] = 2.0
    assert to_toml(config) == before, "the copy shares nothing with the original"
    del after.model.rope_scaling["factor"]
    return after


@pytest.mark.parametrize(("vocabulary", "rounded"), [(256, 256), (257, 384), (1, 128)])
def test_the_data_settles_vocabulary_and_steps_in_a_copy(vocabulary, rounded):
    config = Config(train=TrainConfig(global_batch_size=8, epochs=3), optim=OptimConfig(warmup_steps=5))
    first = settled(config, vocabulary, num_rows=47)
    assert (first.model.vocab_size, first.train.steps) == (rounded, 3 * 5)
    assert settled(first, vocabulary, num_rows=1000).train.steps == 15, "what was given stays"
    assert flatten(first) == flatten(config) | {"model.vocab_size": rounded, "train.steps": 15}


def test_a_stream_leaves_the_steps_as_they_were_given():
    config = Config(train=TrainConfig(steps=7), optim=OptimConfig(warmup_steps=5))
    assert settled(config, 256, num_rows=None).train.steps == 7


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ({"vocab_size": 256}, {}, ["model.vocab_size=256", "300", "384"]),
        ({}, {"global_batch_size": 51}, ["50 training rows", "train.global_batch_size=51"]),
        ({}, {"epochs": 9}, ["optim.warmup_steps=100", "54 steps"]),
    ],
    ids=["vocabulary", "rows", "warm-up"],
)
def test_what_does_not_fit_the_data_is_refused_with_value_rule_and_remedy(model, options, words):
    config = Config(model=ModelConfig(**model), train=TrainConfig(**{"global_batch_size": 8, **options}))
    with pytest.raises(UserError) as error:
        configs.settle(config, vocabulary=300, num_rows=50)
    assert all(word in str(error.value) for word in words)


def test_defaults_are_those_of_the_dataclasses_before_anything_is_resolved(toml):
    defaults = configs.defaults()
    assert list(defaults) == list(HINTS) == list(flatten(Config()))
    resolved = flatten(configs.load([toml()]))
    waiting = {"model.head_dim", "model.max_position_embeddings", "parallel.tp", "run.dir"}
    assert {name for name in defaults if resolved[name] != defaults[name]} == waiting
    assert all(defaults[name] in (0, "", "auto") for name in waiting)
    defaults["model.rope_scaling"]["factor"] = 2.0
    assert configs.defaults()["model.rope_scaling"] == {}


CHANGED = {
    "run.dir": "\"quotes\" and \\ and 'these'\ttab é 漢字 😀 \u2028",
    "run.profile_steps": [2, 5],
    "optim.betas": [0.5, 0.25],
    "optim.lr": 1e-17,
    "optim.weight_decay": 1e22,
    "train.seed": -(2**62),
    "parallel.compile": True,
    "data.val_fraction": 0.1 + 0.2,
    "model.rope_scaling": LLAMA_3_1,
}


def test_the_resolved_configuration_is_toml_and_gives_itself_back(toml, on_ranks):
    on_ranks(4)
    config = configs.load(arguments_of({name: toml_value(value) for name, value in CHANGED.items()}))
    text = to_toml(config)
    tables = tomllib.loads(text)
    assert {f"{section}.{key}" for section, keys in tables.items() for key in keys} == set(HINTS)
    for name, value in CHANGED.items():
        section, key = name.split(".")
        assert tables[section][key] == value
    again = configs.load([toml(text, name="another_name.toml")])
    assert again == config
    assert to_toml(again) == text


# ---------------------------------------------------------------------------------------------------------------------
# --help


def test_help_lists_every_key_with_its_default_and_meaning():
    lines = configs.help_text().splitlines()
    assert max(map(len, lines)) <= 120
    for section, schema in SECTIONS.items():
        for field in dataclasses.fields(schema):
            factory = field.default_factory
            default = json.dumps(field.default if factory is dataclasses.MISSING else factory())
            (i,) = (
                i for i, line in enumerate(lines) if line.strip().startswith(f"--{section}.{field.name}={default} ")
            )
            assert configs.type_name(HINTS[f"{section}.{field.name}"]) in lines[i]
            assert (">" in lines[i]) == bool(configs.bounds_of(f"{section}.{field.name}"))
            meaning = HINTS[f"{section}.{field.name}"].__metadata__[0]
            assert len(meaning) > 5
            wrapped = takewhile(lambda line: line.startswith(" " * 8), lines[i + 1 :])
            assert " ".join(map(str.strip, wrapped)) == meaning


def test_help_shows_the_bounds():
    text = configs.help_text()
    assert "--train.epochs=1  (integer, >= 1)\n" in text
    assert "--optim.lr=0.001  (number, > 0)\n" in text
    assert "--optim.min_lr_ratio=0.1  (number, >= 0, <= 1)\n" in text
    assert "--optim.betas=[0.9, 0.95]  ([number, number], >= 0, < 1)\n" in text
    assert "--train.seed=0  (integer)\n" in text


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_printed_once_and_nothing_is_run_whatever_else_is_asked(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "nope.toml", "--train.steps=ten", flag])
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        train.main.__wrapped__()  # without torch's `record`, which wants a real standard error
    assert capsys.readouterr().out == configs.help_text() + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The recipes


def worlds_of(recipe: Path) -> list[tuple[int, int]]:
    """(processes, processes a node) of every command in the comments above the first section."""
    header = recipe.read_text(encoding="utf-8").partition("\n[")[0]
    worlds = []
    for command in re.findall(r"^#.*(?:torchrun|python) .*train\.py.*$", header, re.MULTILINE):
        options = {name: int(number) for name, number in re.findall(r"--(nnodes|nproc_per_node)[= ](\d+)", command)}
        local_world = options.get("nproc_per_node", 1)
        worlds.append((local_world * options.get("nnodes", 1), local_world))
    return worlds


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_works_with_the_commands_in_its_comments(recipe, on_ranks):
    worlds = worlds_of(recipe)
    assert worlds, "the comments on top must show the command that runs it"
    for world, local_world in worlds:
        on_ranks(world, local_world)
        config = configs.load([str(recipe)])
        assert config.run.dir == f"runs/{recipe.stem}"
        assert world % config.parallel.tp == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_builds_its_model(recipe, on_ranks):
    on_ranks(*worlds_of(recipe)[0])
    config = configs.load([str(recipe)])
    config.model.vocab_size = config.model.vocab_size or config.data.tokenizer_vocab_size
    with torch.device("meta"):
        model = Llama(config.model)
        logits = model(torch.zeros(1, config.data.seq_len, dtype=torch.long))
    assert logits.shape == (1, config.data.seq_len, config.model.vocab_size)
    assert len(model.model.layers) == config.model.num_hidden_layers
