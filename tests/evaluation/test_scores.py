"""Intervals of evaluations: the bootstrap agrees with theory, and is the same each time."""

import numpy as np
import pytest

from ssp_jax.evaluation import paper_table, scores


def values(**right):
    """Sets with these values of `right`; the other columns are ones."""
    rows = {name: np.array(row, float) for name, row in right.items()}
    others = (*scores.SHARES[1:], *scores.MEANS)
    return {
        name: {"right": row} | {other: np.ones(len(row)) for other in others}
        for name, row in rows.items()
    }


def bits(n, share, seed=0):
    return np.random.default_rng(seed).permutation(np.arange(n) < share * n)


def test_the_interval_of_a_share():
    """Of 200 of 500: 40 +- 1.96 * sqrt(0.4 * 0.6 / 500) = 35.7 to 44.3."""
    row = scores.summarize(values(nq=bits(500, 0.4)))["nq"]
    assert row["right"] == pytest.approx(40.0) and row["n"] == 500
    assert row["right_low"] == pytest.approx(35.7, abs=0.5) and row["right_high"] == pytest.approx(
        44.3, abs=0.5
    )
    assert (row["em_low"], row["em_high"], row["searches"]) == (100.0, 100.0, 1.0)
    assert row == scores.summarize(values(nq=bits(500, 0.4)))["nq"]


def test_the_average_is_of_sets_and_its_interval_is_narrower():
    """As in the paper: a plain mean, whatever the sizes. Of k independent sets it varies as 1 /
    sqrt(k).
    """
    sets = {f"set{i}": bits(400, 0.5, i) for i in range(4)}
    table = scores.summarize(values(**sets))
    one, mean = (
        table[name]["right_high"] - table[name]["right_low"] for name in ("set0", "average")
    )
    assert mean == pytest.approx(one / 2, rel=0.15)
    assert scores.summarize(values(a=[1, 1, 1, 1], b=[0]))["average"]["right"] == 50.0
    assert scores.summarize({}) == {}  # of a run without question sets
    assert scores.summarize(values(a=[1, 0]))["a"]["n"] == 2 and "average" not in scores.summarize(
        values(a=[1, 0])
    )


def test_gains_are_paired():
    """5 of 100 questions change, all for the better: the gain is 5 +- 4.3, though each end alone is
    +- 9.8.
    """
    old = bits(100, 0.5)
    new = old.copy()
    new[np.flatnonzero(~old)[:5]] = True
    found = scores.gains(values(nq=old), values(nq=new), {})["nq"]
    assert (found.before, found.after, found.gain) == (50.0, 55.0, pytest.approx(5.0))
    assert found.low == pytest.approx(1.0, abs=1.0) and found.high == pytest.approx(10.0, abs=1.0)


def test_the_papers_row_stands_beside_the_sets_of_its_test_file():
    sets = {f"ssp/{name}": [0, 1] for name in paper_table.SETS}
    figures = paper_table.table_1("some/folder/Qwen2.5-7B-Instruct/")
    found = scores.gains(values(**sets), values(**sets), figures)
    assert found["ssp/nq"].paper == (44.2, 54.8) and found["ssp/bamboogle"].paper == (51.2, 54.4)
    assert found["average"].paper == pytest.approx((41.5, 49.5), abs=0.05)
    cells, heads = scores.gain_rows(found, {})
    assert heads[-3:] == ["paper (LLM judge) before", "after", "gain"]
    assert cells[0][0] == "nq" and cells[-1][-1] == "+8.0"
    some = scores.gains(
        values(**{"ssp/nq": [0, 1], "mine": [1]}),
        values(**{"ssp/nq": [1, 1], "mine": [1]}),
        figures,
    )
    assert some["average"].paper is None and some["mine"].paper is None
    assert [row[0] for row in scores.gain_rows(some, {})[0]] == ["ssp/nq", "mine", "average"]
    # a mean over eight sets does not stand beside one over seven
    for other in ("mine", "other/nq"):
        more = values(**sets, **{other: [1, 1]})
        assert scores.gains(more, more, figures)["average"].paper is None


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("Qwen/Qwen2.5-7B", 22.3, 48.7),
        ("Qwen/Qwen2.5-7B-Instruct", 41.5, 49.5),
        ("meta-llama/Llama-3.1-8B-Instruct", 36.7, 46.3),
        ("Qwen/Qwen3-8B", 52.5, 56.3),
        ("Alibaba-NLP/ZeroSearch_wiki_V2_Qwen2.5_7B", 43.6, 45.9),
        ("PeterJinGo/SearchR1-nq_hotpotqa_train-qwen2.5-7b-em-ppo-v0.2", 53.9, 55.7),
        ("qingfei1/R-Search-7b-grpo", 52.8, 54.6),
        ("Qwen/Qwen2.5-14B-Instruct", 54.8, 56.9),
        # the paper prints 58.5, which is not the mean of its seven
        ("Qwen/Qwen2.5-32B-Instruct", 55.1, 59.1),
    ],
)
def test_table_1(path, before, after):
    """Its averages are those that the paper prints: a wrong digit in a row would show."""
    rows = paper_table.table_1(path)
    assert list(rows) == list(paper_table.SETS)
    assert np.mean(list(rows.values()), axis=0) == pytest.approx((before, after), abs=0.06)


def test_a_model_has_its_name_in_the_cache_of_the_hub():
    path = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/a09a35458c"
    expected = paper_table.table_1("Qwen/Qwen2.5-7B-Instruct")
    assert paper_table.table_1(path) == paper_table.table_1(path + "/") == expected != {}


def test_a_model_that_the_paper_does_not_have():
    assert paper_table.table_1("runs/Qwen2.5-7B-Instruct/export") == {}
    assert paper_table.table_1("models/qwen2.5-coder-0.5b-instruct") == {}
    assert paper_table.table_1("mine/Qwen2.5-7B-Instruct-finetuned") == {}
