"""A function of the user's that says which answers are right."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ssp_jax.errors import InputError, shown
from ssp_jax.game.judge import Case, OnVerdict, Verdict
from ssp_jax.runtime import processes
from ssp_jax.user_code import load

_SAMPLE = Case("How many days has a week?", ("7", "seven"), "seven")


class Function:
    """A function (question, right answers, answer) -> bool, as a judge of the game.

    It is asked about every answer, also about those that equal a right one.
    """

    def __init__(self, key: str, value: str) -> None:
        """Loads and tries it. key: of the config. value: FILE.py:NAME. Raises InputError."""
        self.name = f"{Path(load.file_of(value)).name}:{load.name_of(value)}"
        self.identity = processes.digest((self.name, load.digest(value)))
        self._key = key
        self._value = value
        self._function = load.load(key, value)
        try:
            inspect.signature(self._function).bind(*_arguments(_SAMPLE))
        except (TypeError, ValueError):
            raise InputError(
                f"config key {key}: {value} expected three parameters: question, answers, answer"
            ) from None
        self._is_right(_SAMPLE)

    def _is_right(self, case: Case) -> bool:
        with load.running(self._key, self._value):
            right = self._function(*_arguments(case))
        if not isinstance(right, bool | np.bool_):
            raise InputError(
                f"config key {self._key}: {self._value} gives {shown(right)} for the answer "
                f"{shown(case.answer)}; expected True or False"
            )
        return bool(right)

    def ask(
        self, cases: Sequence[Case], on_verdict: OnVerdict, progress: Callable[[], None]
    ) -> None:
        for i, case in enumerate(cases):
            right = self._is_right(case)
            on_verdict(i, Verdict(right, str(right)))
            progress()


def _arguments(case: Case) -> tuple[str, list[str], str]:
    return case.question, list(case.answers), case.answer
