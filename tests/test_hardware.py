"""What the machine can do is found out by trying it."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.lines import ROOT
from runtime.hardware import slow_bfloat16

QUESTION = "import torch; from runtime.hardware import slow_bfloat16; print(slow_bfloat16(torch.device('cpu')))"


def answer(**environment: str) -> str:
    """In a process of its own: the libraries read their environment once."""
    arguments = {"env": os.environ | environment, "cwd": ROOT, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-c", QUESTION], check=True, **arguments).stdout.strip()


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN, which imitates CPUs"
)
def test_a_cpu_without_bf16_instructions_is_found_slow():
    """oneDNN's switch makes this machine one; on such a machine it changes nothing."""
    assert answer(ONEDNN_MAX_CPU_ISA="AVX2", DNNL_MAX_CPU_ISA="AVX2") == "True"


@pytest.mark.skipif(
    not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
    reason="no bf16 instructions here",
)
def test_a_cpu_with_bf16_instructions_is_not():
    assert answer() == "False"


def test_asking_leaves_the_process_as_it_was():
    threads, numbers = torch.get_num_threads(), torch.get_rng_state()
    slow_bfloat16.cache_clear()
    slow_bfloat16(torch.device("cpu"))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), numbers)


def test_other_devices_are_not_tried():
    assert not slow_bfloat16(torch.device("meta"))
