"""One command that shows what ssp_jax does on the device that is here: right, and how fast.

    python benchmarks/gpu_proof.py --out=runs/proof [--checks=1,2,3] [--minutes=8] [--small]
    python benchmarks/gpu_proof.py --write    # makes what checks 3 and 4 compare with, on a CPU

No network, at most 8 minutes on one Hopper GPU. Each check runs in a process of its own with a
budget of seconds: one that raises, hangs, crashes or runs out of memory is reported, and the next
begins. Each result is printed as it comes. Leaves gpu_proof.json and gpu_proof.md with all results
and the device's name, gpu_proof.log with what the checks printed, and trace.xplane.pb, in --out.
Exits with 1 where a check has failed.

Starting JAX costs each check some seconds. In return it has the whole memory, a peak of its own and
the flags that it needs, and nothing that another left behind. Compiled programs are kept in
--cache: check 9 finds those of check 5, and a second run those of the first.

A check whose packages are missing is skipped, with a line that names them (docs/on_gpus.md says how
to bring them). On a CPU shapes are small, which --small asks for elsewhere.
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform as machine
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.proof.rows import FAILED, Row, Setting, skipped  # noqa: E402
from ssp_jax.errors import first_line, printable  # noqa: E402
from ssp_jax.runtime import platform  # noqa: E402

NAME = "gpu_proof"  # of the files in --out
MINIMUM_SECONDS = 10.0  # with less left a check does not begin
MINUTES = 8.0  # of all checks, on a GPU
SLOWER = 8.0  # times the budgets, where a CPU compiles: small shapes are as many programs


@dataclass(frozen=True)
class Check:
    """A function `module:function` that takes a Setting and yields rows."""

    number: int
    name: str
    run: str
    seconds: float  # its budget
    needs: tuple[str, ...] = ()  # modules that not every machine with JAX has
    exact: bool = False  # float32 products are not rounded to TF32, and no kernel is tuned


_CONFIG = ("ml_collections",)
_RUN = ("ml_collections", "bm25s", "Stemmer", "tensorboardX", "orbax.checkpoint")
# What decides between right and wrong comes before speed.
CHECKS = (
    Check(1, "device", "benchmarks.proof.device:check", 30),
    Check(2, "attention", "benchmarks.proof.attention:check", 50),
    Check(3, "tokens", "benchmarks.proof.tokens:check", 75, exact=True),
    Check(4, "a run", "benchmarks.proof.tiny_run:check", 90, _RUN, exact=True),
    Check(5, "decode", "benchmarks.proof.decode:check", 75, _CONFIG),
    Check(6, "update", "benchmarks.proof.gradient:check", 75, _CONFIG),
    Check(7, "slice of 7B", "benchmarks.proof.slice_7b:check", 60, _CONFIG),
    Check(8, "train state", "benchmarks.proof.train_state:check", 30, _CONFIG, exact=True),
    Check(9, "trace", "benchmarks.proof.trace:check", 30, _CONFIG),
    Check(10, "Hugging Face", "benchmarks.proof.hugging_face:check", 60, ("torch", "transformers")),
)


# --- a check, in a process of its own -------------------------------------------------------------


def child(path: str, rows_fd: int, setting: Setting) -> None:
    """Runs one check; writes a line of JSON for each row to the file descriptor."""
    platform.prepare()
    module, _, name = path.partition(":")
    with os.fdopen(rows_fd, "w", buffering=1, encoding="utf-8") as out:

        def say(**values: Any) -> None:
            out.write(json.dumps(values) + "\n")

        try:
            for row in getattr(importlib.import_module(module), name)(setting):
                say(**dataclasses.asdict(row))
        # Whatever a check raises, or exits with, is its result: what libraries raise on a device
        # that nobody has tried cannot be listed.
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            say(**dataclasses.asdict(raised(error)))
        if "jax" in sys.modules:
            say(device=sys.modules["jax"].devices()[0].device_kind)


def raised(error: BaseException) -> Row:
    return Row("it raised", f"{type(error).__name__}: {first_line(error)}", "", FAILED)


def environment(check: Check, cache: Path) -> dict[str, str]:
    """Of the check's process."""
    values = dict(os.environ)
    if platform.gpu_will_be_used(values):
        # One GPU, and an error where JAX cannot use it: by itself it would take the CPU.
        values.setdefault("CUDA_VISIBLE_DEVICES", "0")
        values.setdefault("JAX_PLATFORMS", "cuda,cpu")
    values.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    values.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if check.exact:
        values["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
        flags = (values.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0")
        values["XLA_FLAGS"] = " ".join(filter(None, flags))
    return values


def messages(fd: int, deadline: float) -> Iterator[dict[str, Any]]:
    """What a check writes, until it closes the descriptor. Raises TimeoutError."""
    rest = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise TimeoutError
        piece = os.read(fd, 1 << 16)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        yield from map(json.loads, lines)


def results(
    check: Check, setting: Setting, cache: Path, seconds: float
) -> Iterator[Row | dict[str, Any]]:
    """The rows of a check as they come, with one that says how it died or that it ran too long.

    seconds: its budget. A message that is no row has facts for the head of the report.
    """
    log = setting.out / f"{NAME}.log"
    read_fd, write_fd = os.pipe()
    command = [sys.executable, __file__, f"--child={check.run}", f"--rows_fd={write_fd}"]
    command += [f"--out={setting.out}", *(["--small"] if setting.small else [])]
    with log.open("ab") as stream:
        stream.write(f"\n--- {check.number} {check.name}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            pass_fds=(write_fd,),
            env=environment(check, cache),
        )
    os.close(write_fd)
    deadline = time.monotonic() + seconds
    try:
        for message in messages(read_fd, deadline):
            yield Row(**message) if "verdict" in message else message
        code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
        if code:
            yield Row("it ended", f"{ending(code)}: {last_line(log)}", "exit code 0", FAILED)
    except (TimeoutError, subprocess.TimeoutExpired):
        yield Row("it was stopped", f"after {seconds:.0f} s", "within its budget", FAILED)
    finally:
        # This one process, and no other: the next check needs the memory that it holds.
        process.kill()
        process.wait()
        os.close(read_fd)


def ending(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return printable(lines[-1][:200])


# --- all checks -----------------------------------------------------------------------------------


@dataclass
class Report:
    """All results so far, and the files that hold them."""

    out: Path
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, check: Check, row: Row, seconds: float) -> None:
        """Prints the row and keeps it. seconds: since the check began."""
        values = {"check": check.number, **dataclasses.asdict(row), "seconds": round(seconds, 1)}
        self.rows.append(values)
        expected = f" (expected {row.expected})" if row.expected else ""
        line = f"{check.number:>2} {row.verdict:<7} {seconds:5.1f} s  {row.name}: {row.measured}"
        print(printable(line + expected), flush=True)

    def write(self) -> None:
        document = {**self.facts, "rows": self.rows}
        text = json.dumps(document, indent=1) + "\n"
        (self.out / f"{NAME}.json").write_text(text, encoding="utf-8")
        (self.out / f"{NAME}.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        lines = [f"{name}: {value}  " for name, value in self.facts.items()]
        lines += ["", "| check | what | measured | expected | verdict |", "|---|---|---|---|---|"]
        for row in self.rows:
            cells = [row[key] for key in ("check", "name", "measured", "expected", "verdict")]
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
        return "\n".join(lines) + "\n"

    def has_failed(self) -> bool:
        return any(row["verdict"] == FAILED for row in self.rows)


def run(
    checks: Sequence[Check], setting: Setting, cache: Path, seconds: float, facts: dict[str, Any]
) -> Report:
    """Runs the checks, one after the other. seconds: all of them, at most."""
    report = Report(setting.out, facts)
    end = time.monotonic() + seconds
    (setting.out / f"{NAME}.log").write_bytes(b"")
    for check in checks:
        start = time.monotonic()
        for found in one(check, setting, cache, end - start):
            if isinstance(found, Row):
                report.add(check, found, time.monotonic() - start)
            else:
                report.facts |= found
        report.write()
    return report


def one(check: Check, setting: Setting, cache: Path, left: float) -> Iterator[Row | dict[str, Any]]:
    """The results of one check. left: seconds until the end of the proof."""
    missing = [name for name in check.needs if not is_there(name)]
    if missing:
        yield skipped(check.name, f"needs {', '.join(missing)}, which this Python lacks")
    elif left < MINIMUM_SECONDS:
        yield skipped(check.name, "no time is left for it")
    else:
        yield from results(check, setting, cache, min(check.seconds, left))


def is_there(module: str) -> bool:
    """Whether a module can be imported; it is not, for that takes time and may start a device."""
    package = module.partition(".")[0]
    return importlib.util.find_spec(package) is not None


def lacks() -> str:
    """The packages of requirements.txt that are missing or of another version, on one line."""
    from packaging.requirements import Requirement

    found = []
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        wanted = Requirement(text)
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(wanted.name)
            continue
        if version not in wanted.specifier:
            found.append(f"{wanted.name}{wanted.specifier} ({version} is here)")
    return ", ".join(found) or "nothing"


def facts_of_this_machine(setting: Setting) -> dict[str, Any]:
    """The head of the report; checks add the device."""
    return {
        "device": "not known",
        "date": datetime.date.today().isoformat(),
        "Python": machine.python_version(),
        "JAX": importlib.metadata.version("jax"),
        "shapes": "small" if setting.small else "full",
        "lacks": lacks(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    numbers = ",".join(str(check.number) for check in CHECKS)
    parser.add_argument("--out", type=lambda path: Path(path).expanduser())
    parser.add_argument("--checks", default=numbers, help=f"of {numbers}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all checks on a GPU")
    parser.add_argument("--small", action="store_true", help="shapes for a CPU")
    parser.add_argument(
        "--cache",
        type=lambda path: Path(path).expanduser(),
        default=Path(tempfile.gettempdir()) / "ssp_jax_proof",
        help="compiled programs",
    )
    parser.add_argument("--write", action="store_true", help="make the goldens of checks 3 and 4")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows_fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.write:
        platform.prepare()
        importlib.import_module("benchmarks.proof.golden").write()
        return 0
    if args.out is None:
        parser.error("--out is missing: a folder for the results")
    small = args.small or platform.cpu_will_be_used(os.environ)
    setting = Setting(small, args.out.resolve())
    if args.child:
        child(args.child, args.rows_fd, setting)
        return 0
    wanted = args.checks.split(",")
    if unknown := set(wanted) - set(numbers.split(",")):
        parser.error(f"--checks: {', '.join(sorted(unknown))}; expected numbers of {numbers}")
    setting.out.mkdir(parents=True, exist_ok=True)
    facts = facts_of_this_machine(setting)
    print(f"lacks: {facts['lacks']}", flush=True)
    checks = [check for check in CHECKS if str(check.number) in wanted]
    if small:
        checks = [dataclasses.replace(c, seconds=SLOWER * c.seconds) for c in checks]
    minutes = args.minutes * (SLOWER if small else 1)
    report = run(checks, setting, args.cache, 60 * minutes, facts)
    print(f"device: {report.facts['device']}; {setting.out / NAME}.md has the table")
    return 1 if report.has_failed() else 0


if __name__ == "__main__":
    sys.exit(main())
