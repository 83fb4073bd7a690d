"""One configuration: dataclass defaults < TOML file < command line.

    train.py [CONFIG.toml] [--section.key=value ...]      without CONFIG it is configs/quickstart.toml

The dataclass that configures a module lives in that module. A field says what it means and where its bounds are, as
plain data: `Annotated[int, "meaning", (">=", 1)]`. This file puts the sections together, reads the file and the command
line, and checks everything at once, before any process group, download or model exists (law 7): first each value by
itself, then the rules that tie values together.
"""

import contextlib
import copy
import dataclasses
import difflib
import json
import math
import operator
import os
import textwrap
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

import checkpoint
from checkpoint import CheckpointConfig
from corpus.config import DataConfig
from huggingface import config as pretrained
from model import Llama, ModelConfig, needs_mask
from parallel import ParallelConfig
from runtime import hardware, ranks

QUICKSTART = Path(__file__).parent / "quickstart.toml"
STATE_BYTES = 16  # of a parameter, its gradient and AdamW's two moments, in float32
USAGE = "usage: [torchrun ...] train.py [CONFIG.toml] [--section.key=value ...]"


@dataclass
class OptimConfig:
    """AdamW (arXiv:1711.05101) and the schedule of its learning rate: linear warm-up, then a cosine."""

    lr: Annotated[float, "highest learning rate, reached at warmup_steps", (">", 0)] = 1e-3
    min_lr_ratio: Annotated[float, "learning rate of the last step, as a share of lr", (">=", 0), ("<=", 1)] = 0.1
    warmup_steps: Annotated[int, "steps of linear warm-up", (">=", 0)] = 100
    betas: Annotated[tuple[float, float], "decay of AdamW's two moments", (">=", 0), ("<", 1)] = (0.9, 0.95)
    eps: Annotated[float, "AdamW's epsilon", (">", 0)] = 1e-8
    weight_decay: Annotated[float, "on matrices only", (">=", 0)] = 0.1
    grad_clip: Annotated[float, "largest norm of the whole gradient; 0 = never clip", (">=", 0)] = 1.0


@dataclass
class TrainConfig:
    """How long, how much at a time, and what is reported."""

    steps: Annotated[int, "optimizer steps; 0 = epochs decides", (">=", 0)] = 0
    epochs: Annotated[int, "passes over the training rows, when steps is 0", (">=", 1)] = 1
    global_batch_size: Annotated[int, "rows of one optimizer step, over all ranks", (">=", 1)] = 16
    micro_batch_size: Annotated[int, "rows of one forward pass of one rank", (">=", 1)] = 8
    seed: Annotated[int, "of the initial weights and of the order of the data"] = 0
    deterministic: Annotated[bool, "only deterministic GPU kernels: slower, and resuming is exact to the bit"] = False
    max_skipped_steps: Annotated[
        int, "non-finite steps in a row that are skipped; one more ends the run", (">=", 0)
    ] = 10
    log_every: Annotated[int, "steps between lines in metrics.jsonl", (">=", 1)] = 1
    eval_every: Annotated[int, "steps between evaluations; 0 = only at the end", (">=", 0)] = 0
    eval_batches: Annotated[int, "global batches of one evaluation; 0 = all", (">=", 0)] = 0


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


class ConfigError(ranks.UserError):
    """Everything that is wrong with a configuration, a line each."""


SECTIONS: dict[str, Any] = get_type_hints(Config)
HINTS = {
    f"{section}.{key}": hint
    for section, schema in SECTIONS.items()
    for key, hint in get_type_hints(schema, include_extras=True).items()
}


def flatten(config: Config) -> dict[str, Any]:
    """{"section.key": value}"""
    return {f"{s}.{key}": value for s, section in dataclasses.asdict(config).items() for key, value in section.items()}


def defaults() -> dict[str, Any]:
    """{"section.key": default}, as the dataclasses state it and `--help` prints it: a 0 or "" is not yet resolved.

    What an older record of a run lacks had this value. (All keys that `load` and `settle` resolve are in every record.)
    """
    found = {}
    for section, schema in SECTIONS.items():
        for entry in dataclasses.fields(schema):
            factory = entry.default_factory
            found[f"{section}.{entry.name}"] = entry.default if factory is dataclasses.MISSING else factory()
    return found


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
    if type(value) is hint and not (isinstance(value, float) and not math.isfinite(value)):
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
    values, line, errors = {}, {}, []
    files = [argument for argument in arguments if not argument.startswith("--")]
    path = Path(files[0]) if files else QUICKSTART
    if len(files) > 1:
        errors.append(f"{' '.join(files)}: one CONFIG.toml at most; write overrides as --section.key=value")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        near = [toml for toml in path.parent.glob("*.toml") if toml.name != "pyproject.toml"]
        names = ", ".join(sorted(map(str, near or QUICKSTART.parent.glob("*.toml"))))
        errors.append(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): name a file: {names}")
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
        line[name] = parse_argument(text, HINTS.get(name, str))
    if (values | line).get("checkpoint.init_from"):
        if not files:  # quickstart's model is another one
            values = {name: value for name, value in values.items() if not comes_with_a_model(name)}
        values = upon_a_model(values, line, path, errors)
    return values | line, path, errors


def run_dir(values: dict[str, Any], path: Path) -> str:
    return str(values.get("run.dir") or f"runs/{path.stem}")


def comes_with_a_model(name: str) -> bool:
    return name.startswith("model.") or name in ("data.tokenizer", "data.bos_token", "data.eos_token")


def upon_a_model(values: dict[str, Any], line: dict[str, Any], path: Path, errors: list[str]) -> dict[str, Any]:
    """The file's values, upon what the model of `checkpoint.init_from` says of itself; adds contradictions to `errors`.

    When a run goes on, its checkpoint says what the model did, which may be gone by now.
    """
    name = str((values | line)["checkpoint.init_from"])
    own = recorded(Path(run_dir(values | line, path)))
    if not own:
        try:
            own = pretrained.keys(name)
        except ranks.UserError as error:  # without it no other rule can be asked
            raise ConfigError("\n".join([*errors, str(error)])) from error
        errors += [
            f"{key}={value!r} in {where} is not that of checkpoint.init_from={name}, {own[key]!r}: leave it out"
            for where, some, free in ((path, values, ()), ("the command line", line, pretrained.FREE))
            for key, value in some.items()
            if key.startswith("model.") and key not in free and value != own.get(key, value)
        ]
    if "data.tokenizer" in values | line:
        own = {key: value for key, value in own.items() if not key.startswith("data.")}
    return own | values


def recorded(folder: Path) -> dict[str, Any]:
    """The model and the tokenizer of a run that goes on and came from elsewhere; {} if there is none."""
    for path in reversed(checkpoint.complete_checkpoints(folder)):
        with contextlib.suppress(ranks.UserError):  # it is damaged
            state = checkpoint.read_state(path)
            return {k: v for k, v in state["identity"].items() if state.get("init_from") and comes_with_a_model(k)}
    return {}


def load(
    arguments: list[str], world: int | None = None, local_world: int | None = None, on_gpus: bool = False
) -> Config:
    """The checked and resolved configuration; ConfigError names everything that is wrong, at once.

    Resolved are `run.dir`, `parallel.tp`, `model.head_dim` and `model.max_position_embeddings`; `model.vocab_size` = 0
    waits for the tokenizer and `train.steps` = 0 for the data (see `settle`).

    It is for the ranks that torchrun has started, and then this node's GPUs and memory have a say; or for `world`
    ranks, of which `local_world` share a node, wherever those are, on GPUs or not.
    """
    is_here = world is None
    on_gpus = torch.cuda.is_available() if is_here else on_gpus
    if world is None:
        world, local_world = ranks.world_size(), local_world or ranks.local_world_size()
    local_world = local_world or world
    values, path, errors = read(arguments)
    good, sections = {}, {section: {} for section in SECTIONS}
    for name, value in values.items():
        try:
            section, _, key = name.partition(".")
            good[name] = sections[section][key] = check_value(name, value)
        except ValueError as error:
            errors.append(str(error))
    config = Config(**{section: schema(**sections[section]) for section, schema in SECTIONS.items()})
    config.model.max_position_embeddings = config.model.max_position_embeddings or config.data.seq_len
    config.run.dir = run_dir(good, path)
    tp = config.parallel.tp
    if tp == "auto":
        tp = automatic_tp(config, world, local_world, on_gpus)
    config.parallel.tp = tp
    broken = [*model_rules(config, good)]
    if is_here and not broken:  # else there may be no such model
        broken += memory_rules(config, world, local_world)
    broken += [*data_rules(config), *run_rules(config)]
    if is_here and on_gpus:
        broken += gpu_rules(config, local_world)
    broken += (wrong_mesh := mesh_errors(config, tp, world))
    bad = (values.keys() & HINTS.keys()) - good.keys()
    if not wrong_mesh and "parallel.tp" not in bad:
        broken += batch_errors(config.train, world // tp)
    # In place of a bad value stands its default, of which no message must speak.
    errors += [error for error in broken if not any(f"{name}=" in error for name in bad)]
    if errors:
        raise ConfigError("\n".join(errors))
    return config


def settle(config: Config, vocabulary: int, num_rows: int | None) -> Config:
    """A copy with vocab_size and steps as the data decide them. Raises UserError if the data do not fit.

    `vocabulary` is the tokenizer's. `num_rows` of training is None when streaming: then train.steps is given.
    """
    config = copy.deepcopy(config)
    model, train = config.model, config.train
    enough = math.ceil(vocabulary / 128) * 128
    model.vocab_size = model.vocab_size or enough
    if vocabulary > model.vocab_size:
        raise ranks.UserError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocabulary} tokens: "
            f"raise it to {enough}, or set it to 0 (the tokenizer's)"
        )
    if num_rows is None:
        return config
    steps_per_epoch = num_rows // train.global_batch_size
    if steps_per_epoch == 0:
        raise ranks.UserError(
            f"data.dataset={config.data.dataset} has {num_rows} training rows, fewer than "
            f"train.global_batch_size={train.global_batch_size}: lower it or add documents"
        )
    train.steps = train.steps or train.epochs * steps_per_epoch
    if config.optim.warmup_steps > train.steps:
        raise ranks.UserError(warmup_error(config.optim.warmup_steps, train.steps))
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Single values. A bound behind a field's meaning is (">=", 1), (">", 0), ("<", 1) or ("<=", 1), a lower one first

HOLDS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
BROKEN = {">=": "is below", ">": "is not above", "<=": "is above", "<": "is not below"}


def bounds_of(name: str) -> tuple[tuple[str, float], ...]:
    return HINTS[name].__metadata__[1:]


def check_value(name: str, value: Any) -> Any:
    """The value, by the type and the bounds of its field, or ValueError. A word in a number's place has no bounds."""
    if name not in HINTS:
        raise ValueError(f"{name}: there is no such key: {nearest_key(name)}")
    try:
        value, bounds = convert(value, HINTS[name]), bounds_of(name)
    except ValueError as error:
        raise ValueError(f"{name}={value!r} has the wrong type: it takes {type_name(HINTS[name])}") from error
    for number in value if isinstance(value, list | tuple) else [value]:
        for sign, limit in bounds if type(number) in (int, float) else ():
            if not HOLDS[sign](number, limit):
                raise ValueError(f"{name}={number} {BROKEN[sign]} {limit}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Rules that tie values together: value, rule, remedy. They see values that are good by themselves.


def model_rules(config: Config, given: dict[str, Any]) -> Iterator[str]:
    """`given` has what the user has set."""
    model, seq_len = config.model, config.data.seq_len
    if not given.get("model.head_dim") and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_attention_heads="
            f"{model.num_attention_heads}: use a multiple of it, or set model.head_dim"
        )
    if model.num_attention_heads % model.num_key_value_heads:
        yield (
            f"model.num_key_value_heads={model.num_key_value_heads} does not divide model.num_attention_heads="
            f"{model.num_attention_heads}: use one of {divisors(model.num_attention_heads)}"
        )
    numbers = pretrained.SCALING
    if (scaling := model.rope_scaling) and not (
        set(scaling) == {"rope_type", *numbers}
        and scaling["rope_type"] == "llama3"
        and all(type(scaling[key]) in (int, float) and 0 < scaling[key] < math.inf for key in numbers)
        and scaling["low_freq_factor"] < scaling["high_freq_factor"]
    ):
        yield (
            f'model.rope_scaling={toml_value(scaling)} is not Llama 3\'s: it takes rope_type = "llama3" and, above 0, '
            f"{', '.join(numbers)}, with low_freq_factor < high_freq_factor"
        )
    if model.head_dim % 2:
        yield f"model.head_dim={model.head_dim} is odd: RoPE rotates pairs, so it must be even"
    if model.max_position_embeddings < seq_len:
        yield (
            f"data.seq_len={seq_len} is more than model.max_position_embeddings={model.max_position_embeddings}: "
            "lower the one or raise the other (0 = seq_len)"
        )


def data_rules(config: Config) -> Iterator[str]:
    model, data = config.model, config.data
    if data.document_mask and data.layout == "pad":
        yield (
            'data.document_mask=true with data.layout="pad": a padded row holds one document, which is exact as it is: '
            'leave it out, or use data.layout="pack"'
        )
    if data.tokenizer == "train" and data.tokenizer_vocab_size < 258:
        yield f"data.tokenizer_vocab_size={data.tokenizer_vocab_size} is below 258: 256 bytes, BOS and EOS"
    if data.tokenizer == "train" and 0 < model.vocab_size < data.tokenizer_vocab_size:
        yield (
            f"model.vocab_size={model.vocab_size} is smaller than data.tokenizer_vocab_size="
            f"{data.tokenizer_vocab_size}: raise it, or set it to 0 (the tokenizer's)"
        )
    if data.streaming and data.dataset == "stdlib":
        yield 'data.streaming=true reads files, and data.dataset="stdlib" is none: set it to false'
    if data.streaming and config.train.steps == 0:
        yield "train.steps=0 with data.streaming=true: how long an epoch is, is not known; give the steps"


def run_rules(config: Config) -> Iterator[str]:
    run, steps, warmup_steps = config.run, config.train.steps, config.optim.warmup_steps
    if config.checkpoint.init_from and config.checkpoint.resume not in ("auto", "never"):
        yield (
            f"checkpoint.resume={config.checkpoint.resume} and checkpoint.init_from={config.checkpoint.init_from} both "
            "say where the weights come from: leave one out"
        )
    if 0 < steps < warmup_steps:
        yield warmup_error(warmup_steps, steps)
    if not 0 < len(run.wandb_project) <= 128 or set(run.wandb_project) & set("/\\#?%:"):
        yield f"run.wandb_project={run.wandb_project!r}: 1 to 128 characters, none of / \\ # ? % :"
    if run.profile_steps:
        first, *last = run.profile_steps
        if len(last) != 1 or not 1 <= first <= last[0]:
            yield f"run.profile_steps={run.profile_steps} is not [first, last] with 1 <= first <= last"


def gpu_rules(config: Config, local_world: int) -> Iterator[str]:
    """What the GPUs of this node ask for."""
    count, document_mask = torch.cuda.device_count(), config.data.document_mask
    if local_world > count:
        yield (
            f"{local_world} processes on this node but {count} GPUs: use torchrun --nproc_per_node={count}, or "
            "CUDA_VISIBLE_DEVICES= for the CPU"
        )
    if config.model.head_dim < 16 and needs_mask(config.model, document_mask):
        yield (
            f"model.head_dim={config.model.head_dim} is below 16, which FlexAttention needs on a GPU: widen the heads"
            + ", or use data.document_mask=false" * document_mask
        )


def memory_needed(config: Config) -> tuple[int, int]:
    """Bytes that training surely takes: of what a replica's ranks share out, and of what each holds beside its slices.

    The first is the state, the second the RoPE tables and a micro-batch, its tokens and their hidden states. It counts
    the real model, on meta, but of many blocks only the first few, and the others like the smallest of these. 2^63
    stands for all that is beyond torch.
    """
    model, data, plan = config.model, config.data, config.parallel
    few = min(model.num_hidden_layers, 8)
    vocab_size = model.vocab_size or max(128, data.tokenizer_vocab_size if data.tokenizer == "train" else 0)
    try:
        with torch.device("meta"):
            llama = Llama(dataclasses.replace(model, vocab_size=vocab_size, num_hidden_layers=few))
    except (RuntimeError, TypeError, OverflowError) as error:
        if model.max_position_embeddings < 2**63 and "verflow" not in repr(error):
            raise
        return 2**63, 2**63
    total, *blocks = (sum(p.numel() for p in part.parameters()) for part in (llama, *llama.model.layers))
    state = STATE_BYTES * (total + (model.num_hidden_layers - few) * min(blocks))
    token = 8 + getattr(torch, plan.param_dtype).itemsize * model.hidden_size // plan.tp  # (B, T) ids, (B, T/tp, D)
    beside = sum(buffer.nbytes for buffer in llama.buffers()) + config.train.micro_batch_size * data.seq_len * token
    return min(state, 2**63), min(beside, 2**63)


def memory_rules(config: Config, world: int, local_world: int) -> Iterator[str]:
    """What surely does not fit is refused here, before hours go into the data. What does fit may still run out."""
    (state, beside), has = memory_needed(config), hardware.memory_per_rank(local_world)
    flat, replicas = flatten(config), config.parallel.dp_replicate
    need = state / max(1, world // replicas) + beside
    if need <= has:
        return
    names = [*(name for name in flat if name.startswith("model.")), "data.seq_len", "train.micro_batch_size"]
    names += ["data.tokenizer_vocab_size"] * (config.model.vocab_size == 0)
    sizes = {name: flat[name] for name in names if type(flat[name]) is int}
    large = ", ".join(f"{name}={size}" for name, size in sizes.items() if 100 * size >= max(sizes.values()))
    remedy = "lower these values" + ", or parallel.dp_replicate" * (replicas > 1)
    if beside < has and state < 2**63:
        of_kind = "GPUs like this one" if torch.cuda.is_available() else f"ranks, {local_world} on each machine"
        remedy += f", or use at least {replicas * math.ceil(state / (has - beside)):,} {of_kind}"
    yield (
        f"{large}: parameters, gradients, moments, RoPE tables and a micro-batch take at least {need / 2**30:,.1f} GiB "
        f"on each rank, which has {has / 2**30:,.1f} GiB (ranks on this machine: {local_world}): {remedy}"
    )


def warmup_error(warmup_steps: int, steps: int) -> str:
    return f"optim.warmup_steps={warmup_steps} is longer than the run of {steps} steps: lower it or raise train.steps"


def batch_errors(train: TrainConfig, dp: int) -> list[str]:
    """Gradient accumulation must be whole."""
    rows = train.micro_batch_size * dp
    if train.global_batch_size % rows == 0:
        return []
    works = divisors(train.global_batch_size // dp) if train.global_batch_size % dp == 0 else []
    remedy = f"a micro_batch_size in {{{', '.join(map(str, works))}}} or " if works else ""
    return [
        f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size="
        f"{train.micro_batch_size} x {dp} data-parallel ranks: use {remedy}a multiple of {rows} rows"
    ]


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


# ---------------------------------------------------------------------------------------------------------------------
# The mesh: checked with the rest, because a length that tp does not divide hangs instead of failing


def divided_by_tp(config: Config) -> dict[str, int]:
    """What tp must divide; not the kv heads (`parallel.ReplicatedKV`). A vocab_size of 0 becomes a multiple of 128."""
    return {
        "model.num_attention_heads": config.model.num_attention_heads,
        "model.hidden_size": config.model.hidden_size,
        "model.intermediate_size": config.model.intermediate_size,
        "model.vocab_size": config.model.vocab_size or 128,
        "data.seq_len": config.data.seq_len,
    }


def automatic_tp(config: Config, world: int, local_world: int, on_gpus: bool) -> int:
    """What "auto" stands for, of the divisors of a node's ranks that pass every rule.

    On GPUs the smallest: TP's collectives stand in the way of compute, FSDP's run beside it (docs/mesh.md). Whether it
    fits, `explain.py --gpu=...` says. On CPUs the largest; on a single node of 4 ranks or more at most half of them, so
    that the mesh is 2-D, as it is there to be tried.
    """
    works = (tp for tp in divisors(local_world) if not mesh_errors(config, tp, world))
    if on_gpus:
        return next((tp for tp in works if not batch_errors(config.train, world // tp)), 1)
    most = local_world // 2 if world == local_world >= 4 else local_world
    return max((tp for tp in works if tp <= most), default=1)


def mesh_errors(config: Config, tp: int, world: int) -> list[str]:
    """Each rule that `world` ranks in groups of `tp` would violate."""
    rules = {"the number of processes": world} | divided_by_tp(config)
    shown = {} if config.model.vocab_size else {"model.vocab_size": "0, which will be a multiple of 128,"}
    works = [n for n in range(1, world + 1) if all(value % n == 0 for value in rules.values())]
    errors = [
        f"{name}={shown.get(name, value)} is not divisible by parallel.tp={tp}: "
        f"use tp in {{{', '.join(map(str, works))}}} or a multiple of {tp} for {name}"
        for name, value in rules.items()
        if value % tp != 0
    ]
    dp, replicas = world // tp, config.parallel.dp_replicate
    if world % tp == 0 and dp % replicas != 0:
        errors.append(
            f"parallel.dp_replicate={replicas} does not divide the {dp} data-parallel ranks "
            f"({world} processes / tp={tp}): use one of {{{', '.join(map(str, divisors(dp)))}}}"
        )
    return errors


# ---------------------------------------------------------------------------------------------------------------------


def help_text() -> str:
    """Every key with its type, bounds, default and meaning."""
    lines = [USAGE, "", "Defaults < CONFIG.toml < command line. Lists are TOML arrays: --optim.betas=[0.9,0.99]"]
    for name, default in defaults().items():
        section, meaning, bounds = name.split(".")[0], HINTS[name].__metadata__[0], bounds_of(name)
        if (heading := f"[{section}]") not in lines:
            lines += ["", heading]
        takes = ", ".join([type_name(HINTS[name]), *(f"{sign} {limit}" for sign, limit in bounds)])
        lines.append(f"  --{name}={json.dumps(default)}  ({takes})")
        lines += textwrap.wrap(meaning, 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def print_help() -> None:
    """Once, also where torchrun starts many processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(help_text())
