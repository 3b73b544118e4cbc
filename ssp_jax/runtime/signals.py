"""Signals that end a program: Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends as it closes.

A handler that raises is not enough. Python runs it wherever the main thread is: inside a callback
of a library (JAX has some for the garbage collector) the exception is printed and ignored, and
while the main thread is in C code the handler does not run at all. So a thread learns of each
signal at once, over a pipe that Python's own C handler writes to.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

INTERRUPTED = 130  # a shell's exit code of a program that Ctrl-C has ended
_RETRY_SECONDS = 0.05
before_leaving: list[Callable[[], None]] = []  # actions before any os._exit


def say(sentence: str) -> None:
    """Writes to standard error, from any thread and whoever holds Python's own streams."""
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, f"ssp_jax: {sentence}\n".encode())


def leave_at_once() -> NoReturn:
    """Ends the program on the second Ctrl-C, without the clean-up that the first one waits for."""
    say("interrupted again: leaves at once")
    for action in before_leaving:
        action()
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def heard(
    numbers: Sequence[int],
    arrived: Callable[[int], None],
    handler: Callable[..., None] = lambda *_: None,
) -> Iterator[None]:
    """While this context is open, a thread calls `arrived(number)` as soon as a signal arrives.

    handler: Python runs it in the main thread, some time later. A signal that is ignored from the
    start stays ignored: nohup, and a shell that starts jobs in the background, rely on that. Only
    the main thread can set handlers; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while found := os.read(reader, 64):
            for number in found:
                if number in before:
                    arrived(number)
        os.close(reader)

    wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before: dict[int, Any] = dict.fromkeys(wanted)
    threading.Thread(target=listen, daemon=True).start()
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in wanted:
        before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, signal.SIG_DFL if action is None else action)
        signal.set_wakeup_fd(pipe_before, warn_on_full_buffer=False)
        os.close(writer)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around a command: Ctrl-C raises KeyboardInterrupt, and again if a callback swallows it.

    The second Ctrl-C leaves at once, also while the program still reacts to the first.
    """
    main_thread = threading.get_ident()
    presses = 0
    repeats = 0  # signals that `repeat` has sent
    due = True  # the main thread has not been interrupted yet

    def arrived(_: int) -> None:
        nonlocal presses, repeats
        if repeats:
            repeats -= 1
            return
        presses += 1
        if presses > 1:
            leave_at_once()

    def interrupt(*_: object) -> None:
        nonlocal due
        if due:
            due = False
            raise KeyboardInterrupt

    def repeat() -> None:
        nonlocal repeats, due
        repeats += 1
        due = True
        signal.pthread_kill(main_thread, signal.SIGINT)

    def swallowed(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            threading.Timer(_RETRY_SECONDS, repeat).start()
        else:
            hook_before(ignored)

    hook_before = sys.unraisablehook
    sys.unraisablehook = swallowed
    try:
        with heard([signal.SIGINT], arrived, interrupt):
            yield
    finally:
        sys.unraisablehook = hook_before


def leave(code: int) -> NoReturn:
    """Ends a program that has done its work; signals that arrive meanwhile change nothing."""
    if code == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.exit(code)
