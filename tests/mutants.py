"""One-line breaks of the package, each with the test that must fail: are the tests awake?

    python -m tests.mutants [--only=WORD]        # about 20 minutes; writes tests/mutants.txt

Each mutant is played in a copy of the repository. `make test` checks that each line that is broken
here is still there (tests/test_mutants.py).
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "tests" / "mutants.txt"
SECONDS = 600  # a mutant may hang: that is a failure of its test too
COPIED = ("ssp_jax", "configs", "tests", "assets", "benchmarks", "launch", "pyproject.toml")


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str  # in ssp_jax/
    line: str  # occurs once in the file
    broken: str
    test: str  # in tests/: a node id, which must fail


MUTANTS: list[Mutant] = []


def play(mutant: Mutant, copy: Path) -> tuple[str, float]:
    """What pytest says of the test once the line is broken, and its seconds."""
    path = copy / "ssp_jax" / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.line, mutant.broken))
    # One address as in a run of all tests; no cache of bytecode, which is found by time and size.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, f"tests/{mutant.test}"],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        # 1: tests ran and one failed. Others mean that no test has judged it.
        verdict = {0: "SURVIVED", 1: "killed"}.get(done.returncode, f"pytest {done.returncode}")
    except subprocess.TimeoutExpired:
        verdict = "killed"
    finally:
        path.write_text(text)
    return verdict, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose file or test has this word")
    only = parser.parse_args().only
    chosen = [m for m in MUTANTS if only in m.file or only in m.test]
    rows = []
    with tempfile.TemporaryDirectory(prefix="ssp_jax_mutants_") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for number, mutant in enumerate(chosen, 1):
            verdict, seconds = play(mutant, copy)
            row = f"{verdict:9} {mutant.file}: {mutant.broken.strip()} | {mutant.test}"
            print(f"{number}/{len(chosen)} {seconds:4.0f} s  {row}", flush=True)
            rows.append(row)
    killed = sum(row.startswith("killed") for row in rows)
    print(f"{killed} of {len(rows)} mutants killed")
    if not only:
        head = f"{killed} of {len(rows)} mutants killed by the test that must fail"
        RESULT.write_text("\n".join([head, *rows]) + "\n")
    return 0 if killed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
