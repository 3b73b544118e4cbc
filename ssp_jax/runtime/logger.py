"""Output of a run: console, metrics.jsonl, TensorBoard, readable episodes, compile count.

In a terminal a live display (the phases at work, the whole run) stays under a growing table with
one row per step. Anywhere else there are plain lines with the time in front, and progress every ten
seconds, also of a phase that reports none. The lines of steps fit into 100 columns.
"""

import json
import math
import os
import re
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import jax
from rich import box, table
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ssp_jax.errors import json_line, printable
from ssp_jax.metric_table import meaning
from ssp_jax.runtime import device_memory
from ssp_jax.runtime.files import replacing
from ssp_jax.runtime.records import read_lines

HEADER_EVERY = 20  # rows
PLAIN_SECONDS = 10.0  # between progress lines that do not go to a terminal
BEAT_SECONDS = 1.0  # between looks whether such a line is due
CHANGES = "changes"  # in a line of metrics.jsonl: config keys that hold from there
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Column:
    """One number of a step on the console. It appears with the first step that has this metric."""

    title: str
    metric: str
    form: str  # format specification with a width; a width alone writes 12.3k
    style: str = ""

    @property
    def width(self) -> int:
        """Characters that the title and the form need."""
        return max(len(self.title), len(_format(0, self.form)))


COLUMNS = (
    # The funnel: questions asked, of these well-formed, of these verified; share of attempts that
    # were right.
    Column("asked", "funnel/proposed", "5.0f"),
    Column("formed", "funnel/well_formed", "6.0f"),
    Column("verif", "funnel/verified", "5.0f"),
    Column("solved", "funnel/solved", "6.1%", "bold green"),
    Column("propR", "reward/proposer", "5.2f", "magenta"),
    Column("solvR", "reward/solver", "5.2f", "green"),
    Column("srch", "solver/searches", "4.1f"),
    Column("tokens", "solver/tokens", "6.0f"),
    Column("entr", "update/solver/entropy", "4.2f", "yellow"),
    Column("entr", "update/both/entropy", "4.2f", "yellow"),  # learner.update_order = combined
    Column("KL", "update/solver/kl", "6.4f", "yellow"),
    Column("KL", "update/both/kl", "6.4f", "yellow"),
    Column("tok/s", "play/tokens_per_second", "5", "blue"),
    # A warm start has no game.
    Column("loss", "warm_start/loss", "6.3f", "bold green"),
    Column("entr", "warm_start/entropy", "5.3f", "yellow"),
    Column("gradn", "warm_start/grad_norm", "6.2f", "yellow"),
)


def pop_peak_memory_gib() -> float:
    """Peak GiB of the fullest device of this host; of this process where none reports it.

    Devices report the peak since the start, so the update's shows once it exceeds that of play. On
    Linux this call resets the peak of the process, so that each phase has its own.
    """
    stats = map(device_memory.stats, jax.local_devices())
    if peaks := [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]:
        return max(peaks) / 2**30
    status = Path("/proc/self/status")
    if not status.exists():  # macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text())
    assert found is not None
    with suppress(OSError):  # a sandbox may refuse it; then the peak is the one since the start
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    return int(found[1]) / 2**20


class CompileCounter:
    """Counts this process's XLA compilations from now on, also those found in a cache on disk."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0  # of all threads
        self._counting = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            with self._counting:
                self.count += 1
                self.seconds += duration_secs


class Phase:
    """Progress of one phase of a step."""

    def __init__(self, name: str, total: float | None, show: Callable[[str], None]) -> None:
        self.name = name
        self.total = total
        self.done = 0.0
        self.detail = ""  # what was shown last
        self._start = time.monotonic()
        self._show = show

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def advance(self, done: float, *, total: float | None = None, **rates: float) -> None:
        """Shows progress; cheap, so call it as often as you like.

        done: the amount finished so far, not the increment. total: may grow on the way (a verified
        question brings its attempts). rates: tokens=310.0 shows "310 tokens/s".
        """
        self.done = done
        if total is not None:
            self.total = total
        rate = done / max(1e-9, self.seconds)
        words = [f"{done:g}/{self.total:g}" if self.total else f"{done:g}"]
        if done:
            words.append(f"{short_number(rate)}/s")
        words += [f"{short_number(value)} {name}/s" for name, value in rates.items()]
        if done and self.total and self.total >= done:
            words.append(f"{clock((self.total - done) / rate)} left")
        self.detail = " · ".join(words)
        self._show(self.detail)


class Tracker(Protocol):
    """Sends numbers and games of a run elsewhere; returns a sentence where that has failed."""

    def log(self, step: int, metrics: Mapping[str, float]) -> str: ...
    def games(self, step: int, records: Sequence[Mapping[str, Any]]) -> str: ...
    def close(self) -> str: ...


class Logger:
    """Console and files of a run; a context manager.

    resume_step: of the checkpoint, 0 for none. Rows that a killed run wrote after it are dropped
    from metrics.jsonl (and hidden in TensorBoard): those steps are played again. mute: show and
    write nothing, as do all processes but one.
    """

    def __init__(
        self,
        workdir: str,
        total_steps: int,
        tensorboard: bool,
        resume_step: int = 0,
        mute: bool = False,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._folder = Path(workdir)
        self._total_steps = total_steps
        self._step = resume_step
        self._mute = mute
        self._trackers = trackers

        # Files.
        path = Path(os.devnull)
        if not mute:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / "metrics.jsonl"
        self._evaluated, spoilt = _keep_steps(path, resume_step)
        self._metrics_file = path.open("a", encoding="utf-8")
        events = self._folder / "tensorboard"
        self._events = _open_events(events, resume_step) if tensorboard and not mute else None

        # Console. force_terminal: rich would take FORCE_COLOR in a CI log for a terminal. No markup
        # and emoji: paths and answers have brackets and colons of their own.
        self._live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not mute
        self._console = Console(
            file=self._metrics_file if mute else sys.stdout,
            force_terminal=self._live,
            markup=False,
            emoji=False,
            highlight=False,
        )
        self._bars = _progress(self._console)
        self._run_bar = self._bars.add_task(
            "run",
            visible=total_steps > 0,  # an evaluation has no steps
            total=total_steps,
            completed=resume_step,
            detail=f"{resume_step}/{total_steps} steps",
        )
        self._columns: tuple[Column, ...] = ()
        self._explained: set[str] = set()  # titles of columns
        self._said: set[str] = set()  # topics of say_once
        self._rows_since_header = 0
        self._phases: list[tuple[Phase, Callable[[], str]]] = []  # at work, the innermost last
        self._speaking = threading.Lock()
        self._closed = threading.Event()
        # When the last steps ended: their distance includes saves and evaluations.
        self._ends: deque[float] = deque(maxlen=11)
        self._last_line = -math.inf
        if spoilt:
            cause = "a machine that went down leaves such"
            self.say(f"{spoilt} spoilt lines of {path} are dropped: {cause}")

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        elif not self._mute:
            threading.Thread(target=self._keep_speaking, daemon=True, name="progress").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._live:
            self._bars.stop()
        self._metrics_file.close()
        if self._events:
            self._events.close()
        self._say_each(tracker.close() for tracker in self._trackers)

    @contextmanager
    def phase(
        self, name: str, total: float | None = None, state: Callable[[], str] = lambda: ""
    ) -> Iterator[Phase]:
        """Live progress while the body runs; a phase may stand inside another.

        state: how far it is, in words, where it reports no progress; any thread calls it.
        """
        bar = self._bars.add_task(name, total=total, detail="")
        phase = Phase(name, total, lambda detail: self._progress(phase, bar, detail))
        self._progress(phase, bar, "")
        self._phases.append((phase, state))
        try:
            yield phase
        finally:
            self._phases.pop()
            self._bars.remove_task(bar)

    def step(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """One finished step: a row of metrics.jsonl, TensorBoard scalars, a row on the console."""
        self.record(step, {"seconds": seconds, **metrics})
        self._step = step
        self._ends.append(time.monotonic())
        left = clock(self._seconds_left(seconds))
        position = f"{step}/{self._total_steps}"
        self._bars.update(self._run_bar, completed=step, detail=f"{position} steps · {left} left")
        columns = tuple(c for c in COLUMNS if c in self._columns or c.metric in metrics)
        if columns != self._columns or self._rows_since_header % HEADER_EVERY == 0:
            self._columns = columns
            self._rows_since_header = 0
            self._row("step", [(c.title, "bold") for c in columns], "s/step", "left")
            self._explain(columns)
        self._rows_since_header += 1
        cells = []
        for column in columns:
            value = metrics.get(column.metric)
            text = "-" if value is None else _format(value, column.form)
            cells.append((text, column.style))
        self._row(position, cells, f"{seconds:.1f}", left)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Writes the scores of a step, unless its last row has the same; returns whether it did.

        So metrics.jsonl has them once however often the run was killed around them, and again
        where a judge changes its verdicts.
        """
        row = {"step": step, **_finite(metrics)}
        before = self._evaluated.get(step, {})
        if row == {name: value for name, value in before.items() if name != "time"}:
            return False
        self.record(step, metrics)
        self._evaluated[step] = row
        return True

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes to metrics.jsonl and TensorBoard only.

        A value that is not finite is null in JSON and left out in TensorBoard.
        """
        finite = _finite(metrics)
        row = {"step": step, "time": round(time.time(), 3), **finite}
        self._metrics_file.write(json.dumps(row) + "\n")
        self._metrics_file.flush()
        known = {name: value for name, value in finite.items() if value is not None}
        self._say_each(tracker.log(step, known) for tracker in self._trackers)
        if self._events:
            values = [Summary.Value(tag=name, simple_value=v) for name, v in known.items()]
            summary = Summary(value=values)
            self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            self._events.flush()

    def changes(self, step: int, changed: Mapping[str, Sequence[Any]]) -> None:
        """Writes config keys that the steps after this one have anew: before and now.

        The run says them again, or other ones, where it goes on from the same step once more.
        """
        row = {"step": step, "time": round(time.time(), 3), CHANGES: dict(changed)}
        self._metrics_file.write(json.dumps(row) + "\n")
        self._metrics_file.flush()

    def sync(self) -> None:
        """Flushes the rows so far to disk: they survive a machine that goes down."""
        if not self._mute:
            os.fsync(self._metrics_file.fileno())

    def table(self, title: str, rows: Sequence[Sequence[object]], columns: Sequence[str]) -> None:
        """Prints a table: text on the left in the first column, numbers on the right in the others.

        Floats have 3 decimals.
        """
        shown = table.Table(
            title=printable(title),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD if self._live else box.ASCII2,
            show_edge=False,
        )
        for i, column in enumerate(columns):
            shown.add_column(printable(column), justify="right" if i else "left", no_wrap=True)
        for row in rows:
            cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in row)
            shown.add_row(*map(printable, cells))
        # At its full width: a narrow terminal wraps its lines, where rich would cut numbers.
        options = self._console.options.update(max_width=1000)
        shown.width = self._console.measure(shown, options=options).maximum
        self._console.print("", shown, "", soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints one line."""
        self._line(Text(printable(text)))

    def say_once(self, topic: str, text: str) -> None:
        """Prints one line, unless one on this topic was printed before."""
        if topic not in self._said:
            self._said.add(topic)
            self.say(text)

    def episodes(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes workdir/episodes/step_000010.jsonl, one record a line, its text unescaped."""
        if self._mute:
            return
        folder = self._folder / "episodes"
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"step_{step:06d}.jsonl", f"{folder}") as file:
            file.writelines(f"{json_line(record)}\n" for record in records)
        self._say_each(tracker.games(step, records) for tracker in self._trackers)

    def _say_each(self, sentences: Iterable[str]) -> None:
        for sentence in filter(None, sentences):
            self.say(sentence)

    def _seconds_left(self, last_seconds: float) -> float:
        steps = len(self._ends) - 1
        step_seconds = (self._ends[-1] - self._ends[0]) / steps if steps else last_seconds
        return step_seconds * (self._total_steps - self._step)

    def _progress(self, phase: Phase, bar: TaskID, detail: str) -> None:
        if self._live:
            self._bars.update(bar, completed=phase.done, total=phase.total, detail=detail)
        else:
            self._line_if_due(f"{phase.name} {detail or '...'}")

    def _keep_speaking(self) -> None:
        """In a thread: says how far the phase at work is that has said nothing for a while."""
        while not self._closed.wait(BEAT_SECONDS):
            with suppress(IndexError):  # no phase is at work
                phase, state = self._phases[-1]
                words = [state() or phase.detail, clock(phase.seconds)]
                self._line_if_due(f"{phase.name} {' · '.join(filter(None, words))}")

    def _line_if_due(self, text: str) -> None:
        with self._speaking:
            if time.monotonic() - self._last_line >= PLAIN_SECONDS:
                self._line(Text(text))

    def _explain(self, columns: Sequence[Column]) -> None:
        """Says once what each column shows, below the first header that has it."""
        shown = [(column.title, column.metric) for column in columns]
        for title, metric in [*shown, ("s/step", "seconds")]:
            if title not in self._explained:
                self._explained.add(title)
                self._line(Text(f"  {title:<6} = {metric}: {meaning(metric)}", "dim"))

    def _row(self, first: str, cells: Sequence[tuple[str, str]], seconds: str, left: str) -> None:
        """One line of the table of steps. cells: text and style of each column."""
        first_width = len(f"{self._total_steps}") * 2 + 1
        texts = [Text(first.rjust(first_width), "bold cyan")]
        for column, (text, style) in zip(self._columns, cells, strict=True):
            texts.append(Text(text.rjust(column.width), style))
        texts.append(Text(seconds.rjust(6), "blue"))
        texts.append(Text(left.rjust(7), "dim"))
        self._line(Text(" ").join(texts))

    def _line(self, text: Text) -> None:
        self._last_line = time.monotonic()
        if not self._live:
            text = Text(time.strftime("%H:%M:%S ")) + text
        self._console.print(text, soft_wrap=True)


def _progress(console: Console) -> Progress:
    """One line for the run, below it one for each phase at work."""
    one_line = table.Column(no_wrap=True, overflow="ellipsis")
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<10}", style="bold"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", table_column=one_line),
        console=console,
        refresh_per_second=5,
        transient=True,
    )


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _keep_steps(path: Path, last: int) -> tuple[dict[int, dict[str, Any]], int]:
    """Drops rows after step `last`, changes of keys that hold from there, and spoilt lines.

    Returns the last row of each evaluation that stays, by step, and the number of spoilt lines.
    """
    evaluated: dict[int, dict[str, Any]] = {}
    spoilt = 0
    if not path.is_file():  # a run that starts, or the null device
        return evaluated, spoilt
    with replacing(path, str(path)) as fresh:
        for line in read_lines(path, {"step": (int,)}):
            row = line.record
            if row is None:
                spoilt += 1
            elif row["step"] < last or (row["step"] == last and CHANGES not in row):
                fresh.write(line.raw.decode())
                if any(name.startswith("eval/") for name in row):
                    evaluated[row["step"]] = row
    return evaluated, spoilt


def _open_events(folder: Path, resume_step: int) -> EventsWriter:
    """A TensorBoard file that hides events of earlier files after that step.

    It is written in the caller's thread. (tensorboardX's SummaryWriter has a thread of its own; a
    full disk ends it, and from then on the run would wait for it for ever.)
    """
    folder.mkdir(exist_ok=True)
    events = EventsWriter(str(folder / "events"))
    started = SessionLog(status=SessionLog.START)
    events.write_event(Event(step=resume_step + 1, wall_time=time.time(), session_log=started))
    return events


def _format(value: float, form: str) -> str:
    return format(value, form) if not form.isdigit() else short_number(value).rjust(int(form))


def short_number(value: float) -> str:
    """0.35, 12.3, 310, 4.2k, 1.3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def clock(seconds: float) -> str:
    """0:07, 12:05, 3:00:09."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
