"""Text and Markdown files become passages that end where sentences do, titled by headings."""

import gzip
import re
from pathlib import Path

import pytest

from ssp_jax.corpus import passages, words
from ssp_jax.corpus.passages import read_passages
from ssp_jax.data import Document, Position
from ssp_jax.errors import InputError

SENTENCE = "The quick brown fox jumps over the lazy dog once more today."  # 12 words


def passages_of(folder: Path, name: str, text: str | bytes) -> list[Document]:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_passages(path))


def titles_and_texts(documents: list[Document]) -> list[tuple[str, str]]:
    return [(document.title, document.text) for document in documents]


@pytest.mark.parametrize("sentences", [1, 6, 9, 30, 100])
def test_passages_have_about_a_hundred_words_and_whole_sentences(
    tmp_path: Path, sentences: int
) -> None:
    paragraph = " ".join([SENTENCE] * sentences)
    found = passages_of(tmp_path, "a.txt", f"{paragraph}\n\n{paragraph}\n")
    counts = [len(document.text.split()) for document in found]
    assert sum(counts) == 24 * sentences
    assert all(document.text.endswith("today.") for document in found)
    assert all(80 <= count <= 150 for count in counts) or len(found) == 1
    assert [document.id for document in found] == [f"a.txt#{n + 1}" for n in range(len(found))]


def test_a_passage_ends_with_its_paragraph_where_it_is_long_enough(tmp_path: Path) -> None:
    short = " ".join([SENTENCE] * 7)
    found = passages_of(tmp_path, "a.txt", "\n\n".join([short] * 3))
    assert [document.text for document in found] == [short] * 3


def test_what_has_no_end_of_a_sentence_is_cut_all_the_same(tmp_path: Path) -> None:
    for text in ("word " * 1000, "北" * 3000, "กรุงเทพ" * 500, "x" * 5000):
        found = passages_of(tmp_path, "a.txt", text)
        assert re.sub(r"\s", "", "".join(d.text for d in found)) == text.replace(" ", "")
        assert all(words.length(d.text) <= 150 and len(d.text) <= 1500 for d in found)
    chinese = passages_of(tmp_path, "zh.txt", "北京是中国的首都，人口很多。" * 60)
    assert len(chinese) > 3 and all(d.text.endswith("。") for d in chinese)


MARKDOWN = """\
---
author: x
title: "The handbook"
---
Before all headings.

# Acme Robotics #
We make **robots**, see [the site](https://x.y/z).
They `walk`.
<!-- not this -->

## Offices
### Zurich
Opened in
1999.

- one
- *two*

| city | year |
|---|---|
| Bern | 2001 |

```python
# no heading
```
Second
------
Under a line.

Third
===
The end.
"""


def test_markdown_gives_titles_and_loses_its_marks(tmp_path: Path) -> None:
    assert titles_and_texts(passages_of(tmp_path, "a-file.md", MARKDOWN)) == [
        ("The handbook", "Before all headings."),
        ("Acme Robotics", "We make robots, see the site. They walk."),
        (
            "Acme Robotics: Zurich",
            "Opened in 1999.\n- one\n- two\n| city | year |\n| Bern | 2001 |\n# no heading",
        ),
        ("Acme Robotics: Second", "Under a line."),
        ("Third", "The end."),
    ]


def test_without_headings_the_name_of_the_file_is_the_title(tmp_path: Path) -> None:
    for name, title in (
        ("parental-leave_2024-03.txt", "parental leave 2024-03"),
        ("Deep/Notes.md.gz", "Notes"),
        ("年报.txt", "年报"),
    ):
        text = b"One sentence.\n"
        packed = gzip.compress(text) if name.endswith(".gz") else text
        assert titles_and_texts(passages_of(tmp_path, name, packed)) == [(title, "One sentence.")]
    below = passages_of(tmp_path, "faq.md", "## Who?\nAll of us.\n")
    assert titles_and_texts(below) == [("faq: Who?", "All of us.")]


def test_chinese_lines_are_joined_without_a_space(tmp_path: Path) -> None:
    (found,) = passages_of(tmp_path, "a.txt", "北京是中国的\n首都。Two\nwords")
    assert found.text == "北京是中国的首都。Two words"


def test_a_rule_that_begins_a_file_is_no_front_matter_without_an_end(tmp_path: Path) -> None:
    found = passages_of(tmp_path, "a.md", "---\nOne.\n\nTwo.\n")
    assert [document.text for document in found] == ["One.\nTwo."]


def folder_of(place: Path) -> Path:
    for name, text in (("b.md", "# B\nBee."), ("a/x.txt", "Ex."), ("a.txt", "Ay."), ("c.txt", "")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    for name in ("pic.png", "pic2.png", "x.pdf", ".hidden.txt", ".git/x.md"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("nothing")
    return place


def test_a_folder_is_its_text_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "docs")
    position = Position()
    found = list(read_passages(folder, position))
    assert [document.id for document in found] == ["a.txt#1", "a/x.txt#1", "b.md#1"]
    assert position.sha256.hexdigest() == passages.digest(folder)
    assert position.bytes == passages.stamp(folder)["size"] == 14
    assert passages.left_out(folder).endswith("left out: 2 .png, 1 .pdf")
    assert passages.left_out(folder / "a.txt") == ""


def test_a_change_of_a_folder_is_seen(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "docs")
    seen = {passages.digest(folder)}
    (folder / "new.png").write_text("more")
    (folder / ".hidden.md").write_text("more")
    assert passages.digest(folder) in seen
    stamps = [passages.stamp(folder)]
    for change in (
        lambda: (folder / "a.txt").write_text("Oy."),
        lambda: (folder / "b.md").rename(folder / "bb.md"),
        lambda: (folder / "bb.md").unlink(),
    ):
        change()
        seen.add(passages.digest(folder))
        stamps.append(passages.stamp(folder))
    assert len(seen) == 4 and all(a != b for a, b in zip(stamps, stamps[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"good\n\xff\xfe\xff\n", r"docs/a\.txt line 2: expected UTF-8 text"),
        ("a.md", b"good\nba\0d\n", r"docs/a\.md line 2: expected UTF-8 text, found NUL"),
        ("a.md.gz", b"# no gzip", r"docs/a\.md\.gz after line 0: expected a whole gzip file"),
        ("a.pdf", b"%PDF", r"docs: expected a folder with .txt or .md files, .*; found 1 \.pdf"),
        ("b\udcff.txt", b"text", r"docs: expected names of files in UTF-8, found 'b\\udcff.txt'"),
    ],
)
def test_a_fault_in_a_folder_is_one_sentence_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        list(read_passages(tmp_path / "docs"))
