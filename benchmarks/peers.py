"""The peers that benchmarks measure beside ours, in virtual environments of their own."""

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "tunix": ("google-tunix==0.1.7", "jax==0.12.0.1", "numpy"),
    "torch": ("torch==2.13.0", "transformers==5.23.0", "numpy"),
}


def interpreter(peer: str, folder: Path, python312: str = "python3.12") -> str | None:
    """The Python of a peer's environment at `folder`, which is made where it is missing.

    Tunix needs Python 3.12. Without one it returns None, and prints a line that says so.
    """
    base: str | None = sys.executable
    if peer == "tunix":
        base = _find(python312)
        if base is None:
            print(f"{peer} is left out: it needs Python 3.12, and there is no {python312}")
            return None
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    packages = PACKAGES[peer]
    wanted = " ".join(packages)
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"installing {wanted}", file=sys.stderr, flush=True)
        subprocess.run([str(base), "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def _find(name: str) -> str | None:
    """A Python that starts: pyenv puts scripts on PATH for versions that it does not have."""
    pyenv = Path.home() / ".pyenv" / "versions"
    candidates = [shutil.which(name), *map(str, sorted(pyenv.glob(f"3.*/bin/{name}")))]
    for candidate in filter(None, candidates):
        if not subprocess.run([candidate, "--version"], capture_output=True).returncode:
            return candidate
    return None
