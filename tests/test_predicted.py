"""What benchmarks/predicted.py makes of this machine; how near it comes is not for a test to say."""

import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks.lines import ROOT
from benchmarks.predicted import straight

SIZES = ["--model.vocab_size=384", "--model.hidden_size=32", "--model.intermediate_size=64", "--data.seq_len=32"]
SIZES += ["--model.num_attention_heads=4", "--model.num_key_value_heads=2", "--model.num_hidden_layers=1"]
SIZES += ["--data.tokenizer_vocab_size=384"]
MESH = "dp 2 x tp 2"  # where all is to be measured


def test_a_line_is_found_and_is_never_negative():
    assert straight([(x, 3 + 2 * x) for x in (1, 4, 9)]) == pytest.approx((3, 2))
    assert straight([(1, 5), (2, 4)])[1] == 0
    assert straight([(1, 1), (2, 4)])[0] == 0


def test_a_mesh_is_measured_and_predicted(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the {i}th line of a text that is long enough for a few rows\n" for i in range(2000)))
    command = [
        sys.executable,
        ROOT / "benchmarks/predicted.py",
        "--turns=2",
        "--steps=1",
        "--size=32",
        f"--mesh={MESH}",
    ]
    done = subprocess.run([*command, *SIZES, f"--data.dataset={text}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed, _, hardware = done.stdout.partition("\n\n")
    (row,) = printed.splitlines()[1:]
    assert row.startswith(MESH)
    numbers = [float(number) for number in row.removeprefix(MESH).split()]
    assert all(math.isfinite(number) and number >= 0 for number in numbers), row
    assert min(numbers[:3]) > 0, row
    (rates,) = tomllib.loads(hardware).values()
    single = [rates[key] for key in ("flops", "bandwidth", "link", "launch")]
    assert min(*single, *rates["attention"], *rates["rounds"].values()) > 0, rates
