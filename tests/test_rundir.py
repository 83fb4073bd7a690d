"""The run directory: one job at a time, the right checkpoint, one run or another, and what a start writes."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from harm import pretend

import checkpoint
import configs
from configs import Config
from model import ModelConfig
from runtime import rundir, storage
from runtime.ranks import UserError


def prepare(run_dir: Path, config: str, tokenizer: str, first_step: int, damaged: list[Path]) -> None:
    """As a start does it, with the lines of metrics that it keeps."""
    rundir.prepare_run(run_dir, config, tokenizer, rundir.kept_metrics(run_dir / "metrics.jsonl", first_step), damaged)


# ---------------------------------------------------------------------------------------------------------------------
# The run directory


def test_an_unfinished_save_is_never_taken_for_a_checkpoint_and_removed_at_the_next_start(tmp_path):
    (done,), (unfinished,) = pretend(tmp_path, 5), pretend(tmp_path, 9, prefix=".tmp-step_")
    assert checkpoint.complete_checkpoints(tmp_path) == [done]
    assert rundir.find_resume(tmp_path, "auto") == [done]
    prepare(tmp_path, "a = 1\n", "{}", 6, [])
    assert not unfinished.exists() and done.exists()
    with pytest.raises(ValueError, match="neither a checkpoint nor a run directory"):
        pretend(tmp_path / "other", 3, prefix=".tmp-step_")
        rundir.find_resume(tmp_path, str(tmp_path / "other"))


def test_checkpoints_are_ordered_by_step(tmp_path):
    assert checkpoint.complete_checkpoints(tmp_path / "nowhere") == []
    later, earlier = pretend(tmp_path, 100_000, 99_999)
    assert checkpoint.complete_checkpoints(tmp_path) == [earlier, later]


@pytest.mark.parametrize(
    ("own", "resume", "expected"),
    [
        ([], "auto", []),
        ([3, 7], "auto", ["own/checkpoints/step_00000007", "own/checkpoints/step_00000003"]),
        ([], "never", []),
        ([], "other", ["other/checkpoints/step_00000004", "other/checkpoints/step_00000002"]),
        ([], "other/checkpoints/step_00000002", ["other/checkpoints/step_00000002"]),
        ([3, 7], "own/checkpoints/step_00000007", ["own/checkpoints/step_00000007", "own/checkpoints/step_00000003"]),
        ([3, 7], "own", ["own/checkpoints/step_00000007", "own/checkpoints/step_00000003"]),
    ],
)
def test_resume_starts_from_the_newest_that_is_intact(tmp_path, own, resume, expected):
    """All that come into question, the newest first."""
    pretend(tmp_path / "own", *own)
    pretend(tmp_path / "other", 2, 4)
    resume = resume if resume in ("auto", "never") else str(tmp_path / resume)
    assert rundir.find_resume(tmp_path / "own", resume) == [tmp_path / path for path in expected]


def test_a_branch_that_was_begun_goes_on_whatever_its_origin_does(tmp_path):
    (newest,) = pretend(tmp_path / "own", 7)
    origin = str(tmp_path / "other")
    checkpoint.write_state(newest, {"step": 7, "branched_from": origin})
    for step in (2, 9):
        pretend(tmp_path / "other", step)
        assert rundir.find_resume(tmp_path / "own", origin) == [newest]
    (later,) = pretend(tmp_path / "own", 8)
    (later / "state.json").write_text("{")  # damaged: the one before it tells
    assert rundir.find_resume(tmp_path / "own", origin) == [later, newest]


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("never", r'checkpoint.resume="never", but .*own holds step_00000007: start over in another --run.dir'),
        ("own/checkpoints/step_00000003", r"step_00000003 is not the newest.* branch off into another --run.dir"),
        ("other", r"other is not the newest checkpoint of .*own, nor what that run branched off"),
        ("nowhere", r"nowhere is neither a checkpoint nor a run directory"),
        ("empty", r"empty is neither a checkpoint nor a run directory"),
    ],
)
def test_resume_refuses_what_would_do_damage_or_is_no_checkpoint(tmp_path, resume, message):
    pretend(tmp_path / "own", 3, 7)
    pretend(tmp_path / "other", 2, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        rundir.find_resume(tmp_path / "own", resume if resume == "never" else str(tmp_path / resume))


METRICS = [
    '{"step": 1, "loss": 5.0}\n',
    '{"step": 2, "loss": 4.0}\n',
    '{"step": 2, "val_loss": 4.5}\n',
    '{"step": 3, "loss": 3.0}\n',
    '{"step": 3, "val_loss": 3.5}\n',
]


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', '{"step": 2, "loss": 4.0}'])
@pytest.mark.parametrize(("first_step", "kept"), [(1, 0), (2, 1), (3, 3), (4, 5)])
def test_metrics_keep_whole_lines_of_steps_that_are_not_done_again(tmp_path, first_step, kept, torn):
    (tmp_path / "metrics.jsonl").write_text("".join(METRICS) + torn)
    prepare(tmp_path, "", "", first_step, [])
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(METRICS[:kept])


def test_the_run_directory_is_made_with_what_it_is_given(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    with rundir.hold(tmp_path / "a/b"):
        prepare(tmp_path / "a/b", 'x = "日本"\n', '{"é": 1}', 1, [])
    files = {str(path.relative_to(tmp_path / "a/b")) for path in (tmp_path / "a/b").rglob("*")}
    assert files == {".lock", "checkpoints", "config.toml", "tokenizer.json"}
    assert (tmp_path / "a/b/config.toml").read_text(encoding="utf-8") == 'x = "日本"\n'
    assert (tmp_path / "a/b/tokenizer.json").read_text(encoding="utf-8") == '{"é": 1}'


@pytest.mark.parametrize("at", ["os.fsync", "os.replace"])
def test_a_write_that_is_cut_off_leaves_the_old_content(tmp_path, at):
    path = tmp_path / "file"
    storage.write_atomically(path, "old")
    with mock.patch(at, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        storage.write_atomically(path, "new é")
    assert path.read_text() == "old"
    storage.write_atomically(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# One run or another

FLAT = configs.flatten(Config(model=ModelConfig(vocab_size=384)))
FREE = ("data.num_workers", "data.tokenizer_train_mib")
FIXED = [key for key in FLAT if key.startswith(("model.", "data.")) and key not in FREE]
FIXED += ["train.seed", "train.global_batch_size"]


def another(value: Any) -> Any:
    """A value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case _:
            return {"factor": 8.0}


@pytest.mark.parametrize("key", FIXED)
def test_what_makes_a_run_must_not_change_within_it(tmp_path, key):
    (path,) = pretend(tmp_path, 3)
    state = {"identity": rundir.identity(FLAT)}
    rundir.refuse_another_run(path, state, rundir.identity(FLAT))
    changed = {**FLAT, key: another(FLAT[key])}
    with pytest.raises(UserError) as error:
        rundir.refuse_another_run(path, state, rundir.identity(changed))
    assert f"{key}: {FLAT[key]!r} there, {changed[key]!r} now" in str(error.value)


def test_a_key_that_the_record_lacks_had_its_default(tmp_path, monkeypatch):
    """A run that is older than a key goes on with the key's default, and with nothing else."""
    state = {"identity": rundir.identity(FLAT)}
    defaults = {**configs.defaults(), "model.new": False}
    monkeypatch.setattr(configs, "defaults", lambda: defaults)
    rundir.refuse_another_run(tmp_path, state, {**rundir.identity(FLAT), "model.new": False})
    with pytest.raises(UserError, match=r"model\.new: False there, True now"):
        rundir.refuse_another_run(tmp_path, state, {**rundir.identity(FLAT), "model.new": True})


def test_a_key_that_only_the_record_has_is_refused_unless_it_had_its_default(tmp_path):
    recorded = {**rundir.identity(FLAT), "model.gone": 3}
    with pytest.raises(UserError, match=r"model\.gone: 3 there, and no such key now"):
        rundir.refuse_another_run(tmp_path, {"identity": recorded, "at_default": []}, rundir.identity(FLAT))
    rundir.refuse_another_run(tmp_path, {"identity": recorded, "at_default": ["model.gone"]}, rundir.identity(FLAT))


@pytest.mark.parametrize("key", [key for key in FLAT if key not in FIXED])
def test_everything_else_may_change(tmp_path, key):
    changed = {**FLAT, key: "another"}
    assert rundir.identity(changed) == rundir.identity(FLAT)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_a_damaged_checkpoint_is_put_aside_when_the_run_goes_on_without_it(tmp_path):
    earlier, newest = pretend(tmp_path, 3, 7)
    prepare(tmp_path, "", "", 4, [newest])
    assert checkpoint.complete_checkpoints(tmp_path) == [earlier]
    (aside,) = (tmp_path / "checkpoints").glob("damaged-*")
    assert aside.name.startswith("damaged-step_00000007") and (aside / "state.json").exists()
    pretend(tmp_path, 7)
    prepare(tmp_path, "", "", 4, [newest])
    assert len([*(tmp_path / "checkpoints").glob("damaged-step_00000007*")]) == 2, "twice is no collision"


@pytest.mark.parametrize(
    "text",
    ["[model]\nhidden_size = ", "[model\nhidden_size = 3\n", "hidden_size = 3\n", "\udcff\n"],
    ids=["cut off", "no TOML", "no section", "no text"],
)
def test_a_damaged_config_toml_is_named(tmp_path, text):
    (tmp_path / "config.toml").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"config.toml is damaged .*remove it, it is written again"):
        rundir.recorded_config(tmp_path)


@pytest.mark.parametrize("line", ["{", '{"loss": 1.0}', "3", "null", '{"step": "2"}', '{"step": null}', "", "\udcff"])
def test_a_damaged_line_of_metrics_is_named_and_nothing_is_changed(tmp_path, line):
    (damaged,) = pretend(tmp_path, 5)
    pretend(tmp_path, 9, prefix=".tmp-step_")
    text = METRICS[0] + line + "\n" + METRICS[1]
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    before = sorted(tmp_path.rglob("*")), (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is damaged: remove that line"):
        prepare(tmp_path, "", "", 2, [damaged])
    assert (sorted(tmp_path.rglob("*")), (tmp_path / "metrics.jsonl").read_bytes()) == before


# ---------------------------------------------------------------------------------------------------------------------
# One job at a time


def test_a_run_directory_is_held_by_one_job_until_that_lets_go(tmp_path):
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    with rundir.hold(tmp_path / "run"):
        with pytest.raises(UserError, match=r"run.dir=.*run is in use by another job: wait .* another --run.dir"):
            rundir.hold(tmp_path / "run")
        rundir.hold(tmp_path / "other").close()
    rundir.hold(tmp_path / "run").close()
