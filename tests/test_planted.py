"""Law 1's comparisons are not blind: a mistake planted into the mesh makes each of them fail.

Their settings keep rounding small on any CPU, and must not make mistakes small as well. The mistakes are those that
raise no error: a gradient that should be summed over an axis of the mesh and is not, or only once too little.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from test_mesh import BF16, STEPS, Runs, assert_same, assert_within_noise, tail
from test_train import Lab, assert_close, facts, train_here
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor.parallel import ParallelStyle, SequenceParallel

import parallel

NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")


class LocalNorm(SequenceParallel):
    """A norm that is computed on a rank's own positions, outside of DTensor, as if it were left out of the plan.

    `gradient` says what this rank's gradient of the weight is: partial over tp, which is right, or already the whole.
    """

    def __init__(self, gradient: Placement):
        super().__init__()
        self.gradient = gradient

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def forward(x: DTensor) -> DTensor:  # (B, T/tp, D)
            weight = module.weight.to_local(grad_placements=[self.gradient])
            y = nn.functional.rms_norm(x.to_local(), module.normalized_shape, weight, module.eps)
            return DTensor.from_local(y, device_mesh, x.placements)

        module.forward = forward
        return super()._apply(module, device_mesh)


def replaced(plan: Callable[..., dict[str, ParallelStyle]], name: str, style: ParallelStyle, *arguments: Any) -> dict:
    """The plan with another style for `name`, where it has one."""
    found = plan(*arguments)
    return found | ({name: style} if name in found else {})


def with_mistake(mistake: str, function: Callable, *arguments: Any) -> Any:
    """On each rank: `function` on a mesh that has this mistake."""
    with pytest.MonkeyPatch.context() as patch:
        name = mistake.removesuffix(", summed")
        if name in NORMS:
            norm = LocalNorm(Replicate() if name == mistake else Partial())
            for plan in ("block_plan", "top_level_plan"):
                patch.setattr(parallel, plan, partial(replaced, getattr(parallel, plan), name, norm))
        elif mistake == "k and v":  # where tp does not divide the kv heads
            patch.setattr(parallel, "Partial", Replicate)
        else:
            assert mistake == "mean over dp"
            patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda module, factor: None)
        return function(*arguments)


def planted(ranks: Callable, mistake: str) -> Callable:
    """`ranks`, on a mesh that has this mistake."""
    return lambda world, function, *arguments: ranks(world, with_mistake, mistake, function, *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# test_mesh.py: metrics and final parameters

FOUR_HEADS, THREE_HEADS = {}, {"model__num_key_value_heads": 3}


@pytest.fixture(scope="module")
def alone(ranks, corpus, tmp_path_factory) -> Runs:
    return Runs(ranks, corpus, tmp_path_factory.mktemp("alone"))


@pytest.fixture
def train_with(ranks, corpus, tmp_path) -> Callable:
    def run(mistake: str, world: int, tp: int, options: dict[str, Any]) -> tuple[list[dict], dict]:
        runs = Runs(planted(ranks, mistake), corpus, tmp_path)
        return runs(world, parallel__tp=tp, train__micro_batch_size=4, **options)

    return run


def late(lines: list[dict]) -> list[dict]:
    """Of a run that goes on from a checkpoint: no step 1, which is held tighter."""
    return [line for line in lines if line["step"] > STEPS // 2]


@pytest.mark.parametrize(
    ("mistake", "world", "tp", "heads"),
    [
        *((name, 2, 2, FOUR_HEADS) for name in NORMS),
        ("input_layernorm", 4, 2, FOUR_HEADS),
        ("k and v", 2, 2, THREE_HEADS),
        ("k and v", 4, 4, THREE_HEADS),
        ("mean over dp", 2, 1, FOUR_HEADS),
    ],
)
def test_a_mistake_is_seen_in_metrics_early_and_late_and_in_final_parameters(
    alone, train_with, mistake, world, tp, heads
):
    (lines, parameters), reference = train_with(mistake, world, tp, heads), alone(1, **heads)
    right_lines, right_parameters = reference
    with pytest.raises(AssertionError, match=r"loss|grad_norm"):
        assert_same((lines, right_parameters), reference)
    with pytest.raises(AssertionError, match=r"loss|grad_norm"):
        assert_same((late(lines), right_parameters), (late(right_lines), right_parameters))
    with pytest.raises(AssertionError, match="weight"):
        assert_same((right_lines, parameters), reference)


def test_what_is_planted_in_a_norm_is_only_the_missing_sum(alone, train_with):
    assert_same(train_with("input_layernorm, summed", 2, 2, FOUR_HEADS), alone(1))


@pytest.mark.parametrize(("mistake", "tp", "heads"), [("k and v", 2, THREE_HEADS), ("mean over dp", 1, FOUR_HEADS)])
def test_a_large_mistake_is_seen_in_bf16_too(alone, train_with, mistake, tp, heads):
    """A norm's is not: it is smaller than bf16's noise."""
    reference = [tail(alone(1, **BF16, **heads, train__micro_batch_size=size)) for size in (8, 4, 2, 1)]
    with pytest.raises(AssertionError, match="against"):
        assert_within_noise(tail(train_with(mistake, 2, tp, BF16 | heads)), reference)


# ---------------------------------------------------------------------------------------------------------------------
# test_train.py: metrics


@pytest.fixture(scope="module")
def metrics_of(ranks, tmp_path_factory) -> Callable:
    """Metrics of the command line's tiny run on one rank, or on the 2 x 2 mesh of four with a mistake."""
    lab = Lab(tmp_path_factory.mktemp("lab"))

    def run(name: str, mistake: str | None, *arguments: str) -> list[dict[str, Any]]:
        run_dir = lab.folder / name
        world, tp, pool = (1, 1, ranks) if mistake is None else (4, 2, planted(ranks, mistake))
        command = [str(lab.config), f"--data.dataset={lab.documents}", f"--run.dir={run_dir}", f"--parallel.tp={tp}"]
        pool(world, train_here, [*command, *arguments], str(lab.folder / "hf/d"))
        return facts(run_dir)

    return run


@pytest.mark.parametrize(("mistake", "kv_heads"), [*((name, 2) for name in NORMS), ("k and v", 1), ("mean over dp", 2)])
def test_a_mistake_is_seen_in_metrics_of_the_command_line_early_and_late(metrics_of, mistake, kv_heads):
    heads = f"--model.num_key_value_heads={kv_heads}"
    reference = metrics_of(f"alone, {kv_heads}, {mistake}", None, heads)
    lines = metrics_of(f"{mistake}, {kv_heads}", mistake, heads)
    with pytest.raises(AssertionError, match="step"):
        assert_close(lines, reference)
    with pytest.raises(AssertionError, match="step"):
        assert_close(late(lines), late(reference))
