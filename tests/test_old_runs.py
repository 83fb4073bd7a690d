"""Runs that were made at cc6ef64 go on: tests/fixtures/cc6ef64 holds three, each with a checkpoint of step 6.

`metrics.jsonl` there has all 12 steps as that commit computed them, on another machine. The six steps after the
checkpoint are done again here, so they may differ by what its kernels round otherwise; rows, tokens and learning rates
may not differ at all.
"""

import shutil
from pathlib import Path

import pytest
from test_train import Lab, facts, read_metrics, without_bars

FIXTURE = Path(__file__).parent / "fixtures/cc6ef64"
STREAMED = ["--data.dataset=files", "--data.streaming=true", "--data.val_fraction=0.5"]
RUNS = {
    "run": ["tiny.toml"],
    "streamed": ["tiny.toml", *STREAMED, "--data.stream_files=2", "--data.layout=pack"],
    "streamed_one": ["tiny.toml", *STREAMED, "--data.stream_files=8"],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("old_runs"))
    shutil.copytree(FIXTURE, lab.cwd, dirs_exist_ok=True)
    return lab


@pytest.mark.parametrize(("name", "arguments"), RUNS.items(), ids=RUNS)
def test_a_run_of_an_earlier_commit_goes_on_with_the_same_rows_and_the_same_numbers(lab, name, arguments):
    expected = facts(lab.cwd / name)
    result = lab.run_to_end(*arguments, f"--run.dir={name}")
    assert f"resumed from {name}/checkpoints/step_00000006" in result.stdout and without_bars(result.stderr) == ""
    found = facts(lab.cwd / name)
    assert found[:7] == expected[:7], "not done again: six steps and the evaluation after the fourth"
    for line, before in zip(found, expected, strict=True):
        for key in ("step", "tokens", "lr", "val_tokens"):
            assert line.get(key) == before.get(key)
        # six steps of other rounding; eps is large, so that Adam does not make much of it
        assert line == pytest.approx(before, rel=1e-4)
    assert len(read_metrics(lab.cwd / name)) == 15
