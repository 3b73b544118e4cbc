"""The lines that mutants break are there, and so are the tests that must notice."""

import pytest

from tests.mutants import MUTANTS, RESULT, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.test.split("::")[-1])
def test_a_mutant_breaks_one_line_that_is_there(mutant):
    text = (ROOT / "ssp_jax" / mutant.file).read_text()
    assert text.count(mutant.line) == 1 and mutant.broken != mutant.line
    file, name = mutant.test.split("::")
    assert f"def {name.split('[')[0]}(" in (ROOT / "tests" / file).read_text()


def test_the_committed_result_is_of_these_mutants():
    rows = RESULT.read_text().splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["killed"] * len(MUTANTS)
    assert [row.split(" | ")[1] for row in rows] == [mutant.test for mutant in MUTANTS]
