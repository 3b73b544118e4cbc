"""Fields of passages: labels are what many passages of an aspect have, values are names."""

import pytest

from ssp_jax.warm_start.fields import MIN_PASSAGES, Fields

HEIGHT = "highest point: Mount {} 812 m lowest point: Sea of {} -2 m mean height: 12 m"


def told(number: int) -> list[tuple[str, str]]:
    return [("Height", HEIGHT.format(f"A{i}", f"B{i}")) for i in range(number)]


def test_what_many_passages_write_before_a_colon_is_a_label():
    fields = Fields(told(MIN_PASSAGES))
    found = list(fields.of("Height", HEIGHT.format("Oak", "Ash")))
    assert found == [("highest point", "Mount Oak"), ("lowest point", "Sea of Ash")]
    assert list(fields.of("Depth", HEIGHT.format("Oak", "Ash"))) == []
    few = Fields(told(MIN_PASSAGES - 1))
    assert list(few.of("Height", HEIGHT.format("Oak", "Ash"))) == []


def test_a_label_that_says_nothing_alone_is_said_with_its_aspect():
    rows = [("Anthem(s)", f'title: "Song {i}" (old) name: Tune {i}, of old') for i in "abcdefgh"]
    found = list(Fields(rows).of("Anthem(s)", rows[0][1]))
    assert found == [("title of the anthem", "Song a"), ("anthem", "Tune a")]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Gulf of Oak 0 m", "Gulf of Oak"),
        ("Ambassador Dean R. Ash (since 2022)", "Ambassador Dean R. Ash"),
        ("1 May 1960 (from Oak)", "1 May 1960"),
        ("12 pieces, all small", None),
        ("mostly low hills; some sand", None),
        ("It was at first a part of Oak, then", None),
        ("Mount Oa", None),  # cut
    ],
)
def test_a_value_is_a_name_or_a_date_that_ends(text, value):
    assert list(Fields([]).of("Origin", text)) == ([("origin", value)] if value else [])


@pytest.mark.parametrize("aspect", ["Exports - partners", "Languages", "Of note"])
def test_what_makes_no_noun_is_left_out(aspect):
    assert list(Fields([]).of(aspect, "Mount Oak, Mount Ash")) == []
