"""What integrations/ and docs/ promise, with the real libraries: `make test-integrations`."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from corpus.tokenizer import SpecialTokens, without_rules
from generate import load_run
from huggingface.config import config_json
from model import Llama, ModelConfig

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SEQ_LEN, STEPS = 32, 48
ARGUMENTS = ["config.toml", "--data.dataset=documents.jsonl"]
CONFIG = f"""
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[data]
tokenizer_vocab_size = 320
seq_len = {SEQ_LEN}
val_fraction = 0
[optim]
lr = 1e-2
warmup_steps = 2
eps = 1e-4
[train]
steps = {STEPS}
global_batch_size = 8
micro_batch_size = 2
"""


def environment(folder: Path, own: dict[str, str]) -> dict[str, str]:
    """Without a network, and with a cache of its own."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"} | own


def run_process(folder: Path, *words: object, status: int | None = 0, **own: str) -> subprocess.CompletedProcess:
    """In a folder, to its end; its output is shown where it ends otherwise than with `status`. None: it may do so."""
    command, everything = list(map(str, words)), environment(folder, own)
    done = subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True, timeout=500)
    assert status in (None, done.returncode), done.stdout + done.stderr
    return done


@contextlib.contextmanager
def start(folder: Path, *words: object, **own: str) -> Iterator[subprocess.Popen]:
    """In a folder, with its output in the file `output` there; killed at the end if it is still there."""
    with (folder / "output").open("w") as file:
        command, everything = list(map(str, words)), environment(folder, own)
        process = subprocess.Popen(command, cwd=folder, env=everything, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def output(file: Path) -> str:
    """What a process has written there by now."""
    return file.read_text(errors="replace") if file.exists() else ""


def torchrun(ranks: int) -> list[object]:
    return [Path(sys.executable).parent / "torchrun", "--standalone", f"--nproc_per_node={ranks}"]


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness


def rolling_windows(tokens: list[int], bos: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and the targets at their end: BOS first, then windows of `length` inputs, the last one moved back."""
    text = [bos, *tokens]
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        first = max(0, end - length) if start else 0
        yield text[first:end], tokens[start:end]


def own_loglikelihood(model: Llama, tokenizer: Tokenizer, special: SpecialTokens, text: str) -> float:
    """The sum over a document's tokens, BOS as prefix and without EOS, by our own model."""
    tokens, total = without_rules(tokenizer, special).encode(text, add_special_tokens=False).ids, 0.0
    for inputs, targets in rolling_windows(tokens, special.bos, model.config.max_position_embeddings):
        with torch.no_grad():
            logs = model(torch.tensor([inputs]))[0].double().log_softmax(-1)[-len(targets) :]
        total += logs.gather(1, torch.tensor(targets)[:, None]).sum().item()
    return total


def test_lm_eval_gives_each_document_the_likelihood_that_our_own_model_gives_it(corpus, tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    shutil.copy(corpus, tmp_path / "corpus.jsonl")
    train = [sys.executable, ROOT / "train.py", "config.toml", "--data.dataset=corpus.jsonl", "--run.dir=run"]
    run_process(tmp_path, *train)
    run_process(tmp_path, sys.executable, ROOT / "export.py", "run", "out", "--dtype=float32")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[:24]]
    texts += ["x" * n for n in (1, SEQ_LEN, SEQ_LEN + 1, 3 * SEQ_LEN - 1)] + ["é 漢字 <|end_of_text|> \t"]
    texts = [text for text in texts if text.strip()]  # lm_eval has no likelihood of nothing
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = ["--tasks", "documents", "--include_path", ROOT / "integrations" / "lm_eval", "--batch_size", "4"]
    task += ["--device", "cpu", "--log_samples", "--output_path", "results"]
    model = ["--model", "hf", "--model_args", "pretrained=out,dtype=float32"]
    done = run_process(tmp_path, Path(sys.executable).parent / "lm_eval", *model, *task)
    assert "bits_per_byte" in done.stdout
    (samples,) = (tmp_path / "results").rglob("samples_documents_*.jsonl")
    found = {sample["doc"]["text"]: sample for sample in map(json.loads, samples.read_text().splitlines())}
    assert found.keys() == set(texts)
    ours = load_run(tmp_path / "run", CPU)
    for text, sample in found.items():
        assert float(sample["filtered_resps"][0]) == pytest.approx(own_loglikelihood(*ours, text), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Ray Train and SLURM: four ranks, which torchrun starts for comparison


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Whole lines, also while they are being written, without what depends on the machine."""
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1] if (run_dir / "metrics.jsonl").exists() else []
    return [{key: json.loads(line)[key] for key in ("step", "loss", "grad_norm", "lr", "tokens")} for line in lines]


def wait_until(
    condition: Callable[[], Any], process: subprocess.Popen | None = None, told: Callable[[], object] = str
) -> None:
    """As long as the process lives, if one is given. Fails after five minutes, and shows what was `told`."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, told()
        assert process is None or process.poll() is None, process.returncode
        time.sleep(0.02)


@pytest.fixture(scope="module")
def lab(corpus, tmp_path_factory) -> Path:
    """A folder with a configuration, and the run that torchrun has made of it."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "config.toml").write_text(f"{CONFIG}\n[checkpoint]\nevery = 4\n[parallel]\ntp = 2\n")
    shutil.copy(corpus, folder / "documents.jsonl")
    run_process(folder, *torchrun(4), ROOT / "train.py", *ARGUMENTS, "--run.dir=torchrun")
    return folder


def assert_same_run(run_dir: Path, lab: Path) -> None:
    """To 1e-5; the same bits were seen. Each step is there once."""
    ours, theirs = metrics(run_dir), metrics(lab / "torchrun")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, reference in zip(ours, theirs, strict=True):
        assert line == {key: pytest.approx(value, rel=1e-5) for key, value in reference.items()}


# Ray


@pytest.fixture
def ray_environment() -> Iterator[dict[str, str]]:
    """Ray's own files in a short path, as its sockets ask for, and time for slow machines to start."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield {
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "300",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # and so often a line is taken
        }


def ray_command(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "integrations.ray_train", *ARGUMENTS, *arguments]


def test_ray_train_computes_what_torchrun_does_although_a_worker_is_killed_and_the_job_interrupted(
    lab, ray_environment
):
    """With tp 2 x dp 2. Ray starts dead workers again, and the same command a job; both go on from the checkpoint."""
    with start(lab, *ray_command("--run.dir=ray"), **ray_environment) as process:
        wait_until(lambda: len(metrics(lab / "ray")) >= 6, process)
        workers = re.findall(r"pid=(\d+)\) world_rank=", output(lab / "output"))
        assert len(workers) == 4
        os.kill(int(workers[2]), signal.SIGKILL)
        wait_until(lambda: "resumed from ray/checkpoints/step_000000" in output(lab / "output"), process)
        wait_until(lambda: len(metrics(lab / "ray")) >= 14, process)
        process.send_signal(signal.SIGINT)
        process.wait(300)
    assert len(re.findall(r"world_rank=0", output(lab / "output"))) == 2, "they were started again"
    assert len(metrics(lab / "ray")) < STEPS
    again = run_process(lab, *ray_command("--run.dir=ray"), **ray_environment)
    assert "resumed from ray/checkpoints/step_000000" in again.stdout + again.stderr
    assert_same_run(lab / "ray", lab)
    assert metrics(lab / "ray") == metrics(lab / "torchrun"), "bit for bit, as on one machine"


def test_what_a_user_got_wrong_is_said_once_under_ray_and_not_tried_again(lab, ray_environment):
    wrong = run_process(lab, *ray_command("--train.stepz=3"), status=1, **ray_environment)
    assert wrong.stderr == "error: train.stepz: there is no such key: did you mean train.steps?\n"
    assert wrong.stdout == ""
    wrong = run_process(lab, *ray_command("--run.dir=config.toml/wrong"), status=1, **ray_environment)
    assert wrong.stderr.startswith("error: ")
    assert f"{lab}/config.toml" in wrong.stderr
    assert wrong.stderr.count("\n") == 1
    done = run_process(lab, *ray_command("--data.text_column=body", "--run.dir=wrong"), status=1, **ray_environment)
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "data.text_column='body'" in message or "data.text_column=body" in message
    assert "Traceback" not in done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("world_rank=0") == 1
    assert not list(lab.glob("wrong*")), "Ray's folder has gone too"


# SLURM: a cluster of two nodes on this machine, which are network namespaces with names of their own

PROGRAMS = ("ip", "unshare", "hostname", "pkill", "munged", "slurmctld", "slurmd", "sbatch")
# What is not of interest here is switched off. proctrack/pgid: a signal reaches all processes of a task.
SLURM_CONF = """
ClusterName=llama
SlurmctldHost=node0
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
TaskProlog={folder}/prolog
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=600
ReturnToService=2
GresTypes=gpu
NodeName=node[0-1] CPUs=64 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
"""
ON_A_NODE = 'mount --bind "$0/hosts" /etc/hosts && hostname "$1" && shift && exec "$@"'


class Slurm:
    """munged, slurmctld and two slurmd, and their clients on the first node. Each node has a cache of its own."""

    def __init__(self, folder: Path):
        self.folder, self.spaces = folder, [f"llama{os.getpid()}{letter}" for letter in "ab"]
        self.servers: list[subprocess.Popen] = []
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.own = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path}  # of its environment
        files = {
            "slurm.conf": SLURM_CONF.format(folder=folder),
            "gres.conf": f"Name=gpu File={folder}/gpu[0-1]\n",
            "cgroup.conf": "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n",  # else slurmd looks for a mounted one
            "hosts": "127.0.0.1 localhost\n10.231.7.1 node0\n10.231.7.2 node1\n",
            "prolog": f'#!/bin/sh\necho "export HF_HOME={folder}/cache-$SLURMD_NODENAME"\n',
            "munge.key": os.urandom(32).hex(),
            **dict.fromkeys(("gpu0", "gpu1"), ""),
        }
        for name, text in files.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o700)
        for node in (0, 1):
            (folder / f"spool-node{node}").mkdir()

    def command(self, node: int, *words: object) -> list[str]:
        enter = ["ip", "netns", "exec", self.spaces[node], "unshare", "--uts", "--mount", "sh", "-c", ON_A_NODE]
        return [*enter, str(self.folder), f"node{node}", *map(str, words)]

    def serve(self, node: int, *words: object) -> None:
        """In the background; what it says is in the folder."""
        with (self.folder / f"{words[0]}-{node}.output").open("a") as file:
            command, everything = self.command(node, *words), environment(self.folder, self.own)
            self.servers += [subprocess.Popen(command, env=everything, stdout=file, stderr=subprocess.STDOUT)]

    def start(self) -> None:
        first, second = self.spaces
        commands = [
            f"ip netns add {first}",
            f"ip netns add {second}",
            f"ip link add {first} type veth peer name {second}",
        ]
        for number, name in enumerate(self.spaces, 1):
            commands += [f"ip link set {name} netns {name}", f"ip -n {name} addr add 10.231.7.{number}/24 dev {name}"]
            commands += [f"ip -n {name} link set {name} up", f"ip -n {name} link set lo up"]
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            assert done.returncode == 0, f"two nodes need network namespaces, not permitted here: {done.stderr}"
        files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self.serve(0, "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self.serve(0, "slurmctld", "-D")
        for node in (0, 1):
            self.serve(node, "slurmd", "-D", "-N", f"node{node}")
        nodes = ["sinfo", "--noheader", "--Format=StateCompact,Nodes"]
        self.wait_until(lambda: self.run(*nodes, status=None).stdout.split() == ["idle", "2"])

    def wait_until(self, condition: Callable[[], Any]) -> None:
        wait_until(condition, told=lambda: {path.name: output(path)[-3000:] for path in self.folder.glob("*.output")})

    def run(self, *words: object, status: int | None = 0) -> subprocess.CompletedProcess:
        """A client, from the project's folder."""
        return run_process(ROOT, *self.command(0, *words), status=status, **self.own)

    def processes(self, node: int) -> dict[int, str]:
        """The command lines of a node's processes."""
        found = subprocess.run(["ip", "netns", "pids", self.spaces[node]], capture_output=True, text=True).stdout
        lines = {}
        for pid in map(int, found.split()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                lines[pid] = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
        return lines

    def kill(self, node: int, number: int = signal.SIGKILL, only: str = "") -> None:
        """The processes of a node whose command line begins with the expression."""
        for pid, line in self.processes(node).items():
            with contextlib.suppress(ProcessLookupError):
                if re.match(only, line):
                    os.kill(pid, number)

    def stop(self) -> None:
        for node, name in enumerate(self.spaces):
            while self.processes(node):  # some may have been starting
                self.kill(node)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        for server in self.servers:
            server.wait()


class Job:
    """integrations/slurm.sh in the queue, with two processes on each node."""

    def __init__(self, slurm: Slurm, lab: Path, name: str, *arguments: str):
        self.slurm, self.run_dir, self.log = slurm, lab / name, slurm.folder / f"{name}.output"
        data = f"--data.dataset={lab}/documents.jsonl"
        words = ["sbatch", "--parsable", "--gpus-per-node=2", f"--output={self.log}", "integrations/slurm.sh"]
        done = slurm.run(*words, lab / "config.toml", data, f"--run.dir={self.run_dir}", *arguments)
        self.number = done.stdout.strip()

    def state(self) -> tuple[str, int]:
        """And how often it was started again."""
        shown = dict(re.findall(r"(\S+)=(\S*)", self.slurm.run("scontrol", "show", "job", self.number).stdout))
        return shown["JobState"], int(shown["Restarts"])

    def output(self) -> str:
        return output(self.log)

    def reaches(self, step: int) -> None:
        self.slurm.wait_until(lambda: len(metrics(self.run_dir)) >= step)

    def starts(self, again: int = 0) -> None:
        """Its script as well, as far as srun: before its first line nothing hears a signal, and it would die of one."""
        self.slurm.wait_until(lambda: self.state() == ("RUNNING", again))
        self.slurm.wait_until(lambda: any(re.match("srun ", line) for line in self.slurm.processes(0).values()))

    def ends(self) -> tuple[str, int]:
        """Its state, once it is neither running nor to run again."""
        self.slurm.wait_until(lambda: self.state()[0] not in ("PENDING", "RUNNING", "COMPLETING"))
        return self.state()

    def signal(self) -> None:
        """What SLURM does before the time limit: --signal=B:USR1@600."""
        self.slurm.run("scancel", "--batch", "--signal=USR1", self.number)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    assert not missing, (
        f"no {missing} here: apt-get install slurmctld slurmd slurm-client munge iproute2 procps hostname"
    )
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Slurm(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def test_a_slurm_job_that_is_signalled_saves_and_goes_on_by_itself_until_it_is_complete(lab, slurm):
    """Before its time limit, at its start or in the middle: the queue has it again, and the run is that of torchrun."""
    job = Job(slurm, lab, "signalled", "--checkpoint.every=0")
    job.starts()
    job.signal()
    job.starts(again=1)
    told = len(job.output())
    job.reaches(step=2)
    job.signal()
    job.starts(again=2)
    stopped = len(metrics(job.run_dir))
    assert f"stopped at step {stopped}\n" in job.output()[told:]
    assert "srun: error" not in job.output()[told:], (
        "no task has died, such as torchrun: SLURM would kill who still saves"
    )
    assert 2 <= stopped < STEPS
    assert job.ends() == ("COMPLETED", 2), job.output()  # and not queued again
    assert f"resumed from {job.run_dir}/checkpoints/step_{stopped:08d}\n" in job.output()
    assert_same_run(job.run_dir, lab)
    assert {path.name for path in slurm.folder.glob("cache-*")} == {"cache-node0", "cache-node1"}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_slurm_task_that_alone_is_signalled_passes_it_on(lab, slurm, number):
    """As proctrack/cgroup does it: the processes below the task hear nothing of SLURM. The script was not asked."""
    job = Job(slurm, lab, f"task-{number}", "--checkpoint.every=0")
    job.reaches(step=2)
    for node in (0, 1):
        slurm.kill(node, number, only=r"\S*bash -c on_node")
    assert job.ends() == ("COMPLETED", 0), job.output()
    stopped = len(metrics(job.run_dir))
    assert stopped < STEPS
    assert (job.run_dir / "checkpoints" / f"step_{stopped:08d}").exists()


def test_a_slurm_job_goes_on_after_a_node_has_died(lab, slurm):
    job = Job(slurm, lab, "node-dies")
    job.reaches(step=5)
    slurm.kill(1)
    slurm.run("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=killed")  # as after SlurmdTimeout
    reached = len(metrics(job.run_dir))
    assert reached < STEPS
    slurm.serve(1, "slurmd", "-D", "-N", "node1")
    slurm.run("scontrol", "update", "NodeName=node1", "State=RESUME")
    assert job.ends() == ("COMPLETED", 1), job.output()
    assert f"resumed from {job.run_dir}/checkpoints" in job.output()
    assert_same_run(job.run_dir, lab)


def test_the_script_for_slurm_passes_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, ROOT / "integrations" / "slurm.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_tasks_of_srun_that_do_not_know_of_each_other_are_refused_with_what_helps(lab, slurm):
    """And what the message says helps: four tasks that say it make one run."""
    srun = ["srun", "--nodes=2", "--ntasks-per-node=2", "--chdir", lab]
    command = [sys.executable, ROOT / "train.py", *ARGUMENTS, "--run.dir=tasks"]
    refused = slurm.run(*srun, "--ntasks=4", "--label", *command, status=2).stderr  # their lines are mixed
    assert refused.count("error: SLURM_NTASKS=4 without RANK: each task would be a run of its own") == 4, refused
    assert not (lab / "tasks").exists()
    lines = [line.removeprefix("0: ") for line in refused.splitlines() if line.startswith("0:   export ")]
    assert len(lines) == 3
    slurm.run(*srun, "bash", "-c", "\n".join([*lines, 'exec "$@"']), "bash", *command)
    assert_same_run(lab / "tasks", lab)


# ---------------------------------------------------------------------------------------------------------------------
# Lightning, against train.py under torchrun

GRAD_CLIP = 1.7
# Beside CONFIG: a step has three micro-steps on two data-parallel ranks
LIGHTNING_ARGUMENTS = [*ARGUMENTS, "--parallel.tp=2", "--model.vocab_size=384", f"--optim.grad_clip={GRAD_CLIP}"]
LIGHTNING_ARGUMENTS += ["--train.steps=10", "--train.global_batch_size=12"]
LIGHTNING = pytest.mark.parametrize("module", ["integrations.lightning_fabric", "integrations.lightning_trainer"])


@pytest.fixture(scope="module")
def lightning_lab(corpus, tmp_path_factory) -> Path:
    """A folder with a configuration, and the run that train.py has made of it under torchrun."""
    folder = tmp_path_factory.mktemp("lightning")
    (folder / "config.toml").write_text(CONFIG)
    shutil.copy(corpus, folder / "documents.jsonl")
    run_process(folder, *torchrun(4), ROOT / "train.py", *LIGHTNING_ARGUMENTS, "--run.dir=torchrun")
    return folder


def under_lightning(folder: Path, ranks: int, *words: object, status: int = 0) -> subprocess.CompletedProcess:
    return run_process(
        folder, *torchrun(ranks), *words[:-1], *LIGHTNING_ARGUMENTS, words[-1], status=status, PYTHONPATH=str(ROOT)
    )


def steps_of(module: str, output: str, run_dir: Path) -> list[dict[str, float]]:
    """Fabric's lines on standard output, or what the Trainer's logger wrote."""
    if module.endswith("fabric"):
        return [json.loads(line) for line in output.splitlines()]
    with (run_dir / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        lines = [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)]
    return [line | {"step": line["step"] + 1} for line in lines]  # Lightning counts from 0


@LIGHTNING
def test_lightning_computes_what_torchrun_does_and_warns_of_nothing(lightning_lab, module):
    reference = [json.loads(line) for line in (lightning_lab / "torchrun" / "metrics.jsonl").read_text().splitlines()]
    clipped = [line["grad_norm"] > GRAD_CLIP for line in reference]
    assert any(clipped)
    assert not all(clipped)
    done = under_lightning(lightning_lab, 4, "-m", module, f"--run.dir={module}")
    steps = steps_of(module, done.stdout, lightning_lab / module)
    assert [line["step"] for line in steps] == [line["step"] for line in reference]
    for line, expected in zip(steps, reference, strict=True):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), f"{name} of step {expected['step']}"
    assert "warn" not in done.stderr.lower()
    assert "deprecated" not in done.stderr


# Runs a module with NaN in all that `to_empty` allocates. Writes which tensors are nothing but NaN after it, and which
# hold any NaN when the first batch comes.
POISONED = """
import json, math, os, runpy, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from model import Llama

def write(stage, model, test):
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    locals = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    names = [name for name, tensor in locals.items() if test(tensor.isnan())]
    Path(f"{sys.argv[0]}-{stage}-{os.environ['RANK']}").write_text(json.dumps(names))

def poisoned_to_empty(module, **options):
    to_empty(module, **options)
    for tensor in [*module.parameters(), *module.buffers()]:
        torch.nn.init.constant_(tensor.to_local() if isinstance(tensor, DTensor) else tensor, math.nan)
    write("allocated", module, torch.all)
    return module

def first_forward(model, *batch):
    Llama.forward = forward
    write("started", model, torch.any)
    return forward(model, *batch)

to_empty, torch.nn.Module.to_empty = torch.nn.Module.to_empty, poisoned_to_empty
forward, Llama.forward = Llama.forward, first_forward
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
"""


@LIGHTNING
def test_under_lightning_nothing_stays_as_to_empty_left_it(lightning_lab, module):
    (lightning_lab / "poisoned.py").write_text(POISONED)
    under_lightning(lightning_lab, 2, "poisoned.py", module, "--train.steps=2")
    with torch.device("meta"):
        model = Llama(ModelConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2, max_position_embeddings=32))
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert "rope" in names
    for rank in (0, 1):
        allocated, started = (
            json.loads((lightning_lab / f"{module}-{stage}-{rank}").read_text()) for stage in ("allocated", "started")
        )
        assert allocated == names
        assert started == []


@LIGHTNING
def test_what_a_user_got_wrong_ends_lightning_with_one_message(lightning_lab, module):
    elsewhere = lightning_lab / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    model = ModelConfig(384, 32, 64, 2, 4, 2, max_position_embeddings=32)  # as in the file
    (elsewhere / "config.json").write_text(json.dumps(config_json(model, "float32", {})))
    for argument, message in (
        ("--parallel.tp=3", "parallel.tp=3"),
        ("--data.dataset=none.jsonl", "data.dataset='none.jsonl'"),
        ("--checkpoint.init_from=elsewhere", "only train.py starts from other weights"),
    ):
        words = [sys.executable, "-m", module, *LIGHTNING_ARGUMENTS, "--parallel.tp=1", "--run.dir=refused", argument]
        done = run_process(lightning_lab, *words, status=2, PYTHONPATH=str(ROOT))
        assert done.stderr.count("error:") == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (lightning_lab / "refused").exists()
