"""A start that is refused, or killed at any point, leaves the right command working, with the same result."""

import contextlib
import io
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_train import Lab, facts, snapshot
from tokenizers import Tokenizer
from torch import nn

import checkpoint
import configs
import train
from configs import OptimConfig
from model import Llama
from runtime import rundir, storage
from runtime.ranks import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def half(lab, ranks) -> Path:
    """A run of six steps of twelve: its checkpoints 3 and 6, and lines of step 7, which was not kept."""
    run_dir = lab.folder / "half"
    (message, _), *_ = ranks(2, start, command(lab, run_dir, "--train.steps=6"), cache(lab))
    assert message == ""
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "loss": 1.0}\n')
    return run_dir


@pytest.fixture(scope="module")
def reference(lab, half, ranks) -> Path:
    """The same, gone on with to step 12 without any mishap."""
    run_dir = lab.folder / "reference"
    shutil.copytree(half, run_dir)
    assert {message for message, _ in ranks(2, start, command(lab, run_dir), cache(lab))} == {""}
    return run_dir


def cache(lab: Lab) -> str:
    return str(lab.folder / "hf/d")


def command(lab: Lab, run_dir: Path, *more: str) -> list[str]:
    options = [f"--data.dataset={lab.documents}", f"--run.dir={run_dir}", "--parallel.tp=1", "--train.steps=12"]
    return [str(lab.config), *options, "--checkpoint.every=3", "--train.eval_every=0", *more]


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_after(number: int) -> Iterator[None]:
    """Nothing happens any more on this disk once so many files have been replaced, or names changed, by a start."""
    numbers, write, rename = count(1), storage.write_atomically, Path.rename

    def act(change, *arguments):
        if next(numbers) > number:
            raise Killed
        return change(*arguments)

    with (
        mock.patch.object(storage, "write_atomically", lambda *arguments: act(write, *arguments)),
        mock.patch.object(Path, "rename", lambda *arguments: act(rename, *arguments)),
    ):
        yield


class OneNormMore(Llama):
    def __init__(self, config):
        super().__init__(config)
        self.model["extra_norm"] = nn.RMSNorm(config.hidden_size)


class Wider(Llama):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size + 128, bias=False)


def momentum(model: Llama, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=optim.lr, momentum=0.9)


CODE = {
    "": {},
    "parameter": {"Llama": OneNormMore},
    "shape": {"Llama": Wider},
    "optimizer": {"make_optimizer": momentum},
}


def start(arguments: list[str], cache: str, code: str = "", kill: int = 1000) -> tuple[str, str]:
    """The message that ended a run with this rank's other `code`, and what was printed."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    message, printed = "", io.StringIO()
    with (
        mock.patch.multiple(train, **CODE[code]) if code else contextlib.nullcontext(),
        killed_after(kill),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            for _ in train.train(configs.load(arguments), CPU):
                pass
        except UserError as error:
            message = str(error)
        except Killed:
            message = "killed"
    return message, printed.getvalue()


def kept(run_dir: Path) -> dict:
    """All but the lock, which says who was here last."""
    return {name: value for name, value in snapshot(run_dir).items() if name != ".lock"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("parameter", [r"model\.model\.extra_norm\.weight: absent there, \(32,\) now"]),
        ("shape", [r"model\.lm_head\.weight: \(384, 32\) there, \(512, 32\) now"]),
        ("optimizer", [r"exp_avg: \(\d+.*\) there, absent now", "and .* more"]),
    ],
)
def test_code_that_the_checkpoint_does_not_fit_gets_one_message_and_the_right_command_still_works(
    lab, half, reference, ranks, code, words
):
    run_dir = Path(shutil.copytree(half, lab.folder / f"other_{code}"))
    before = kept(run_dir)
    messages = {message for message, _ in ranks(2, start, command(lab, run_dir), cache(lab), code)}
    (message,) = messages
    assert message.startswith(f"{run_dir}/checkpoints/step_00000006 does not fit this model and optimizer:\n")
    assert "--run.dir" in message and all(re.search(word, message) for word in words), message
    assert kept(run_dir) == before
    (message, printed), *_ = ranks(2, start, command(lab, run_dir), cache(lab))
    assert message == "" and "resumed from" in printed
    assert facts(run_dir) == facts(reference)


@pytest.mark.parametrize(("now", "refused"), [("false", False), ("true", True)])
def test_a_run_that_is_older_than_a_key_goes_on_with_its_default_only(lab, half, ranks, now, refused):
    run_dir = Path(shutil.copytree(half, lab.folder / f"older_{now}"))
    for path in checkpoint.complete_checkpoints(run_dir):
        state = checkpoint.read_state(path)
        del state["identity"]["model.tie_word_embeddings"], state["at_default"]
        checkpoint.write_state(path, state)
    before = kept(run_dir)
    (message, _), *_ = ranks(2, start, command(lab, run_dir, f"--model.tie_word_embeddings={now}"), cache(lab))
    assert ("model.tie_word_embeddings: False there, True now" in message) == refused
    assert (kept(run_dir) == before) == refused


@pytest.mark.parametrize("writes", range(4))
def test_a_start_that_is_killed_between_two_writes_changes_nothing_of_the_result(lab, half, reference, ranks, writes):
    """tokenizer.json, config.toml, metrics.jsonl, the damaged checkpoint put aside."""
    run_dir = Path(shutil.copytree(half, lab.folder / f"killed_{writes}"))
    damaged = checkpoint.step_folder(run_dir, 7)
    shutil.copytree(checkpoint.step_folder(run_dir, 6), damaged)
    (damaged / "state.json").write_text("{")
    ((message, _),) = ranks(1, start, command(lab, run_dir), cache(lab), "", writes)
    assert message == "killed"
    (message, printed), *_ = ranks(2, start, command(lab, run_dir), cache(lab))
    assert message == "" and f"resumed from {run_dir}/checkpoints/step_00000006" in printed
    assert facts(run_dir) == facts(reference)
    assert len([*(run_dir / "checkpoints").glob("damaged-step_00000007-*")]) == 1


def test_a_configuration_without_a_checkpoint_refuses_nothing_and_is_replaced_with_a_line_saying_so(lab, ranks):
    run_dir = lab.folder / "no_checkpoint"
    run_dir.mkdir()
    for text, replaced in (("[model]\nhidden_size = 48\n", True), ("[model]\nhidden_", True), (None, False)):
        if text is not None:
            (run_dir / "config.toml").write_text(text)
        (message, printed), *_ = ranks(1, start, command(lab, run_dir, "--checkpoint.every=0"), cache(lab), "", 2)
        assert message, "killed before there is a checkpoint"
        assert ("of which there is no checkpoint: replaced" in printed) == replaced, text
    assert rundir.recorded_config(run_dir)["model"]["hidden_size"] == 32


def test_the_tokenizer_of_a_start_without_a_checkpoint_is_not_taken_for_this_runs(lab, ranks):
    """A start that ended before its first checkpoint leaves a tokenizer; the next may want another."""
    run_dir = lab.folder / "another_tokenizer"
    for size in (270, 264):  # 256 bytes, BOS, EOS and some more
        more = [f"--data.tokenizer_vocab_size={size}", "--checkpoint.every=0"]
        (message, _), *_ = ranks(1, start, command(lab, run_dir, *more), cache(lab), "", 2)
        assert message and not checkpoint.complete_checkpoints(run_dir), "killed at its first save"
        assert Tokenizer.from_file(str(run_dir / "tokenizer.json")).get_vocab_size() == size


def test_config_toml_says_what_made_it(half):
    first = (half / "config.toml").read_text().splitlines()[0]
    assert re.match(rf"# commit [0-9a-f]+\S*, torch {re.escape(torch.__version__)}: \S+", first)


def test_every_nth_checkpoint_is_never_pruned_and_a_run_goes_on_from_the_newest(lab, half, ranks):
    run_dir = Path(shutil.copytree(half, lab.folder / "milestones"))
    more = ["--checkpoint.keep_every=6", "--checkpoint.every=2", "--checkpoint.keep=1", "--train.steps=17"]
    assert {message for message, _ in ranks(2, start, command(lab, run_dir, *more), cache(lab))} == {""}
    steps = [checkpoint.step_of(path) for path in checkpoint.complete_checkpoints(run_dir)]
    assert steps == [6, 12, 17]
