"""Half an hour of training that is disturbed again and again, and whether it leaves a trace: `make soak`.

The quickstart's model trains on a 2 x 2 mesh on files that are streamed, with asynchronous saves every few seconds and
evaluations, for `--minutes=30`. In the first and the last third one disturbance follows the other, in an order that
`--seed=0` fixes; the third between them has no restarts, only files that break, so that growth can be measured.

    signal    SIGTERM or SIGUSR1 to a rank or to torchrun: it stops with a checkpoint, and the same command goes on
    kill      SIGKILL to a rank, or to torchrun and all ranks: the steps since the last complete save are done again
    disk      the disk of the checkpoints fills up: one message, or the run goes on; then there is room again. It is a
              disk in memory in a mount namespace of our own, or else a limit on the size of one rank's files
    file      a file of a window ahead is cut off before it is tokenised, and put back before that window is due: the
              run must not notice

Then the same steps are trained once more without any of this, which takes about as long again or less: nothing is
started anew, and nothing saved. Ends with 1, and keeps its folder, if

- the metrics differ from those of the undisturbed run in a single bit,
- a checkpoint is damaged, or more than the steps between two saves is lost beside those that one save takes,
- a run ends by itself, or not as it should, or one of its processes stays,
- in a stretch without restarts of JUDGED_SECONDS or more, RSS, open files or threads of a process grow after its
  warm-up by more than GROWTH for 1,000 steps; where all are shorter, the longest is shown and not judged,
- the cache of the stream has ever held more than the tokens of CACHED_FILES files.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import harm

import checkpoint
from corpus.sources import file_version, stdlib_texts
from data import windows
from runtime.ranks import UserError

ROOT = Path(__file__).parent.parent
ENDLESS = 1_000_000  # train.steps, which the schedule of the learning rate is made for
SIZE, SEED, FILES, WINDOW, EVERY, RANKS = 16, 0, 40, 2, 5, [f"rank {rank}" for rank in range(4)]
OPTIONS = f"""--parallel.tp=2 --parallel.timeout_seconds=60 --train.steps={ENDLESS} --train.global_batch_size={SIZE}
--train.seed={SEED} --train.eval_every=40 --data.streaming=true --data.stream_files={WINDOW} --data.val_fraction=0.25
""".split()
SAVES = [f"--checkpoint.every={EVERY}", "--checkpoint.async_save=true", "--checkpoint.keep=2"]
DISK_BYTES, FILLER = 192 * 2**20, "filler"  # of the checkpoints: room for eight of them
START_SECONDS, END_SECONDS, WINDOW_SECONDS = 240, 120, 300  # what takes longer is a violation
JUDGED_SECONDS, WARM_UP_SECONDS = 300, 120  # the memory that steps and saves take grows at first
GROWTH = {"RSS in MiB": 60.0, "open files": 5.0, "threads": 5.0}  # for 1,000 steps: 200 saves, 20 windows
# of the windows that the two checkpoints need, in which it trains and which comes next, and the validation documents
CACHED_FILES = 4 * WINDOW + 1
FACTS = {"step", "loss", "grad_norm", "lr", "tokens", "val_loss", "val_bits_per_byte", "val_tokens", "skipped_rows"}


# ---------------------------------------------------------------------------------------------------------------------
# What can be seen from outside


def processes(token: str) -> dict[int, str]:
    """What has `token` in its environment, whoever is its parent by now: torchrun, rank 0 ..., tokenising, helper."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            variables = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            if f"SOAK={token}" in variables:
                rank = next((f"rank {value[5:]}" for value in variables if value.startswith("RANK=")), "torchrun")
                command, roles = (path / "cmdline").read_text(), {"spawn_main": "tokenising", "train.py": rank}
                found[int(path.name)] = next((role for word, role in roles.items() if word in command), "helper")
    return found


def sample_of(pid: int) -> tuple[float, int, int]:
    """In the order of GROWTH."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 2**10, len([*Path(f"/proc/{pid}/fd").iterdir()]), int(status["Threads"])


def bytes_of(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):  # removed meanwhile
            total += path.stat().st_size if path.is_file() and path.name != FILLER else 0
    return total


def last_step(run_dir: Path) -> int:
    """Of the newest whole line of metrics."""
    with contextlib.suppress(OSError, IndexError), (run_dir / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return json.loads(file.read().split(b"\n")[-2])["step"]
    return 0


def facts(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key in FACTS} for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# A run, and what is done to it


class Soak:
    def __init__(self, folder: Path, seed: int):
        self.folder, self.run_dir, self.cache, self.corpus = folder, folder / "run", folder / "hf", folder / "corpus"
        self.chance, self.token, self.begin = random.Random(seed), uuid.uuid4().hex, time.monotonic()
        self.process: subprocess.Popen | None = None
        self.first_step_at, self.mounted = 0.0, False  # of this start; is there a disk of our own?
        self.counts: list[int | None] = [None] * FILES  # rows of each file, as far as the newest checkpoint knows
        self.tally, self.most, self.saved, self.violations = Counter(), Counter(), set(), list[str]()
        self.samples = defaultdict(list)  # of (start, role): (second, step, *what GROWTH names)
        for path in (self.run_dir, self.corpus, folder / "tmp"):
            path.mkdir()
        texts, _ = stdlib_texts()
        for file in range(FILES):
            lines = [json.dumps({"text": text}) + "\n" for text in texts[file::FILES]]
            (self.corpus / f"{file:02}.jsonl").write_text("".join(lines))
        self.paths = sorted(self.corpus.iterdir())
        self.versions = [file_version(str(path)) for path in self.paths]

    def say(self, text: str) -> None:
        print(f"{(time.monotonic() - self.begin) / 60:5.1f} min  step {self.step:5}  {text}", flush=True)

    def violated(self, text: str) -> None:
        self.violations.append(text)
        self.say(f"VIOLATION: {text}")

    @property
    def step(self) -> int:
        return last_step(self.run_dir)

    @property
    def checkpoints(self) -> list[Path]:
        return checkpoint.complete_checkpoints(self.run_dir)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def launch(self, run_dir: Path, log: str, options: list[str]) -> None:
        """In a session of its own: Ctrl-C is for us. Its output goes to `log`.out and `log`.err."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HF_"))}
        env |= {"HF_HOME": str(self.cache), "HF_HUB_OFFLINE": "1", "TMPDIR": str(self.folder / "tmp")}
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", "SOAK": self.token}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(RANKS)}"]
        command += [str(ROOT / "train.py"), str(ROOT / "configs/quickstart.toml"), *OPTIONS, *options]
        command += [f"--run.dir={run_dir}", f"--data.dataset={self.corpus}"]
        self.output, self.errors = (self.folder / f"{log}{suffix}" for suffix in (".out", ".err"))
        with self.output.open("w") as out, self.errors.open("w") as err:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    def start(self) -> None:
        """Returns after its first step."""
        self.tally["starts"] += 1
        begin, number = time.monotonic(), self.tally["starts"]
        self.launch(self.run_dir, f"start_{number}", SAVES)
        if not self.watch(START_SECONDS, lambda: "first step" in self.output.read_text()):
            sys.exit(f"start {number} did not come to its first step: {self.told()}; see {self.folder}")
        self.first_step_at = time.monotonic()
        self.most["start"] = max(self.most["start"], round(self.first_step_at - begin))

    def watch(self, seconds: float, reached: Callable[[], bool] = lambda: False) -> bool:
        """Sample once a second until it is; False if the time is over or the job has ended before."""
        end = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > end or not self.running:
                return False
            self.saved |= {checkpoint.step_of(path) for path in self.checkpoints}
            self.most["cache"] = max(self.most["cache"], bytes_of(self.cache.rglob("stream-*/*")))
            self.most["run"] = max(self.most["run"], bytes_of(self.run_dir.rglob("*")))
            now, step = time.monotonic() - self.first_step_at, self.step
            for pid, role in processes(self.token).items() if self.first_step_at else ():
                with contextlib.suppress(OSError, KeyError):  # it is about to end
                    self.samples[self.tally["starts"], role].append((now, step, *sample_of(pid)))
            time.sleep(1 - time.monotonic() % 1)
        return True

    def told(self) -> list[str]:
        """What the job has said of its end, without progress bars."""
        lines = re.split(r"[\r\n]+", self.errors.read_text())
        return [line for line in lines if re.match(r"(\[rank\d+\]: )?(error|\w+Error): ", line)]

    def send(self, number: signal.Signals, *roles: str) -> None:
        for pid in (pid for pid, role in processes(self.token).items() if role in roles or not roles):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end_all(self) -> None:
        while processes(self.token):
            self.send(signal.SIGKILL)
            time.sleep(0.1)
        if self.process is not None:
            self.process.wait()
        self.process, self.first_step_at = None, 0.0

    def ended(self, what: str) -> None:
        """Wait until the job and all it has started is gone, and look at what it has left."""
        before, end = self.step, time.monotonic() + END_SECONDS
        while (self.running or processes(self.token)) and time.monotonic() < end:
            time.sleep(0.2)
        if stay := sorted(processes(self.token).values()):
            self.violated(f"{what}: {', '.join(stay)} did not end")
        self.end_all()
        for line in (line for path in self.checkpoints for line in checkpoint.damage(path)):
            self.violated(f"{what}: {line}")
        newest = max(map(checkpoint.step_of, self.checkpoints), default=0)
        lost = max(before, self.step) - newest
        self.most["lost"] = max(self.most["lost"], lost)
        if lost > 2 * EVERY or newest < max(self.saved, default=0):  # one save may be under way
            self.violated(f"{what}: {lost} steps are lost, of checkpoints {self.saved} the newest is {newest}")
        self.say(f"{what}: it has ended, {lost} steps are done again")

    # -----------------------------------------------------------------------------------------------------------------
    # Disturbances

    def stop(self) -> None:
        number, victim = self.chance.choice([signal.SIGTERM, signal.SIGUSR1]), self.chance.choice(["torchrun", *RANKS])
        self.send(number, victim)
        self.ended(what := f"{number.name} to {victim}")
        status = checkpoint.read_state(self.checkpoints[-1])["status"]
        if status != f"stopped at step {self.step}":
            self.violated(f"{what}: the newest checkpoint is of a run that has {status}: {self.told()}")

    def kill(self) -> None:
        victims = self.chance.choice([["torchrun", *RANKS], *([rank] for rank in RANKS)])
        self.send(signal.SIGKILL, *victims)
        self.ended(f"SIGKILL to {', '.join(victims)}")

    def fill_disk(self) -> None:
        """Until the job ends, or for a while: what a removed checkpoint gives back is taken, too."""
        filler, victim = self.run_dir / "checkpoints" / FILLER, self.chance.choice(RANKS[1:])  # rank 0 writes metrics

        def full() -> bool:
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while self.mounted and file.write(bytes(2**18)):
                    pass
            return False

        def limit(most_bytes: int) -> None:
            for pid in (pid for pid, role in processes(self.token).items() if role == victim and not self.mounted):
                harm.limit_files(pid, most_bytes)

        limit(2**16)
        self.watch(END_SECONDS / 2, full)
        filler.unlink(missing_ok=True)
        if self.running:
            limit(-1)
            self.say("the disk was full for a while: the run has gone on")
        else:
            self.ended("the disk is full")
            if len(told := self.told()) != 1 or "could not be written" not in told[0]:
                self.violated(f"the disk is full: one message was to say so, not {told}")

    def windows_from(self, step: int) -> list[tuple[list[int], tuple[int, ...]]]:
        """The window that `step` begins in and those after it, each with its key."""
        with contextlib.suppress(UserError, IndexError):  # there is none, or it is being removed
            self.counts = checkpoint.read_state(self.checkpoints[-1])["rows_of_files"]
        known = [count for count in self.counts if count is not None]
        epoch, done = divmod(step - 1, sum(known) // SIZE if len(known) == FILES else ENDLESS)
        source: Any = SimpleNamespace(counts=self.counts, window=WINDOW, first_window=WINDOW)
        coming = windows(source, SEED, epoch)
        rows = [sum(self.counts[file] or ENDLESS * SIZE for file in files) for files, _ in coming]  # unknown: is ahead
        behind = sum(end <= done * SIZE for end in accumulate(rows))
        return coming[behind:] + windows(source, SEED, epoch + 1)

    def break_file(self) -> None:
        """Of the window after the next one, counted from some steps ahead; healed seconds after it was tried."""
        files, key = self.windows_from(self.step + EVERY)[2]
        there = {path.stem for path in self.cache.rglob("stream-*/*.arrow")}  # validation, or of the epoch before
        broken = next((file for file in files if self.versions[file] not in there), files[0])
        path, copy, begin = self.paths[broken], self.folder / "copy.jsonl", time.time()

        def found() -> bool:
            return any(e.stat().st_mtime > begin for e in self.cache.rglob(f"{self.versions[broken]}.error"))

        def due() -> bool:
            return key not in [other for _, other in self.windows_from(self.step + 1)[1:]]

        shutil.copy2(path, copy)  # with its time: it comes back as it was
        path.write_bytes(copy.read_bytes()[: copy.stat().st_size * 3 // 4])
        try:
            if in_time := self.watch(WINDOW_SECONDS, lambda: found() or due()) and not due():
                self.watch(self.chance.uniform(2, 6))
        finally:
            copy.replace(path)
        self.tally["broken"] += in_time
        told = "was found broken and has healed" if in_time else "was broken, which nobody has noticed in time"
        self.say(f"{path.name}, of window {key[1:]}, {told}")
        self.watch(WINDOW_SECONDS, due)  # if it ends instead, `disturb` sees that
        self.watch(3)

    def disturb(self, minutes: float) -> None:
        acts = {"stop": self.stop, "kill": self.kill, "disk": self.fill_disk, "": self.break_file}
        order = list[str]()
        for calm in (False, True, False):
            end = time.monotonic() + 60 * minutes / 3
            self.say("only files break from here on" if calm else "disturbances from here on")
            while time.monotonic() < end:
                if self.process is None:
                    self.start()
                self.watch(self.chance.uniform(3, 15))
                if self.running:
                    order = order or self.chance.sample([*acts], k=len(acts))
                    kind = "" if calm else order.pop()
                    self.tally[kind] += 1
                    acts[kind]()
                if self.process is not None and not self.running:
                    self.violated(f"it has ended by itself: {self.told()}")
                    self.ended("its end")
        if self.process is None:
            self.start()
        self.send(signal.SIGTERM, "torchrun")
        self.ended("the end")

    # -----------------------------------------------------------------------------------------------------------------
    # What it has left behind

    def compare(self) -> None:
        """With the same steps, undisturbed. Stopped during its last evaluation, the run lacks the line of that."""
        found, reference = facts(self.run_dir), self.folder / "reference"
        self.say("the same steps without disturbances")
        self.launch(reference, "reference", [])
        while last_step(reference) <= found[-1]["step"] and self.running:
            time.sleep(1)
        self.send(signal.SIGTERM, "torchrun")
        if self.process is not None:
            self.process.wait()
        expected = facts(reference)[: len(found)]
        if len(expected) < len(found):
            self.violated(f"the reference has ended at step {last_step(reference)}: {self.told()}")
        for here, there in [pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]][:1]:
            self.violated(f"the metrics differ, first here: {here}, and undisturbed {there}")
        self.tally["evaluations"] = sum("val_loss" in line for line in found)

    def growth(self) -> list[str]:
        """Rows of a table: of each process in the longest stretches without restarts."""
        seconds = {start: samples[-1][0] for (start, role), samples in self.samples.items() if role == RANKS[0]}
        judged = [start for start in seconds if seconds[start] >= JUDGED_SECONDS]
        chosen, rows = judged or [max(seconds, key=seconds.__getitem__)], []
        for (start, role), samples in sorted(self.samples.items()):
            warm = [sample for sample in samples if sample[0] >= min(WARM_UP_SECONDS, seconds[start] / 2)]
            if start in chosen and role in (*RANKS, "tokenising") and len({sample[1] for sample in warm}) > 1:
                _, steps, *columns = zip(*warm, strict=True)
                cells = [f"{start}, {seconds[start]:.0f} s{'' if judged else ', not judged'}", role]
                for (name, bound), values in zip(GROWTH.items(), columns, strict=True):
                    slope = statistics.linear_regression(steps, values).slope * 1000
                    cells.append(f"{min(values):.0f} to {max(values):.0f}, {slope:+.1f}")
                    if judged and slope > bound:
                        self.violated(f"{name} of {role} in start {start}: {slope:+.1f} for 1,000 steps")
                rows.append(f"| {' | '.join(cells)} |")
        return rows

    def report(self) -> None:
        tally, most, mib = self.tally, self.most, 2**20
        arrow = max((path.stat().st_size for path in self.cache.rglob("stream-*/*.arrow")), default=0)
        if most["cache"] > CACHED_FILES * arrow:
            self.violated(f"the cache held {most['cache']:,} bytes, and a file's tokens take {arrow:,}")
        growth = self.growth()
        rows = {
            "steps; evaluations; saves completed": f"{self.step:,}; {tally['evaluations']}; {len(self.saved)}",
            "starts; the slowest": f"{tally['starts']}; {most['start']} s",
            "signals; kills; full disks": f"{tally['stop']}; {tally['kill']}; {tally['disk']}",
            "files that were tried in vain, and healed": f"{tally['broken']}",
            "steps lost at once": f"{most['lost']} at most",
            "largest cache; run directory": f"{most['cache'] / mib:.1f} MiB; {most['run'] / mib:.1f} MiB",
        }
        print("\n| | |\n| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items()), sep="\n")
        print("\nLeast to most after the warm-up, and the slope for 1,000 steps:\n")
        print(f"| start | process | {' | '.join(GROWTH)} |", "| --- " * 5 + "|", *growth, sep="\n")
        print(f"\n{len(self.violations)} violations", *self.violations, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of disturbed training, before the reference run")
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    arguments = parser.parse_args()
    alone = ["unshare", "--map-root-user", "--mount"]  # where a disk can be mounted that nobody else sees
    if "SOAK_ALONE" not in os.environ and shutil.which("unshare") and subprocess.run([*alone, "true"]).returncode == 0:
        os.environ["SOAK_ALONE"] = "1"
        os.execvp(alone[0], [*alone, sys.executable, *sys.argv])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    soak = Soak(Path(tempfile.mkdtemp(prefix="soak-")), arguments.seed)
    with harm.own_disk(soak.run_dir / "checkpoints", DISK_BYTES) as soak.mounted:
        try:
            soak.disturb(arguments.minutes)
            soak.compare()
            soak.report()
        finally:
            soak.end_all()
    if soak.violations:
        sys.exit(f"{soak.folder} holds metrics and what was printed")
    shutil.rmtree(soak.folder)


if __name__ == "__main__":
    main()
