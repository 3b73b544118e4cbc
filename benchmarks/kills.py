"""Kills a run again and again, damages its files, and compares its end with the unbroken run's.

    python benchmarks/kills.py --out=runs/kills [--kills=200] [--processes=1] [--seed=0]

A tiny run is played to its end once. Then runs of the same config are killed at random moments, and
in saves, exports, evaluations and index builds: by SIGKILL, some by SIGTERM. Between a kill and the
next start some checkpoints lose a bit, half a file or a whole one, or the index is gone. With
--processes=2 the run has two processes on this machine, and one of them is killed, stopped for
seconds, or stopped for good. The next start must go on from the newest step that is whole, and each
run must end as the unbroken one, bit for bit: metrics, scores, games and exported weights. Prints
each failure and a table, and exits with 1 if there was one.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "steps": 4,
    "game.answers_per_step": 2,
    "game.group_size": 2,
    "game.noise_documents": 1,
    "limits.verify_prompt_tokens": 160,
    "limits.response_tokens": 96,
    "limits.turn_tokens": 24,
    "limits.turns": 2,
    "limits.searches": 1,
    "limits.observation_tokens": 48,
    "engine.slots": 4,
    "engine.chunk": 4,
    "engine.extend_rows": 4,
    "engine.cache_tokens": 192,
    "engine.cache_buckets": (),
    "engine.extend_buckets": (192,),
    "learner.row_tokens": 192,
    "learner.logprob_chunk": 64,
    "learner.rows": 2,
    "eval.max_questions": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
    "log.episodes_every": 1,
    "log.tensorboard": False,
}
OF_THE_MACHINE = ("seconds", "per_second", "memory/", "compile", "play/waiting")  # parts of keys
KILLS_OF_A_RUN = 10  # then it is left alone
FINISHED_IN = 900  # seconds, at most, of a start that nobody kills
# Seconds until the processes that are left have ended: they wait longest, 600 s, where one is
# killed before it has reached the others (processes.START_SECONDS).
ALONE_FOR = 700
AT = {  # where a kill is aimed -> what is then in the workdir
    "a save": "checkpoints/*.orbax-checkpoint-tmp*",
    "an export": "export.unfinished",
    "an evaluation": "eval/*/episodes*.jsonl",
    "an index build": "index.building*",
}
ANYWHERE = "anywhere"


# --- a run ----------------------------------------------------------------------------------------


@dataclass
class Start:
    """The processes of one start of a run, and the files of what they print."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]
    began: float = field(default_factory=time.monotonic)

    def over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def codes(self, seconds: float) -> list[int | None]:
        end = time.monotonic() + seconds
        while not self.over() and time.monotonic() < end:
            time.sleep(0.05)
        return [process.poll() for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.logs)


def start(workdir: Path, cache: Path, number: int, processes: int) -> Start:
    """Compiled programs are shared by all starts: most of the time would go into them."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    command = [
        sys.executable,
        "-m",
        "ssp_jax.main",
        f"--config={ROOT}/configs/tiny.py",
        f"--workdir={workdir}",
    ]
    command += [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += [
            f"--config.mesh.data={processes}",
            f"--coordinator=127.0.0.1:{port}",
            f"--processes={processes}",
        ]
    folder = workdir.with_name(workdir.name + ".logs")
    folder.mkdir(exist_ok=True)
    logs = [folder / f"{number:03d}_{process}.log" for process in range(processes)]
    started = []
    for process, log in enumerate(logs):
        place = [f"--process={process}"] if processes > 1 else []
        with log.open("wb") as file:
            started.append(
                subprocess.Popen(
                    [*command, *place], cwd=ROOT, env=environment, stdout=file, stderr=file
                )
            )
    return Start(started, logs)


def steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


# --- what a run leaves, for comparison ------------------------------------------------------------


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flat(inner, f"{prefix}/{name}")
    return found


def compared(document: dict[str, Any]) -> dict[str, Any]:
    """The values that are equal in another run of the same config."""
    found = {}
    for key, value in flat(document).items():
        of_the_machine = any(part in key for part in OF_THE_MACHINE)
        # `weights` has the name of the workdir.
        if key not in ("/time", "/weights") and not of_the_machine:
            found[key] = value
    return found


def result(workdir: Path) -> dict[str, Any]:
    """Everything that must be equal, by file or line."""
    found: dict[str, Any] = {}
    for number, line in enumerate((workdir / "metrics.jsonl").read_text().splitlines(), 1):
        found[f"metrics.jsonl line {number}"] = compared(json.loads(line))
    for path in (*workdir.glob("eval/*.json"), workdir / "summary.json"):
        found[str(path.relative_to(workdir))] = compared(json.loads(path.read_text()))
    for pattern in ("episodes/*.jsonl", "export/*"):
        for path in workdir.glob(pattern):
            found[str(path.relative_to(workdir))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


# --- harm -----------------------------------------------------------------------------------------


def flip_a_bit(path: Path, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def remove(path: Path, chance: random.Random) -> None:
    path.unlink()


HARMS: dict[str, Callable[[Path, random.Random], None]] = {
    "a bit flipped": flip_a_bit,
    "a file cut": cut,
    "a file removed": remove,
}


def whole_steps(workdir: Path, harmed: set[int]) -> list[int]:
    """Steps that are not harmed. `harmed`: inodes, for a damaged step is written anew."""
    folder = workdir / "checkpoints"
    return [step for step in steps(workdir) if (folder / str(step)).stat().st_ino not in harmed]


def harm(workdir: Path, chance: random.Random, harmed: set[int]) -> str:
    """Damages a file or removes the index; returns what it did. One whole step always stays."""
    whole = whole_steps(workdir, harmed)
    if chance.random() < 0.15 and (workdir / "index").exists():
        shutil.rmtree(workdir / "index")
        return "the index removed"
    if len(whole) < 2 or chance.random() < 0.5:
        return "nothing"
    newest = workdir / "checkpoints" / str(whole[-1])
    harmed.add(newest.stat().st_ino)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    # mostly the large ones, which are the arrays
    file = chance.choices(files, [path.stat().st_size + 1000 for path in files])[0]
    name = chance.choice(list(HARMS))
    HARMS[name](file, chance)
    return name


# --- the loop -------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of kills, harms and resumes, and the failures."""

    out: Path
    processes: int
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    harms: Counter[str] = field(default_factory=Counter)
    fallbacks: int = 0
    resumes: int = 0
    runs: int = 0
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str) -> None:
        self.failures.append(what)
        print(f"FAILED: {what}", flush=True)


def act(tally: Tally, run: Start, where: str) -> str:
    """Ends the start by force, or stops a process for a moment; returns what it did."""
    kinds = ["SIGKILL"] * 4 + ["SIGTERM"]
    if tally.processes > 1:
        kinds += ["SIGSTOP, SIGCONT"] * 2 + ["hang"]
    kind = tally.chance.choice(kinds)
    victim = tally.chance.choice(run.processes)
    if kind == "SIGTERM":
        victim.send_signal(signal.SIGTERM)
    elif kind == "SIGKILL":
        victim.kill()
    else:
        victim.send_signal(signal.SIGSTOP)
        if kind == "SIGSTOP, SIGCONT":
            time.sleep(tally.chance.uniform(0.5, 8))
            victim.send_signal(signal.SIGCONT)
            return kind
    others = [process for process in run.processes if process is not victim or kind == "SIGTERM"]
    end = time.monotonic() + ALONE_FOR
    while any(process.poll() is None for process in others):
        if time.monotonic() > end:
            found = f"after {kind} of one in {where} the others go on for {ALONE_FOR} s"
            tally.fail(f"{run.logs[0]}: {found}")
            break
        time.sleep(0.05)
    run.kill()
    return kind


def at_work(workdir: Path, where: str) -> set[tuple[Path, int]]:
    """Files and folders of this kind of work, with their times, for a kill leaves some."""
    found = set()
    for path in workdir.glob(AT[where]):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_mtime_ns))
    return found


def wait_for(tally: Tally, run: Start, workdir: Path, where: str, seconds: float) -> bool:
    """Until the moment of a kill has come; False if the run is over before."""
    moment = run.began + tally.chance.uniform(0, seconds)
    before = at_work(workdir, where) if where != ANYWHERE else set()
    while not run.over():
        if where == ANYWHERE:
            if time.monotonic() >= moment:
                return True
        elif at_work(workdir, where) - before:
            time.sleep(tally.chance.choice([0, 0.01, 0.1]))
            return not run.over()
        time.sleep(0.002)
    return False


def choose(workdir: Path, chance: random.Random) -> str:
    """Where the next kill is aimed. Only a run without an index builds one."""
    if not (workdir / "index").exists() and chance.random() < 0.5:
        return "an index build"
    return chance.choices([ANYWHERE, "a save", "an export", "an evaluation"], [5, 4, 3, 1])[0]


def check_end(tally: Tally, run: Start, kind: str) -> None:
    """Fails if a start that was killed has a traceback or a wrong exit code."""
    said = run.said()
    codes = [process.returncode for process in run.processes]
    if kind == "SIGTERM" and any(code not in (0, -signal.SIGTERM) for code in codes):
        tally.fail(f"{run.logs[0]}: codes {codes} after SIGTERM")
    if "Traceback" in said:
        tally.fail(f"{run.logs[0]}: a traceback")


def check_resume(tally: Tally, run: Start, whole: int, newest: int) -> None:
    """Fails unless the start, if it came so far, resumed from the newest whole step.

    It may resume from a newer one, if the harm there changed nothing that is read; the end of the
    run shows whether that was right.
    """
    found = re.search(r"resuming after step (\d+)", run.said())
    if not found:
        return
    tally.resumes += 1
    step = int(found[1])
    if not whole <= step <= newest:
        tally.fail(f"{run.logs[0]}: resumed after step {step}, and {whole} was whole")
    tally.fallbacks += step < newest


def play_one(tally: Tally, unbroken: dict[str, Any], seconds: float, most: int) -> None:
    """A run that is killed up to `most` times, and then goes on to its end."""
    tally.runs += 1
    workdir = tally.out / f"run_{tally.runs:03d}"
    left = min(most, KILLS_OF_A_RUN)
    harmed: set[int] = set()
    for number in range(10_000):
        whole = max(whole_steps(workdir, harmed), default=0)
        newest = max(steps(workdir), default=0)
        run = start(workdir, tally.out / "compiled", number, tally.processes)
        where = choose(workdir, tally.chance)
        kind = ""
        if left and wait_for(tally, run, workdir, where, seconds):
            kind = act(tally, run, where)
            tally.kills[f"{kind} in {where}"] += 1
            left -= 1
        if kind in ("", "SIGSTOP, SIGCONT"):
            codes = run.codes(FINISHED_IN)
            run.kill()
            check_resume(tally, run, whole, newest)
            if set(codes) != {0}:
                tally.fail(f"{run.logs[0]}: codes {codes} of a start that was left alone")
                return
            break
        check_end(tally, run, kind)
        check_resume(tally, run, whole, newest)
        name = harm(workdir, tally.chance, harmed)
        tally.harms[name] += 1
        print(
            f"kill {tally.kills.total()}: run {tally.runs}, {kind} in {where} after "
            f"{time.monotonic() - run.began:.1f} s; {name}; steps {steps(workdir)}",
            flush=True,
        )
    differ = differences(unbroken, result(workdir))
    if differ:
        tally.fail(f"{workdir} is not the unbroken run: {', '.join(differ[:5])}")
    else:
        shutil.rmtree(workdir)
        logs = workdir.with_name(workdir.name + ".logs")
        if not any(str(logs) in failure for failure in tally.failures):
            shutil.rmtree(logs)
    print(
        f"run {tally.runs}: {'DIFFERS' if differ else 'the same as the unbroken one'}", flush=True
    )


def show(tally: Tally, seconds: float) -> None:
    kinds = sorted({name.split(" in ")[0] for name in tally.kills})
    print("\n| killed in | " + " | ".join(kinds) + " |")
    print("|---" * (len(kinds) + 1) + "|")
    for where in (ANYWHERE, *AT):
        cells = [str(tally.kills[f"{kind} in {where}"]) for kind in kinds]
        print(f"| {where} | {' | '.join(cells)} |")
    harms = ", ".join(f"{name} {number}" for name, number in sorted(tally.harms.items()))
    print(f"\nbetween them: {harms}; {tally.fallbacks} times the step before was taken")
    print(
        f"{tally.kills.total()} kills, {tally.resumes} resumes, {tally.runs} runs "
        f"in {seconds / 60:.0f} minutes; {len(tally.failures)} failures"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=lambda path: Path(path).expanduser(), required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    tally = Tally(out, args.processes, random.Random(args.seed))
    seconds = 0.0
    for number in range(2):  # the second one finds its programs compiled, as all that follow
        shutil.rmtree(out / "unbroken", ignore_errors=True)
        first = start(out / "unbroken", out / "compiled", number, args.processes)
        if set(first.codes(FINISHED_IN)) != {0}:
            first.kill()
            print(first.said())
            return 1
        seconds = time.monotonic() - first.began
    unbroken = result(out / "unbroken")
    print(f"the unbroken run: {len(unbroken)} things to compare, {seconds:.0f} s", flush=True)
    began = time.monotonic()
    while tally.kills.total() < args.kills:
        play_one(tally, unbroken, seconds, args.kills - tally.kills.total())
    show(tally, time.monotonic() - began)
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
