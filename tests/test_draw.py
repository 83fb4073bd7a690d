"""The pictures of docs/mesh.md, and the commands on that page."""

import math
import re
import shlex
import sys
from types import SimpleNamespace

import pytest

import explain
import train
from benchmarks.lines import ROOT
from benchmarks.published import ROWS
from cost.choose import candidates, with_values
from cost.hardware import known, named
from cost.predict import predict
from docs import draw

PAGE = (ROOT / "docs" / "mesh.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^python .*$", PAGE, re.MULTILINE)]
TINY = ["--model.num_hidden_layers=2", "--model.vocab_size=4096", "--train.micro_batch_size=2"]
H100 = named("h100")


@pytest.fixture(scope="module")
def config():
    return explain.load(TINY, 4, 4)


def is_picture(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and 0 < path.stat().st_size < 100_000


def test_each_tp_has_its_fastest_that_fits(config, tmp_path):
    """Of all candidates: to take the last of an order for the first would show here."""
    every = list(candidates(config, 2, 2, H100, train.make_optimizer))
    best = draw.best_by_tp(config, 2, H100)
    assert list(best) == [1, 2]
    for tp, choice in best.items():
        assert choice.prediction.fits
        assert 0 < choice.prediction.tokens_per_second < math.inf
        assert choice.rank() == min(each.rank() for each in every if each.key[0] == tp)
    made = SimpleNamespace(tokens_per_second=6000.0)
    draw.draw_tokens({2: best, 4: best}, [(ROWS[0], made), (ROWS[1], made)], tmp_path / "tokens.png")
    assert is_picture(tmp_path / "tokens.png")


def test_memory_is_positive_and_its_parts_add_up_to_what_is_predicted(config, tmp_path):
    found = {kept: draw.gib_by_tp(config, 4, H100, (1, 2), kept) for kept in ("none", "full")}
    for kept, by_tp in found.items():
        for tp, parts in by_tp.items():
            assert all(0 < gib < math.inf for gib in parts.values())
            report = explain.explain(with_values(config, tp, 2, kept), 4, train.make_optimizer, H100.memory_gib)
            assert sum(parts.values()) == pytest.approx(predict(report, H100, 4).memory_gib)
    draw.draw_memory(found, H100, tmp_path / "memory.png")
    assert is_picture(tmp_path / "memory.png")


def test_the_published_runs_are_those_of_8b_on_one_kind_of_gpu(monkeypatch):
    monkeypatch.setattr(draw.published, "prediction_of", lambda row, config: row.gpus)
    found = [(row.gpus, row.tp, row.tokens, made) for row, made in draw.beside_published()]
    assert found == [(8, 1, 6667, 8), (128, 1, 6514, 128), (64, 8, 4378, 64)]


def test_a_picture_that_does_not_exist_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw.py", "tokens_by_pp"])
    with pytest.raises(SystemExit, match="no picture tokens_by_pp: there are tokens_by_tp, memory_by_tp"):
        draw.main()


def test_the_page_shows_both_pictures_and_they_are_there():
    shown = re.findall(r"\]\(pictures/(\w+)\.png\)", PAGE)
    assert sorted(shown) == sorted(draw.PICTURES)
    assert all(is_picture(draw.FOLDER / f"{name}.png") for name in shown)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_of_the_page_is_accepted(command, monkeypatch):
    """What it prints takes a minute for all; here its files exist and its keys are valid together."""
    monkeypatch.chdir(ROOT)
    assert (ROOT / command[1]).exists()
    if command[1] == "explain.py":
        tools = ("--world-size=", "--local-world-size=", "--gpu=", "--node-link-gbps=", "--choose", "--json")
        options = dict(word.partition("=")[::2] for word in command if word.startswith(tools))
        arguments = [word for word in command[2:] if not word.startswith(tools)]
        explain.load(arguments, int(options["--world-size"]), int(options.get("--local-world-size", 8)))
        assert options.get("--gpu", "h100") in known()


def test_there_are_commands():
    assert len(COMMANDS) > 5
