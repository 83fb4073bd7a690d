"""Weights in Hugging Face's format, both ways: export.py against `transformers`, and `checkpoint.init_from`."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from documents import DOCUMENTS, TOKENIZERS, byte_tokenizer
from test_model import SHAPES, make_config

import configs
import export
import train
from checkpoint import read_state
from configs import ConfigError
from corpus.config import DataConfig
from corpus.tokenizer import special_tokens, without_rules
from generate import load_run
from huggingface import config as pretrained
from huggingface import weights
from model import IGNORE_INDEX, Llama, ModelConfig
from runtime.ranks import UserError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
MESHES = {"1": (1, 1), "tp2": (2, 2), "dp2 x tp2": (4, 2)}
SMALL = {
    "model.hidden_size": 64,
    "model.intermediate_size": 96,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 8,
    "model.num_key_value_heads": 2,
}
KEYS = {
    "data.tokenizer_vocab_size": 300,
    "data.seq_len": 32,
    "data.val_fraction": 0,
    "optim.lr": 1e-3,
    "optim.warmup_steps": 0,
    "train.steps": 1,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
    "checkpoint.every": 1,
}
STILL = {"optim.lr": 1e-30}  # a step that changes no weight: what it adds is lost in rounding


def arguments(values: dict[str, Any], config: Path | None = None) -> list[str]:
    return ([str(config)] if config else []) + [f"--{key}={configs.toml_value(value)}" for key, value in values.items()]


def run(arguments: list[str], cache: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The training loop, on each rank; returns the inputs and targets of its forward passes."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    seen, forward = [], Llama.forward

    def listening(model: Llama, input_ids: torch.Tensor, targets: torch.Tensor, *positions: torch.Tensor):
        seen.append((input_ids, targets))
        return forward(model, input_ids, targets, *positions)

    Llama.forward = listening
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for _ in train.train(configs.load(arguments), CPU):
                pass
    finally:
        Llama.forward = forward
    return seen


def refusal(arguments: list[str], cache: str) -> str:
    try:
        run(arguments, cache)
    except UserError as error:
        return str(error)
    return "no error"


class Runs:
    """Runs of a step or so, in folders of their own."""

    def __init__(self, ranks: Callable, corpus: Path, folder: Path):
        self.ranks, self.corpus, self.folder, self.numbers = ranks, corpus, folder, itertools.count()
        self.cache = str(folder / "cache")
        self.empty = folder / "empty.toml"
        self.empty.write_text("")

    def values(self, keys: dict[str, Any]) -> dict[str, Any]:
        return {
            **KEYS,
            "data.dataset": str(self.corpus),
            "run.dir": str(self.folder / f"run{next(self.numbers)}"),
            **keys,
        }

    def __call__(self, world: int = 1, tp: int = 1, **keys: Any) -> tuple[Path, list]:
        """The run directory, and what each rank saw. Keys are written with __ for the dot."""
        values = self.values({key.replace("__", "."): value for key, value in keys.items()} | {"parallel.tp": tp})
        return Path(values["run.dir"]), self.ranks(world, run, arguments(values, self.empty), self.cache)

    def refused(self, world: int = 1, **keys: Any) -> str:
        """Its message; the run directory must not exist afterwards."""
        values = self.values({key.replace("__", "."): value for key, value in keys.items()} | {"parallel.tp": 1})
        messages = self.ranks(world, refusal, arguments(values, self.empty), self.cache)
        assert len(set(messages)) == 1, "on all ranks alike"
        assert not Path(values["run.dir"]).exists()
        return messages[0]


@pytest.fixture(scope="module")
def runs(ranks, corpus, tmp_path_factory) -> Runs:
    return Runs(ranks, corpus, tmp_path_factory.mktemp("huggingface"))


def dotted(values: dict[str, Any], section: str = "model") -> dict[str, Any]:
    return {f"{section}__{key}": value for key, value in values.items()}


@pytest.fixture(scope="module")
def small(runs) -> Path:
    """The run of a small model."""
    return runs(**{key.replace(".", "__"): value for key, value in SMALL.items()})[0]


@pytest.fixture(scope="module")
def exported(small) -> Path:
    """It in float32, in several files."""
    return export.export(small, None, None, "float32", 40e3 / 2**30)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers' own library reads them."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def weight_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """Of the exported model, to be broken."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    """Of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# ---------------------------------------------------------------------------------------------------------------------
# Out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["grouped", "tied", "llama 3 rope", "wide heads"])
def test_transformers_loads_what_was_exported_bit_for_bit_and_has_its_logits(runs, tmp_path, shape, dtype):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, **SHAPES[shape]}
    run_dir, _ = runs(**dotted(sizes))
    out = export.export(run_dir, tmp_path / "out", None, dtype, 40e3 / 2**30)
    ours, _, special = load_run(run_dir, CPU)
    ours.to(getattr(torch, dtype)).float()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == getattr(torch, dtype)
    assert len(list(out.glob("*.safetensors"))) > 1
    for name, tensor in ours.named_parameters():
        assert torch.equal(theirs.get_parameter(name).float(), tensor), name
    rope = {"rope_type": "default", **ours.config.rope_scaling, "rope_theta": ours.config.rope_theta}
    assert json.loads((out / "config.json").read_text())["rope_parameters"] == theirs.config.rope_parameters == rope
    assert (theirs.config.bos_token_id, theirs.generation_config.eos_token_id) == (special.bos, special.eos)
    input_ids = torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs.float()(input_ids).logits, ours(input_ids), rtol=1e-5, atol=1e-5)


def test_config_json_says_what_transformers_itself_writes(exported, tmp_path):
    """Under its names of today; the rest is for older readers."""
    ours = json.loads((exported / "config.json").read_text())
    transformers.AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert {key: ours.get(key) for key in theirs.keys() & ours.keys()} == {
        key: theirs[key] for key in theirs.keys() & ours.keys()
    }
    assert theirs.keys() - ours.keys() == {
        "transformers_version",
        "pretraining_tp",
        "pad_token_id",
        "use_cache",
        "attention_dropout",
    }
    assert ours.keys() - theirs.keys() == {"rope_theta", "rope_scaling", "torch_dtype"}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_gives_hostile_texts_the_tokens_of_training_and_gives_them_back(tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    special = special_tokens(tokenizer, DataConfig())
    ids = {"bos_token_id": special.bos, "eos_token_id": special.eos}
    (tmp_path / "config.json").write_text(json.dumps(pretrained.config_json(make_config(), "float32", ids)))
    for name, text in export.tokenizer_files(tokenizer, special, 32).items():
        (tmp_path / name).write_text(text)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), without_rules(tokenizer, special)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (special.bos, special.eos, 32)
    for text in DOCUMENTS:
        tokens = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text, verbose=False).input_ids == tokens
        assert theirs.decode(tokens) == text


def test_a_step_can_be_named_and_out_is_in_the_run_directory_unless_it_is(runs):
    run_dir, _ = runs(**dotted({"hidden_size": 32, "intermediate_size": 32}), train__steps=2)
    first, last = (export.export(run_dir, None, step, "bfloat16", 4) for step in (1, None))
    assert [path.relative_to(run_dir).as_posix() for path in (first, last)] == [
        "huggingface/step_00000001",
        "huggingface/step_00000002",
    ]
    assert weight_files(first) != weight_files(last)
    with pytest.raises(UserError, match="no complete checkpoint of step 3: there are those of 1, 2"):
        export.export(run_dir, None, 3, "bfloat16", 4)


def command(monkeypatch, *words: object) -> str | int | None:
    """In this process; what it exits with, None for 0."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    try:
        export.main()
    except SystemExit as error:
        return error.code
    return None


def test_the_command_says_where_it_wrote_and_does_not_write_over_anything(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "out"
    words = [sys.executable, ROOT / "export.py", small, out]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"written: {out}\n", "")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert command(monkeypatch, small, out) == f"error: {out} exists: name another folder, or remove it"
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert command(monkeypatch, tmp_path).startswith(f"error: {tmp_path} holds no complete checkpoint")
    assert command(monkeypatch, small, "--max-shard-gib=0") == 2
    assert "--max-shard-gib=0.0 is not above 0" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    written = weights.write_atomically

    def full(path: Path, content: str) -> None:
        if path.name == weights.INDEX:
            raise OSError(28, "No space left on device")
        written(path, content)

    monkeypatch.setattr(weights, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        export.export(small, tmp_path / "out", None, "float32", 40e3 / 2**30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["checkpoint", "tokenizer.json", "config.toml"])
def test_a_damaged_run_is_not_exported(small, tmp_path, broken):
    run_dir = Path(shutil.copytree(small, tmp_path / "run"))
    path = next(run_dir.glob("checkpoints/*/*.distcp")) if broken == "checkpoint" else run_dir / broken
    path.write_bytes(path.read_bytes()[:-20] + b"[")
    with pytest.raises(UserError, match=re.escape(path.name)):
        export.export(run_dir, tmp_path / "out", None, "float32", 4)
    assert not (tmp_path / "out").exists()


def test_heads_that_transformers_refuses_are_refused_before(runs, tmp_path):
    run_dir, _ = runs(**dotted({"hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}))
    with pytest.raises(UserError, match=r"hidden_size=44 is not divisible by model.num_attention_heads=6"):
        export.export(run_dir, tmp_path / "out", None, "float32", 4)


@dataclasses.dataclass
class Fork(ModelConfig):
    window: int = 0
    kinds: list[str] = dataclasses.field(default_factory=list)


def test_a_key_of_a_fork_is_refused_unless_it_is_off():
    """transformers would pass over it in silence, and compute something else."""
    pretrained.config_json(Fork(vocab_size=64), "float32", {})
    with pytest.raises(UserError, match=r"has no model.window=8, model.kinds=\['a'\], and would compute without"):
        pretrained.config_json(Fork(window=8, kinds=["a"]), "float32", {})


def test_a_key_that_a_fork_exports_is_taken_over_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "KNOWN", pretrained.KNOWN | {"window"})
    model = Fork(**dataclasses.asdict(make_config()), window=8)
    (tmp_path / "config.json").write_text(json.dumps(pretrained.config_json(model, "float32", {})))
    monkeypatch.setattr(pretrained, "ModelConfig", Fork)
    assert pretrained.model_keys(str(tmp_path)) == dataclasses.asdict(model)


MEMORY = """
import resource, sys
sys.path.insert(0, {root!r})
sys.argv[0] = "export.py"
import export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if {really}:
    export.main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_memory(really: bool, *arguments: object) -> int:
    """Bytes, of a process that imports export.py, and exports or does not."""
    code = MEMORY.format(root=str(ROOT), really=really)
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def test_an_export_takes_the_memory_of_two_files_at_most(runs, tmp_path):
    sizes = {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    largest = 16384 * 512 * 4  # bytes of the embedding in float32
    run_dir, _ = runs(**dotted(sizes), train__global_batch_size=1, train__micro_batch_size=1, data__seq_len=8)
    metadata = next(run_dir.glob("checkpoints/*/.metadata")).stat().st_size
    imports = peak_memory(False)
    for dtype, shard_mib in {"float32": 16, "bfloat16": 8}.items():
        out = tmp_path / dtype
        peak = peak_memory(True, run_dir, out, f"--max-shard-gib={shard_mib / 1024}", f"--dtype={dtype}")
        files = sorted(path.stat().st_size for path in out.glob("*.safetensors"))
        assert len(files) >= 8
        assert files[-3] < shard_mib * 2**20 + 10_000, "but for embedding and head, which have a file each"
        assert peak - imports <= metadata + 2 * max(*files, largest)
    shutil.rmtree(run_dir)


# ---------------------------------------------------------------------------------------------------------------------
# In


@pytest.mark.parametrize("mesh", MESHES)
def test_what_came_in_goes_out_again_bit_for_bit_on_any_mesh(runs, exported, mesh):
    world, tp = MESHES[mesh]
    run_dir, _ = runs(world, tp, checkpoint__init_from=str(exported), **dotted({"lr": 1e-30}, "optim"))
    again = export.export(run_dir, None, None, "float32", 40e3 / 2**30)
    assert len(weight_files(again)) > 3
    assert weight_files(again) == weight_files(exported)


def test_bfloat16_weights_of_a_tied_model_come_in_and_go_out_again(runs, tmp_path):
    run_dir, _ = runs(**dotted({"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}))
    first = export.export(run_dir, None, None, "bfloat16", 4)
    again, _ = runs(2, 2, checkpoint__init_from=str(first), **dotted({"lr": 1e-30}, "optim"))
    assert weight_files(export.export(again, None, None, "bfloat16", 4)) == weight_files(first)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A Llama of transformers' own making, in several files, with a tokenizer whose tokens have other names."""
    folder = tmp_path_factory.mktemp("foreign")
    rope = {"rope_theta": 5000.0, **SHAPES["llama 3 rope"]["rope_scaling"]}
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=64, rope_parameters=rope)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    tokenizer = byte_tokenizer("<start>", "<stop>", "<s>")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": {"content": "<start>", "lstrip": False}, "eos_token": "<stop>", "pad_token": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def mean_loss(folder: Path, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """By transformers, over all targets."""
    model, loss, count = transformers.AutoModelForCausalLM.from_pretrained(folder).float(), 0.0, 0
    for input_ids, targets in rows:
        logits = model(input_ids).logits.flatten(0, 1).double()
        loss += torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum").item()
        count += (targets != IGNORE_INDEX).sum().item()
    return loss / count


@pytest.mark.parametrize("mesh", MESHES)
def test_the_first_loss_after_a_start_from_transformers_own_model_is_transformers(runs, foreign, mesh):
    world, tp = MESHES[mesh]
    run_dir, seen = runs(world, tp, checkpoint__init_from=str(foreign))
    assert len(list(foreign.glob("*.safetensors"))) > 2
    line = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    rows = [row for rank in seen[::tp] for row in rank]
    assert sum(len(input_ids) for input_ids, _ in rows) == KEYS["train.global_batch_size"]
    assert 0 in {int(row[0]) for input_ids, _ in rows for row in input_ids}, "<start>, by tokenizer_config.json"
    assert line["loss"] == pytest.approx(mean_loss(foreign, rows), rel=1e-5)


def version_4(folder: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    rope = content.pop("rope_parameters")
    content |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": content.pop("dtype"), "rope_scaling": rope}
    path.write_text(json.dumps(content))


def test_config_json_of_transformers_4_says_the_same(foreign, exported, tmp_path):
    for source in (foreign, exported):
        older = Path(shutil.copytree(source, tmp_path / source.name))
        version_4(older)
        assert pretrained.model_keys(str(older)) == pretrained.model_keys(str(source))
    edit(older / "config.json", rope_scaling={"type": "default"}, head_dim=None, num_key_value_heads=None)
    keys = pretrained.model_keys(str(older))
    assert (keys["rope_scaling"], keys["head_dim"], keys["num_key_value_heads"]) == ({}, 8, 8)


def test_a_rank_reads_the_pages_of_its_slice_alone(tmp_path):
    """Measured by the system: memory of this process, pages of files included."""
    rows = torch.randn(4096, 2048)  # 32 MiB
    weights.write_shards(tmp_path, [["x"]], lambda names: {"x": rows})

    def memory() -> int:
        (kib,) = re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(kib) * 1024

    stored = weights.read_header(tmp_path / "model-00001-of-00001.safetensors")["x"]
    before = memory()
    mapped = stored.mapped()
    part = torch.empty(512, 2048).copy_(mapped[1024:1536])
    taken = memory() - before
    assert torch.equal(part, rows[1024:1536])
    assert taken < 3 * part.nbytes, "the slice, and its pages"


def test_a_run_goes_on_when_the_model_that_it_came_from_is_gone(runs, exported, tmp_path):
    model = Path(shutil.copytree(exported, tmp_path / "model"))
    keys = {"checkpoint__init_from": str(model), "run__dir": str(tmp_path / "run"), "model__rope_theta": 7000.0}
    runs(**keys)
    shutil.rmtree(model)
    (tmp_path / "run" / "config.toml").unlink()  # what is needed stands in the checkpoint
    runs(**keys, train__steps=2)
    keys["checkpoint__init_from"] = str(tmp_path / "moved")
    run_dir, _ = runs(**keys, train__steps=3)
    lines = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3]
    recorded = configs.recorded(run_dir)
    assert recorded["model.rope_theta"] == 7000.0, "the command line's"
    assert "checkpoint.init_from" not in read_state(run_dir / "checkpoints/step_00000003")["identity"]
    assert f'init_from = "{tmp_path}/moved"' in (run_dir / "config.toml").read_text()
    assert read_state(run_dir / "checkpoints/step_00000003")["init_from"] == str(model)
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        load(f"--checkpoint.init_from={model}", f"--run.dir={tmp_path}/new")


def test_a_run_that_did_not_come_from_a_model_is_not_taken_for_one_that_did(runs, exported, small):
    values = {**KEYS, "data.dataset": str(runs.corpus), "run.dir": str(small), "checkpoint.init_from": str(exported)}
    (told,) = runs.ranks(1, refusal, arguments(values, runs.empty), runs.cache)
    assert "is of another run" in told
    assert f"data.tokenizer: 'train' there, '{exported}/tokenizer.json' now" in told


def test_weights_are_started_from_and_not_an_optimizer_or_a_schedule(runs, exported):
    run_dir, _ = runs(checkpoint__init_from=str(exported), optim__warmup_steps=1, train__steps=2)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["lr"] == KEYS["optim.lr"]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Callable[[Path], str]:
    """The cache of the Hub, and no network: `hub(folder)` puts a model into it and returns its id."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(folder: Path) -> str:
        repository = tmp_path / "hub" / "models--someone--llama"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        return "someone/llama"

    return put


def test_a_model_of_the_hub_is_found_by_its_id(hub, foreign):
    name = hub(foreign)
    config = configs.load([f"--checkpoint.init_from={name}", "--data.seq_len=32"])
    assert (config.data.tokenizer, config.data.bos_token, config.model.num_hidden_layers) == (name, "<start>", 3)
    found = weights.find(name, config.model)
    assert {stored.path.name for stored in found.values()} == {path.name for path in foreign.glob("*.safetensors")}


def test_a_model_that_is_nowhere_gets_one_message(hub, runs):
    for name in ("someone/else", "no/such/folder"):
        with pytest.raises(
            ConfigError, match=f"init_from={name}: config.json cannot be read [(].*[)]: it takes a folder"
        ):
            configs.load([f"--checkpoint.init_from={name}"])


def test_a_bad_network_is_not_taken_for_a_file_that_is_not_there(monkeypatch):
    """The tokenizer's configuration may be missing; but then it is known to be."""

    def unreachable(*_: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no answer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"tokenizer_config.json cannot be read [(]no answer[)]"):
        pretrained.tokenizer_keys("someone/llama")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert pretrained.tokenizer_keys("someone/llama") == {"tokenizer": "someone/llama"}


def test_nodes_that_hold_different_models_hear_of_it(exported, copy):
    """By name, shape and the small tensors: a model that was trained on has other norms."""
    config = load(f"--checkpoint.init_from={exported}", "--data.seq_len=32").model
    ours, theirs = weights.find(str(exported), config), weights.find(str(copy), config)
    assert weights.fingerprint(ours) == weights.fingerprint(theirs), "the path does not matter"
    stored = theirs["model.norm.weight"]
    content = bytearray(stored.path.read_bytes())
    content[stored.start] ^= 1
    stored.path.write_bytes(content)
    assert weights.fingerprint(ours) != weights.fingerprint(theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Which value counts


def load(*words: object) -> configs.Config:
    return configs.load([str(word) for word in words])


def test_defaults_config_json_file_and_command_line_count_in_this_order(exported, tmp_path):
    file = tmp_path / "some.toml"
    file.write_text(f'[checkpoint]\ninit_from = "{exported}"\n[model]\nhidden_size = 64\n[data]\nseq_len = 16\n')
    config = load(file, "--model.rms_norm_eps=1e-6")
    assert config.model.hidden_size == 64, "in both"
    assert config.model.intermediate_size == 96, "config.json's, and not the default"
    assert config.model.max_position_embeddings == 32, "config.json's, and not seq_len"
    assert config.model.rms_norm_eps == 1e-6, "the command line's"
    assert config.data.seq_len == 16
    assert config.data.tokenizer == str(exported / "tokenizer.json")
    assert config.data.bos_token == "<|begin_of_text|>"


def test_without_a_file_quickstarts_data_are_taken_but_not_its_model_and_tokenizer(exported):
    config = load(f"--checkpoint.init_from={exported}", "--data.seq_len=32")
    assert (config.model.num_hidden_layers, config.model.initializer_range) == (2, 0.02)
    assert config.data.tokenizer == str(exported / "tokenizer.json")
    assert config.data.dataset == "stdlib"
    assert config.optim.lr == load().optim.lr


def test_another_tokenizer_may_be_named(exported, tmp_path):
    byte_tokenizer("<s>", "</s>").save(str(tmp_path / "other.json"))
    words = [f"--checkpoint.init_from={exported}", "--data.seq_len=32"]
    config = load(*words, f"--data.tokenizer={tmp_path}/other.json")
    assert config.data.tokenizer == str(tmp_path / "other.json")
    assert config.data.bos_token == "", "is asked of that tokenizer"


def test_contradictions_are_reported_together_and_with_whatever_else_is_wrong(exported, tmp_path):
    file = tmp_path / "some.toml"
    file.write_text("[model]\nnum_hidden_layers = 3\nrope_theta = 5e5\ntie_word_embeddings = false\n")
    words = [file, f"--checkpoint.init_from={exported}", "--model.hidden_size=32", "--train.stepz=3"]
    with pytest.raises(ConfigError) as error:
        load(*words, "--checkpoint.resume=runs/other")
    told = str(error.value)
    for name, value, where, there in (
        ("num_hidden_layers", 3, file, 2),
        ("rope_theta", 500000.0, file, 10000.0),
        ("hidden_size", 32, "the command line", 64),
    ):
        assert f"model.{name}={value} in {where} is not that of checkpoint.init_from={exported}, {there}" in told
    assert "tie_word_embeddings" not in told
    assert "did you mean train.steps?" in told
    assert "both say where the weights come from" in told


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

CONFIGS = {
    "another model": ({"model_type": "mistral"}, "model_type = 'mistral' instead of 'llama'"),
    "no model": ({"model_type": None}, "model_type = 'unknown'"),
    "attention bias": ({"attention_bias": True}, "attention_bias = True instead of False"),
    "another bias": ({"mlp_bias": True}, "mlp_bias = True instead of False"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout = 0.1 instead of 0.0"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' instead of 'silu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} instead of None"),
    "another rope": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "RoPE of type 'yarn'"),
    "an older one": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    "a number less": ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "llama3"),
    "a number more": ({"rope_parameters": {"rope_type": "default", "beta_fast": 2.0}}, "beta_fast"),
    "half of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 instead of 1.0"),
    "no width": ({"hidden_size": None}, "hidden_size = 0 is no size"),
    "a text for a width": ({"hidden_size": "64"}, "hidden_size = '64' is no size"),
    "a text for heads": ({"num_key_value_heads": "2"}, "model.num_key_value_heads='2' has the wrong type"),
    "nonsense": ({"rope_parameters": 7, "rope_scaling": [1]}, "RoPE of type 7"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_this_llama_is_refused_with_what_differs(copy, changes, message):
    edit(copy / "config.json", **changes)
    with pytest.raises(ConfigError) as error:
        load(f"--checkpoint.init_from={copy}")
    assert message in str(error.value)


def test_all_that_differs_is_told_at_once(copy):
    edit(copy / "config.json", attention_bias=True, hidden_act="relu")
    with pytest.raises(ConfigError) as error:
        load(f"--checkpoint.init_from={copy}")
    assert len(str(error.value).splitlines()) == 3


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The header of the first file."""
    path = first_file(folder)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / weights.INDEX).read_text())["weight_map"]


EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda f: first_file(f).write_bytes(first_file(f).read_bytes()[:-1]),
        "no safetensors file of weights, or not whole",
    ),
    "longer": (
        lambda f: first_file(f).write_bytes(first_file(f).read_bytes() + b"x"),
        "no safetensors file of weights, or not whole",
    ),
    "empty": (lambda f: first_file(f).write_bytes(b""), "do not hold the header"),
    "foreign": (lambda f: first_file(f).write_bytes(b"PK" * 1000), "do not hold the header"),
    "no JSON": (
        lambda f: first_file(f).write_bytes((9).to_bytes(8, "little") + b"x" * 99),
        "no safetensors file of weights",
    ),
    "missing": (lambda f: first_file(f).unlink(), "No such file"),
    "no weights": (lambda f: [path.unlink() for path in f.glob("model*")], "model.safetensors cannot be read"),
    "whole numbers": (lambda f: rewrite(f, lambda h: h[EMBEDDING].update(dtype="I8")), "is I8, which is no weight"),
    "other bytes": (lambda f: rewrite(f, lambda h: h[EMBEDDING].update(dtype="F16")), "has not as many bytes"),
    "another shape": (lambda f: rewrite(f, lambda h: h[EMBEDDING]["shape"].reverse()), "(64, 384) there, (384, 64)"),
    "no offsets": (
        lambda f: rewrite(f, lambda h: h[EMBEDDING].pop("data_offsets")),
        "no safetensors file of weights, or not whole",
    ),
    "another name": (lambda f: rewrite(f, lambda h: h.update(x=h.pop(EMBEDDING))), "is in no file, and in"),
    "not in the index": (
        lambda f: edit(f / weights.INDEX, weight_map={k: v for k, v in weight_map(f).items() if k != NORM}),
        f"{NORM} is in model-0000",
    ),
    "no index": (lambda f: (f / weights.INDEX).write_text("{"), "is no JSON object"),
    "a list for an index": (lambda f: (f / weights.INDEX).write_text("[]"), "is no JSON object"),
    "files elsewhere": (lambda f: edit(f / weights.INDEX, weight_map={"x": "../x.safetensors"}), "files beside it"),
    "no files": (lambda f: edit(f / weights.INDEX, weight_map=["x"]), "files beside it"),
    "lists of files": (lambda f: edit(f / weights.INDEX, weight_map={"x": ["y"]}), "files beside it"),
}


@pytest.mark.parametrize(("harm", "message"), FILES.values(), ids=FILES)
def test_broken_and_foreign_files_are_refused_in_one_line(copy, exported, harm, message):
    model = load(f"--checkpoint.init_from={exported}", "--data.seq_len=32").model
    harm(copy)
    with pytest.raises(UserError) as error:
        weights.find(str(copy), model)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1 + ("another shape" in message or "there, " in message)


def test_missing_and_surplus_tensors_are_named(exported, copy):
    config = load(f"--checkpoint.init_from={exported}", "--data.seq_len=32").model
    deeper, flatter = (configs.ModelConfig(**{**vars(config), "num_hidden_layers": n}) for n in (3, 1))
    with pytest.raises(UserError, match=r"layers.2.mlp.down_proj.weight: absent there, \(64, 96\) now"):
        weights.find(str(exported), deeper)
    with pytest.raises(UserError, match=r"layers.1.mlp.down_proj.weight: \(64, 96\) there, absent now"):
        weights.find(str(exported), flatter)


def test_positions_that_transformers_once_wrote_are_passed_over(exported, tmp_path):
    """One file without an index, as small models have it, with a tensor that no model of today has."""
    from safetensors.torch import save_file

    there = tensors(exported) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(there, tmp_path / "model.safetensors")
    config = load(f"--checkpoint.init_from={exported}", "--data.seq_len=32").model
    found = weights.find(str(tmp_path), config)
    assert found.keys() == tensors(exported).keys()
    assert all(torch.equal(stored.mapped(), there[name]) for name, stored in found.items())


def test_every_rank_hears_of_a_broken_file_and_nothing_is_written(runs, copy):
    FILES["truncated"][0](copy)
    told = runs.refused(4, checkpoint__init_from=str(copy), train__micro_batch_size=2)
    assert "no safetensors file of weights, or not whole" in told
