"""Kills workers of real runs of `fastbb extract` at random moments.

    python scripts/check_kills.py --local 20 --ray 20 --shares 20

Each run has two workers on 2,000 images, or two commands that share them (`--shard-index`). They
get a SIGKILL so many times in all; a command is started again. It has to leave the same files, byte
for byte, as a run in which nobody is killed: no image is lost, and none is there twice.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
from check_interrupts import MODEL, start_extraction, tree
from PIL import Image

from fastbb.extraction import open_features, verify_features

N_IMAGES, BATCH_SIZE, SHARD_ROWS = 2000, 8, 20
PATIENCE_S = 600.0
# a shard whose worker was killed three times is left, and done by the same command again
N_RUNS = 3
KINDS: dict[str, dict[str, object]] = {
    "local": {"--workers": 2},
    "ray": {"--ray": "local", "--max-workers": 2},
    "shares": {},
}


class Kills:
    """Runs over the same images.

    Args:
        folder: an empty directory.
        kind: of what is killed, one of `KINDS`.
        n_images: number of images to extract.
    """

    def __init__(self, folder: Path, kind: str, n_images: int = N_IMAGES) -> None:
        self.folder, self.kind, self.n_images = folder, kind, n_images
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        for i in range(n_images):
            color = (i % 256, i // 256 * 30, 90)
            Image.new("RGB", (12, 10), color).save(self.images / f"{i:05d}.png")
        self._run("whole", [])
        self.whole = self._tree("whole")

    def check(self, n: int, seed: int = 0) -> list[str]:
        """Kills `n` times in one run, and returns the problems, a line each."""
        n_shards = -(-self.n_images // SHARD_ROWS)
        # so many shards are committed when one is killed
        moments = sorted(random.Random(seed).sample(range(1, n_shards - 2), n))
        n_killed = self._run("killed", moments)
        problems = [] if n_killed == n else [f"killed {n_killed} times, wanted {n}"]
        found = self._tree("killed")
        different = sorted(
            path for path in found.keys() | self.whole if found.get(path) != self.whole.get(path)
        )
        if different:
            problems.append(f"differs from the run without kills in {different[:3]}")
        ids = open_features(self.folder / "killed").ids
        if sorted(ids) != [f"{i:05d}.png" for i in range(self.n_images)]:
            problems.append(f"{len(ids)} images, {len(set(ids))} different ones")
        if not (verified := verify_features(self.folder / "killed")).passed:
            problems.append(str(verified))
        return problems

    def _tree(self, name: str) -> dict[str, bytes]:
        files = tree(self.folder / name)
        return {path: data for path, data in files.items() if not path.startswith("run-")}

    def _run(self, name: str, moments: list[int]) -> int:
        """Runs until all is done, and returns how often it killed."""
        options = {"--model": MODEL, "--out": self.folder / name, **KINDS[self.kind]}
        options |= {"--batch-size": BATCH_SIZE, "--shard-rows": SHARD_ROWS}
        if self.kind == "shares":
            return self._run_shares(name, options, moments)
        shards, left, n_killed = self.folder / name / "shards", list(moments), 0
        for _ in range(N_RUNS):
            with start_extraction(self.images, options, self.folder / "inductor") as process:
                deadline = time.monotonic() + PATIENCE_S
                while process.poll() is None and time.monotonic() < deadline:
                    n_committed = len(list(shards.glob("commit-*.json"))) if left else 0
                    if left and n_committed >= left[0] and (pids := self._workers(process.pid)):
                        os.kill(random.choice(pids), signal.SIGKILL)
                        n_killed += 1
                        left.pop(0)
                    time.sleep(0.01)
                _, message = process.communicate(timeout=1)
            if process.returncode == 0:
                return n_killed
            if "is left after" not in message:
                raise RuntimeError(f"{name} exits with {process.returncode}: {message}")
        raise RuntimeError(f"{name} is not done after {N_RUNS} runs")

    def _run_shares(self, name: str, options: dict[str, object], moments: list[int]) -> int:
        """As `_run`: two commands, each of which is started again where it is killed."""
        shards, left, n_killed = self.folder / name / "shards", list(moments), 0
        with ExitStack() as started:

            def start(i: int) -> subprocess.Popen[str]:
                share = options | {"--shard-index": f"{i}/2"}
                process = start_extraction(self.images, share, self.folder / "inductor")
                return started.enter_context(process)

            commands = [start(0), start(1)]
            deadline = time.monotonic() + PATIENCE_S
            while alive := [i for i in (0, 1) if commands[i].poll() is None]:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{name} is not done after {PATIENCE_S:.0f} s")
                if left and len(list(shards.glob("commit-*.json"))) >= left[0]:
                    i = random.choice(alive)
                    commands[i].kill()
                    commands[i].communicate()
                    commands[i] = start(i)
                    n_killed += 1
                    left.pop(0)
                time.sleep(0.01)
            for command in commands:
                _, message = command.communicate()
                if command.returncode:
                    raise RuntimeError(f"{name} exits with {command.returncode}: {message}")
        return n_killed

    def _workers(self, pid: int) -> list[int]:
        """Returns the processes that compute shards for the command `pid`."""
        if self.kind == "local":
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [int(child) for child in children if is_running(int(child))]
        # Ray gives the processes of actors this title; those of another run are not ours
        actors = find_processes(lambda line: line.startswith(b"ray::ShardWorker"))
        return [actor for actor in actors if pid in ancestors(actor)]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not dead already."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ancestors(pid: int) -> list[int]:
    """Returns the parent of a process, its parent and so on."""
    found = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(pid)
    return found


def find_processes(matches: Callable[[bytes], bool]) -> list[int]:
    """Returns the processes whose command line matches."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if matches((path / "cmdline").read_bytes()) and is_running(int(path.name)):
                found.append(int(path.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


@click.command()
@click.option("--local", default=20, show_default=True, help="Kills of processes.")
@click.option("--ray", default=20, show_default=True, help="Kills of Ray's actors.")
@click.option("--shares", default=20, show_default=True, help="Kills of commands of a share.")
@click.option("--seed", default=0, show_default=True)
def main(local: int, ray: int, shares: int, seed: int) -> None:
    """Runs the checks; exits with 1 if a run did not end as it should."""
    failed = False
    for kind, n in (("local", local), ("ray", ray), ("shares", shares)):
        if n:
            with tempfile.TemporaryDirectory() as folder:
                problems = Kills(Path(folder), kind).check(n, seed)
            click.echo(f"{kind}, {n} times killed: {problems or 'the same files'}")
            failed = failed or bool(problems)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
