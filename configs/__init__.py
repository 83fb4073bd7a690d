"""One configuration: dataclass defaults < TOML file < command line.

    train.py [CONFIG.toml] [--section.key=value ...]      without CONFIG it is configs/quickstart.toml

The dataclass that configures a module lives in that module; this file puts them together, reads the file and the
command line, and checks everything at once, before any process group, download or model exists.
"""

import dataclasses
import difflib
import json
import math
import textwrap
import tomllib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from checkpoint import CheckpointConfig
from data import DataConfig
from model import ModelConfig
from parallel import ParallelConfig, local_world_size, mesh_errors, resolve_tp, world_size

QUICKSTART = Path(__file__).parent / "quickstart.toml"
USAGE = "usage: [torchrun ...] train.py [CONFIG.toml] [--section.key=value ...]"


@dataclass
class OptimConfig:
    """AdamW (arXiv:1711.05101) with linear warm-up and cosine decay."""

    lr: Annotated[float, "highest learning rate, reached at warmup_steps"] = 1e-3
    min_lr_ratio: Annotated[float, "learning rate of the last step, as a share of lr"] = 0.1
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 100
    betas: Annotated[tuple[float, float], "decay of AdamW's two moments"] = (0.9, 0.95)
    eps: Annotated[float, "AdamW's epsilon"] = 1e-8
    weight_decay: Annotated[float, "on matrices only"] = 0.1
    grad_clip: Annotated[float, "largest norm of the whole gradient; 0 = never clip"] = 1.0


@dataclass
class TrainConfig:
    """How long, how much at a time, and what is reported."""

    steps: Annotated[int, "optimizer steps; 0 = epochs decides"] = 0
    epochs: Annotated[int, "passes over the training rows, when steps is 0"] = 1
    global_batch_size: Annotated[int, "rows of one optimizer step, over all ranks"] = 16
    micro_batch_size: Annotated[int, "rows of one forward pass of one rank"] = 8
    seed: Annotated[int, "of the initial weights and of the order of the data"] = 0
    deterministic: Annotated[bool, "only deterministic GPU kernels: slower, and resuming is exact to the bit"] = False
    max_skipped_steps: Annotated[int, "non-finite steps in a row that are skipped; one more ends the run"] = 10
    log_every: Annotated[int, "steps between lines in metrics.jsonl"] = 1
    eval_every: Annotated[int, "steps between evaluations; 0 = only at the end"] = 0
    eval_batches: Annotated[int, "global batches of one evaluation; 0 = all"] = 0


@dataclass
class RunConfig:
    """Where the run lives and who else hears of it."""

    dir: Annotated[str, 'the run directory; "" = runs/<name of the config file>'] = ""
    wandb: Annotated[Literal["disabled", "offline", "online"], "Weights & Biases, from rank 0"] = "disabled"
    wandb_project: Annotated[str, "name of the wandb project"] = "llama-pretrain"
    profile_steps: Annotated[list[int], "[first, last] step of a torch profiler trace of rank 0; [] = none"] = field(
        default_factory=list
    )


@dataclass
class Config:
    """All sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, a line each."""


SECTIONS = {section.name: section.default_factory for section in dataclasses.fields(Config)}
HINTS = {
    f"{section}.{key}": hint
    for section, schema in SECTIONS.items()
    for key, hint in get_type_hints(schema, include_extras=True).items()
}


def flatten(config: Config) -> dict[str, Any]:
    """{"section.key": value}"""
    return {f"{s}.{key}": value for s, section in dataclasses.asdict(config).items() for key, value in section.items()}


def toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False, default=str)


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML, of which a JSON scalar or array is a valid value."""
    sections = dataclasses.asdict(config).items()
    blocks = (
        f"[{name}]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in section.items())
        for name, section in sections
    )
    return "\n".join(blocks)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def type_name(hint: Any) -> str:
    """A type as a person writes it."""
    if get_origin(hint) is Annotated:
        return type_name(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " | ".join(f'"{value}"' for value in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(type_name, get_args(hint)))
    if get_origin(hint) is dict:
        return "table"
    if get_origin(hint) in (list, tuple):
        return f"[{', '.join(map(type_name, get_args(hint)))}]"
    return {int: "integer", float: "number", bool: "true | false", str: "string"}[hint]


def convert(value: Any, hint: Any) -> Any:
    """`value` as `hint` demands, or ValueError. Only an integer given for a number changes its type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return convert(value, arguments[0])
    if origin is Literal and value in arguments and isinstance(value, str):
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return convert(value, option)
            except ValueError:
                continue
    if origin is list and isinstance(value, list):
        return [convert(item, arguments[0]) for item in value]
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(map(convert, value, arguments))
    if origin is dict and isinstance(value, dict):
        return value
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint and (hint is not float or math.isfinite(value)):
        return value
    raise ValueError


def parse_argument(text: str, hint: Any) -> Any:
    """A command-line value: TOML, except that strings need no quotes."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        convert(value, hint)
        return value
    except (tomllib.TOMLDecodeError, ValueError, KeyError):
        return text


def nearest_key(name: str) -> str:
    """What somebody who wrote `name` may have meant."""
    same_key = [known for known in HINTS if known.split(".")[1] == name.split(".")[-1]]
    near = same_key or difflib.get_close_matches(name, HINTS, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"sections are {', '.join(SECTIONS)}; --help lists all keys"


def read(arguments: list[str]) -> tuple[dict[str, Any], Path, list[str]]:
    """Values by "section.key" in their order of precedence, the config file's path, and what is wrong so far."""
    values, errors = {}, []
    files = [argument for argument in arguments if not argument.startswith("--")]
    path = Path(files[0]) if files else QUICKSTART
    if len(files) > 1:
        errors.append(f"{' '.join(files)}: one CONFIG.toml at most; write overrides as --section.key=value")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        near = [toml for toml in path.parent.glob("*.toml") if toml.name != "pyproject.toml"]
        near = ", ".join(sorted(map(str, near or QUICKSTART.parent.glob("*.toml"))))
        errors.append(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): name a file: {near}")
        tables = {}
    except tomllib.TOMLDecodeError as error:
        errors.append(f"{path}: not valid TOML: {error}")
        tables = {}
    for section, keys in tables.items():
        if not isinstance(keys, dict):
            errors.append(f"{path}: {section} stands outside a section: {nearest_key(section)}")
            continue
        if section not in SECTIONS and not keys:
            errors.append(f"{path}: there is no section {section}: {nearest_key(section)}")
        values |= {f"{section}.{key}": value for key, value in keys.items()}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            continue
        if not equals:
            errors.append(f"{argument} has no value: write --{name}=value")
            continue
        values[name] = parse_argument(text, HINTS.get(name, str))
    return values, path, errors


def load(arguments: list[str]) -> Config:
    """The checked and resolved configuration; ConfigError names everything that is wrong, at once.

    Resolved are `run.dir`, `parallel.tp`, `model.head_dim` and `model.max_position_embeddings`; `model.vocab_size` = 0
    waits for the tokenizer.
    """
    values, path, errors = read(arguments)
    good = {}
    for name, value in values.items():
        if name not in HINTS:
            errors.append(f"{name}: there is no such key: {nearest_key(name)}")
            continue
        try:
            good[name] = convert(value, HINTS[name])
        except ValueError:
            errors.append(f"{name}={value!r} has the wrong type: it takes {type_name(HINTS[name])}")
    sections = {
        section: {name.split(".")[1]: value for name, value in good.items() if name.startswith(section + ".")}
        for section in SECTIONS
    }
    config = Config(**{section: SECTIONS[section](**keys) for section, keys in sections.items()})
    model, train = config.model, config.train
    if not sections["model"].get("head_dim") and model.hidden_size % max(1, model.num_attention_heads):
        errors.append(
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_attention_heads="
            f"{model.num_attention_heads}: use a multiple of it, or set model.head_dim"
        )
    model.max_position_embeddings = model.max_position_embeddings or config.data.seq_len
    config.run.dir = config.run.dir or f"runs/{path.stem}"
    errors += range_errors(config)
    world = world_size()
    config.parallel.tp = resolve_tp(config.parallel, model, config.data.seq_len, local_world_size(), world)
    wrong_mesh = mesh_errors(config.parallel, model, config.data.seq_len, world)
    errors += wrong_mesh
    if not wrong_mesh and train.global_batch_size > 0 and train.micro_batch_size > 0:
        errors += batch_errors(train, world // config.parallel.tp)
    if torch.cuda.is_available() and local_world_size() > torch.cuda.device_count():
        errors.append(
            f"{local_world_size()} processes on this node but {torch.cuda.device_count()} GPUs: "
            f"use torchrun --nproc_per_node={torch.cuda.device_count()}, or CUDA_VISIBLE_DEVICES= for the CPU"
        )
    if errors:
        raise ConfigError("\n".join(errors))
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def range_errors(config: Config) -> list[str]:
    """Rules of single sections: value, rule, remedy."""
    model, data, optim, train = config.model, config.data, config.optim, config.train
    values, errors = flatten(config), []
    at_least = dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1
    )
    at_least = {f"model.{key}": low for key, low in at_least.items()} | {
        "model.vocab_size": 0,
        "model.head_dim": 1,
        "parallel.timeout_seconds": 1,
        "data.seq_len": 1,
        "data.num_workers": 0,
        "data.stream_files": 1,
        "data.tokenizer_train_mib": 1,
        "optim.warmup_steps": 0,
        "optim.weight_decay": 0,
        "optim.grad_clip": 0,
        "train.steps": 0,
        "train.epochs": 1,
        "train.global_batch_size": 1,
        "train.micro_batch_size": 1,
        "train.max_skipped_steps": 0,
        "train.log_every": 1,
        "train.eval_every": 0,
        "train.eval_batches": 0,
        "checkpoint.every": 0,
        "checkpoint.keep": 1,
    }
    errors += [f"{key}={values[key]} is below {low}" for key, low in at_least.items() if values[key] < low]
    positive = ("model.rope_theta", "model.rms_norm_eps", "model.initializer_range", "optim.lr", "optim.eps")
    errors += [f"{key}={values[key]} is not above 0" for key in positive if not values[key] > 0]
    if model.num_key_value_heads > 0 and model.num_attention_heads % model.num_key_value_heads:
        divisors = [n for n in range(1, model.num_attention_heads + 1) if model.num_attention_heads % n == 0]
        errors.append(
            f"model.num_key_value_heads={model.num_key_value_heads} does not divide model.num_attention_heads="
            f"{model.num_attention_heads}: use one of {divisors}"
        )
    errors += rope_scaling_errors(model.rope_scaling)
    if model.head_dim % 2:
        errors.append(f"model.head_dim={model.head_dim} is odd: RoPE rotates pairs, so it must be even")
    if model.max_position_embeddings < data.seq_len:
        errors.append(
            f"data.seq_len={data.seq_len} is more than model.max_position_embeddings={model.max_position_embeddings}: "
            "lower the one or raise the other (0 = seq_len)"
        )
    if data.document_mask and data.layout == "pad":
        errors.append(
            'data.document_mask=true with data.layout="pad": a padded row holds one document, which is exact as it is: '
            'leave it out, or use data.layout="pack"'
        )
    if data.document_mask and model.head_dim < 16 and torch.cuda.is_available():
        errors.append(
            f"model.head_dim={model.head_dim} is below 16, which FlexAttention needs on a GPU: widen the heads, or use "
            "data.document_mask=false"
        )
    if data.tokenizer == "train" and data.tokenizer_vocab_size < 258:
        errors.append(f"data.tokenizer_vocab_size={data.tokenizer_vocab_size} is below 258: 256 bytes, BOS and EOS")
    if data.tokenizer == "train" and 0 < model.vocab_size < data.tokenizer_vocab_size:
        errors.append(
            f"model.vocab_size={model.vocab_size} is smaller than data.tokenizer_vocab_size="
            f"{data.tokenizer_vocab_size}: raise it, or set it to 0 (the tokenizer's)"
        )
    if data.streaming and data.dataset == "stdlib":
        errors.append('data.streaming=true reads files, and data.dataset="stdlib" is none: set it to false')
    if data.streaming and train.steps == 0:
        errors.append("train.steps=0 with data.streaming=true: how long an epoch is, is not known; give the steps")
    shares = [("data.val_fraction", data.val_fraction), *(("optim.betas", beta) for beta in optim.betas)]
    errors += [f"{key}={share} is outside [0, 1)" for key, share in shares if not 0 <= share < 1]
    if not 0 <= optim.min_lr_ratio <= 1:
        errors.append(f"optim.min_lr_ratio={optim.min_lr_ratio} is outside [0, 1]")
    if 0 < train.steps < optim.warmup_steps:
        errors.append(warmup_error(optim.warmup_steps, train.steps))
    if not 0 < len(config.run.wandb_project) <= 128 or set(config.run.wandb_project) & set("/\\#?%:"):
        errors.append(f"run.wandb_project={config.run.wandb_project!r}: 1 to 128 characters, none of / \\ # ? % :")
    if config.run.profile_steps:
        first, *last = config.run.profile_steps
        if len(last) != 1 or not 1 <= first <= last[0]:
            errors.append(f"run.profile_steps={config.run.profile_steps} is not [first, last] with 1 <= first <= last")
    return errors


def rope_scaling_errors(scaling: dict[str, Any]) -> list[str]:
    """Either nothing, or what Llama 3 checkpoints carry."""
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if not scaling:
        return []
    whole = set(scaling) == {"rope_type", *numbers} and scaling["rope_type"] == "llama3"
    positive = whole and all(type(scaling[key]) in (int, float) and 0 < scaling[key] < math.inf for key in numbers)
    if positive and scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        return []
    return [
        f'model.rope_scaling={toml_value(scaling)} is not Llama 3\'s: it takes rope_type = "llama3" and, above 0, '
        f"{', '.join(numbers)}, with low_freq_factor < high_freq_factor"
    ]


def warmup_error(warmup_steps: int, steps: int) -> str:
    return f"optim.warmup_steps={warmup_steps} is longer than the run of {steps} steps: lower it or raise train.steps"


def batch_errors(train: TrainConfig, dp: int) -> list[str]:
    """Gradient accumulation must be whole."""
    rows = train.micro_batch_size * dp
    if train.global_batch_size % rows == 0:
        return []
    works = [n for n in range(1, train.global_batch_size + 1) if train.global_batch_size % (n * dp) == 0]
    remedy = f"a micro_batch_size in {{{', '.join(map(str, works))}}} or " if works else ""
    return [
        f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size="
        f"{train.micro_batch_size} x {dp} data-parallel ranks: use {remedy}a multiple of {rows} rows"
    ]


def help_text() -> str:
    """Every key with its type, default and meaning."""
    lines = [USAGE, "", "Defaults < CONFIG.toml < command line. Lists are TOML arrays: --optim.betas=[0.9,0.99]"]
    defaults = flatten(Config())
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        for name, hint in HINTS.items():
            if name.startswith(section + "."):
                default = "0" if name == "model.head_dim" else json.dumps(defaults[name])
                lines.append(f"  --{name}={default}  ({type_name(hint)})")
                lines += textwrap.wrap(get_args(hint)[1], 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)
