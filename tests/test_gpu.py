"""What a CPU cannot show: CUDA kernels, NCCL, bf16, fused AdamW. `python -m pytest -m gpu`, on one GPU or more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import packed_rows, sharp_model, window_in_every_second_block

import model
import parallel
from benchmarks.lines import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = ["--model.hidden_size=256", "--model.intermediate_size=512", "--model.num_hidden_layers=2"]
SIZES += ["--data.tokenizer_vocab_size=1024", "--train.micro_batch_size=4", "--train.steps=20", "--train.eval_every=0"]


def run(folder: Path, *arguments: str, processes: int = 1, gpu: bool = True) -> list[dict]:
    """Training lines of a run of the quickstart's data on so many processes, or on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    command += ["train.py", *SIZES, f"--run.dir={folder}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_gpu_trains_as_cpu_does_from_the_same_weights(tmp_path):
    """Random numbers differ between devices, so the CPU continues the GPU's checkpoint; float32 without TF32."""
    run(tmp_path / "start", "--train.steps=5", "--optim.warmup_steps=1")
    branch = [f"--checkpoint.resume={tmp_path / 'start'}", "--train.steps=15"]
    gpu, cpu = (run(tmp_path / f"gpu{on}", *branch, gpu=on) for on in (True, False))
    assert [line["step"] for line in gpu] == list(range(6, 16))
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)  # other kernels, other order of sums


def test_bf16_compiled_and_checkpointed_training_learns_and_reports_mfu(tmp_path):
    fast = [
        "--parallel.param_dtype=bfloat16",
        "--parallel.compile=true",
        "--parallel.activation_checkpointing=selective",
    ]
    lines = run(tmp_path / "run", *fast)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert 0 < lines[-1]["peak_memory_gib"] < 10
    assert lines[-1]["mfu"] is None or 0 < lines[-1]["mfu"] < 1


def test_resume_is_bitwise_identical_on_a_gpu(tmp_path):
    exact = ["--train.deterministic=true", "--checkpoint.every=10", "--checkpoint.keep=5"]
    whole = run(tmp_path / "whole", *exact)
    first = tmp_path / "whole" / "checkpoints" / "step_00000010"
    again = run(tmp_path / "again", *exact, f"--checkpoint.resume={first}")
    assert [(line["loss"], line["grad_norm"]) for line in again] == [
        (line["loss"], line["grad_norm"]) for line in whole[10:]
    ]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kinds", ["documents", "windows", "windows in documents"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
def test_flex_attention_computes_what_a_dense_mask_does(monkeypatch, dtype, tolerance, kinds, compiled, checkpointing):
    """Loss and gradients; other kernels sum in another order, and bf16 rounds to 4e-3."""
    batch = [tensor.cuda() for tensor in packed_rows([100, 1, 150, 49], [300], [3, 290, 7])]
    batch = batch if "documents" in kinds else batch[:2]  # without positions
    if "windows" in kinds:
        monkeypatch.setattr(model, "mask_of", window_in_every_second_block)
    results = []
    for mask in (model.dense_mask, model.block_mask):
        monkeypatch.setattr(model, "block_mask", mask)
        llama = sharp_model(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=300).cuda()
        for block in llama.model.layers:
            if checkpointing == "selective":
                parallel.keep_selected_activations(block)
            if compiled:
                parallel.apply_compile(block)
            if checkpointing == "full":
                parallel.keep_no_activations(block)
        for parameter in llama.parameters():
            parameter.data = parameter.to(dtype)
        loss = llama(*batch)
        loss.backward()
        results.append((loss.item(), {name: p.grad.float() for name, p in llama.named_parameters()}))
    (expected_loss, expected), (loss, gradients) = results
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < tolerance * expected[name].norm(), name


def test_packed_documents_that_do_not_see_each_other_are_learnt_from(tmp_path):
    masked = ["--data.layout=pack", "--data.document_mask=true", "--parallel.param_dtype=bfloat16"]
    lines = run(tmp_path / "run", *masked, "--parallel.compile=true", "--train.eval_every=10")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


def test_float32_attention_with_grouped_queries_makes_no_matrix_of_all_pairs():
    """4 heads x 8,192 x 8,192 float32 would be 1 GiB, and backward needs more than one of them."""
    attention = model.Llama(model.ModelConfig(num_attention_heads=4, num_key_value_heads=2)).model.layers[0].self_attn
    attention, x = attention.cuda(), torch.randn(1, 8192, 256, device="cuda", requires_grad=True)
    cos, sin = torch.ones(2, 8192, 64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(x, cos, sin, None).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**29


def test_a_chunk_of_the_loss_takes_a_tenth_of_the_memory_at_most():
    memory = torch.cuda.get_device_properties(0).total_memory
    assert model.logits_at_once(torch.device("cuda")) * 16 <= max(memory / 10, 2**31)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("tp", [1, 2])
def test_two_gpus_compute_what_one_does(tmp_path, tp):
    one = run(tmp_path / "one")
    two = run(tmp_path / "two", f"--parallel.tp={tp}", processes=2)
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
