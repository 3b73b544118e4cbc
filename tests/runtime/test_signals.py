"""Ctrl-C, SIGTERM and SIGHUP, each sent for real to a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 60  # for whatever is waited for: this machine may have much else to do
COMMAND = """
import atexit, hashlib, os, signal, sys, threading, time
from ssp_jax.runtime import command, signals

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)  # Python runs the handler here

def blocked():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes of C code

def ready():
    print("ready", flush=True)
"""


def start(code: str, ignored: str = "") -> subprocess.Popen[str]:
    """A Python process that runs this code; it ignores one signal from the start, by name."""
    command = [sys.executable, "-c", COMMAND + code]
    if ignored:
        command = ["sh", "-c", f"trap '' {ignored}; exec \"$@\"", "sh", *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.readline() == "ready\n"


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    errors = process.communicate(timeout=SECONDS)[1]
    return process.returncode, errors


SWALLOWED = """
class Library:
    def __del__(self):  # an exception in here is printed and ignored
        interrupt()

def run():
    library = Library()
    del library
    time.sleep(5)

sys.exit(command.exit_code(run))
"""


def test_ctrl_c_that_a_callback_swallows_is_raised_again() -> None:
    assert ended(start(SWALLOWED)) == (130, "ssp_jax: interrupted\n")


CLEANING = """
def run():
    try:
        ready()
        time.sleep(50)
    finally:
        ready()
        time.sleep(50)

sys.exit(command.exit_code(run))
"""


def test_the_second_ctrl_c_leaves_at_once() -> None:
    process = start(CLEANING)
    for _ in range(2):
        wait_until_ready(process)
        process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "ssp_jax: interrupted again: leaves at once\n")


@pytest.mark.parametrize("around", ["command.exit_code(wait)", "with_stop()"])
def test_the_second_ctrl_c_leaves_at_once_also_while_a_library_computes(around: str) -> None:
    code = """
def wait():
    threading.Timer(0.5, ready).start()  # says so when the C code has begun
    blocked()

def with_stop():
    from ssp_jax.runtime import processes
    with processes.Stop():
        wait()

"""
    process = start(code + around)
    wait_until_ready(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code_, said = ended(process)
    assert code_ == 130 and said.endswith("leaves at once\n")


SAVES = """
from ssp_jax.runtime import processes
with processes.Stop() as stop:
    ready()
    try:
        while True:
            time.sleep(0.01)
            stop()
    except processes.Terminated:
        print(stop.cause)
sys.exit(stop.code)
"""


@pytest.mark.parametrize(
    ("number", "code", "cause"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 0, "terminated"),
        (signal.SIGHUP, 0, "terminated"),
    ],
)
def test_a_signal_ends_a_run_where_it_can_be_saved(number: int, code: int, cause: str) -> None:
    process = start(SAVES)
    wait_until_ready(process)
    process.send_signal(number)
    output, said = process.communicate(timeout=SECONDS)
    assert (process.returncode, output) == (code, f"{cause}\n")
    assert said.count("\n") == (number == signal.SIGINT)  # a person is told that it was heard


@pytest.mark.parametrize("name", ["HUP", "INT"])
def test_a_signal_that_is_ignored_from_the_start_stays_ignored(name: str) -> None:
    """As nohup does, and a shell with a job in the background."""
    process = start(SAVES, ignored=name)
    wait_until_ready(process)
    process.send_signal(getattr(signal, f"SIG{name}"))
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, "")


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_after_the_work_is_done_changes_nothing(number: str) -> None:
    late = f"atexit.register(lambda: os.kill(os.getpid(), signal.{number}))\n"
    assert ended(start(late + "signals.leave(0)")) == (0, "")
    assert ended(start(late + "sys.exit(0)"))[0] == -getattr(signal, number)


IN_A_TERMINAL = """
import os, pty, sys
child, terminal = pty.fork()
if not child:
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1], sys.argv[2]])
while b"ready" not in os.read(terminal, 1024):
    pass
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
SPEAKS = """
from ssp_jax.runtime import processes
with processes.Stop() as stop:
    ready()
    try:
        while True:
            time.sleep(0.5)
            stop()
            print("playing", flush=True)
    except processes.Terminated:
        print("saving", flush=True)  # into a terminal that is gone
        open(sys.argv[1], "w").close()
"""


def test_a_run_whose_terminal_is_closed_saves(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_A_TERMINAL, COMMAND + SPEAKS, f"{tmp_path}/saved"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "") and os.path.exists(f"{tmp_path}/saved")
