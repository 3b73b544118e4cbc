"""Words of any script: pairs of letters where there are no spaces, marks within words, and the
plain words of bm25s everywhere else.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssp_jax.corpus import words
from ssp_jax.corpus.words import covered, length, split, split_plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("北京大学在2024年", ["北京", "京大", "大学", "学在", "2024", "年"]),
        ("iPhone手机，好", ["iphone", "手机", "好"]),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("서울은 대한민국", ["서울", "울은", "대한", "한민", "민국"]),
        ("กรุงเทพ ๑๒๓", ["กรุ", "รุง", "งเ", "เท", "ทพ", "๑๒๓"]),
        ("ລາວ", ["ລາ", "າວ"]),
        ("ភ្នំពេញ", ["ភ្នំ", "នំពេ", "ពេញ"]),
        ("မြန်မာ", ["မြန်", "န်မာ"]),
        ("नई दिल्ली, भारत", ["नई", "दिल्ली", "भारत"]),
        ("ශ්\u200dරී ලංකා", ["ශ්රී", "ලංකා"]),
        ("مُحَمَّد", ["مُحَمَّد"]),
        # one form of what looks the same
        ("cafe\u0301 café", ["café", "café"]),
        ("ＡＢＣ１２ ｱｲ", ["abc12", "アイ"]),
        ("İstanbul'da", ["istanbul", "da"]),
        # as in bm25s
        ("Don't x naïve Ørsted m² 3.5", ["don", "naïve", "ørsted", "m²"]),
        ("Привет, мир и я", ["привет", "мир"]),
        ("\u2764\ufe0f 1\ufe0f\u20e3 yes", ["yes"]),
        ("", []),
    ],
)
def test_words_of_a_text(text: str, expected: list[str]) -> None:
    assert split(text) == expected


LATIN = st.characters(max_codepoint=0x2FF, exclude_characters="\u0130")
OTHERS = st.sampled_from("αβγДжяԱאב–—“”’…€²½ﬁ😀\u20ac")


@given(st.text(st.one_of(LATIN, OTHERS)))
def test_words_of_text_without_marks_are_the_plain_ones(text: str) -> None:
    """Of spaced scripts; so are those that come after anything that is special."""
    assert split(text) == split_plain(text)
    assert split(f"{text} ไ") == [*split_plain(text), "ไ"]


@given(st.text())
def test_any_text_has_words_and_no_more_characters_in_them_than_it_has(text: str) -> None:
    assert all(split(text))
    inside, visible = covered(text)
    assert 0 <= inside <= visible <= len(text)


def test_a_query_finds_what_stands_within_a_clause() -> None:
    clause = set(split("上海浦东国际机场位于浦东新区"))
    for query in ("浦东", "国际机场", "浦东新区"):
        assert set(split(query)) <= clause
        assert not set(split_plain(query)) & set(split_plain("上海浦东国际机场位于浦东新区"))


def test_the_length_of_a_passage_is_comparable_between_scripts() -> None:
    assert length("one two  three") == 3
    assert length("北京是首都。") == 1 + 5 / 2


def test_characters_that_stand_in_words() -> None:
    assert covered("two words, é") == (8, 10)
    assert covered("北京。") == (2, 3)
    assert covered("☃☃☃ x") == (0, 4)


def test_runs_are_as_they_stand() -> None:
    assert ["".join(run) for run in words.runs("東京タワーは333メートル Abc")] == [
        "東京タワーは",
        "メートル",
    ]
    assert list(words.runs("plain")) == []
    assert [list(run) for run in words.runs("กรุง")] == [["ก", "รุ", "ง"]]
