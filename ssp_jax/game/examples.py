"""Worked examples: a pool of short games, for prompts of models that were never trained to play.

Each is a chain of facts, from which prompts.py makes the example of every role. Queries are bare
names, one thing at a time. Of a few fixed sets one is drawn for each game: a model copies what it
is shown, and of a single example it copies the names too (a 0.5B model did so in 8 of 16 games).
What the prompts of a set begin with is still computed once.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ssp_jax.data import Document


@dataclass(frozen=True)
class Example:
    """One question and all that the roles read, think and write about it."""

    question: str
    answer: str
    # What a search for the answer finds; it names the last of `found`.
    about_answer: Document
    # The solver's results, one a search; the last one has the answer, and names the first.
    found: tuple[Document, ...]
    needs: tuple[str, ...]  # the solver's thought before each search
    facts: tuple[str, ...]  # what each result says; the last fact has the answer
    noise: Document  # what a verifier reads beside it

    @property
    def searches(self) -> int:
        """That the question needs."""
        return len(self.found)

    @property
    def names(self) -> tuple[str, ...]:
        """What stands in no other game but by chance: titles, and the answer if it is no number."""
        titles = [query(document) for document in (self.about_answer, *self.found, self.noise)]
        answer = () if self.answer.isdigit() else (self.answer,)
        return tuple(dict.fromkeys((*titles, *answer)))


def query(document: Document) -> str:
    """The search that finds a document of an example: its title, a bare name."""
    return document.title.strip('"')


def leaks(
    turns: Iterable[tuple[str, str]], role: str, given: str, shown: Sequence[Example]
) -> bool:
    """Whether a player wrote a name of the shown examples that it had not read elsewhere.

    turns: author and text; those by `role` are the player's own. given: the task in its prompt.
    """
    names = [_words(name) for example in shown for name in example.names]
    read = _words(given)
    for author, text in turns:
        words = _words(text)
        if author == role and any(name in words and name not in read for name in names):
            return True
        read += words
    return False


def _words(text: str) -> str:
    """Lower-case words between single spaces, one at each end too: so names are found whole."""
    words = re.findall(r"\w+", text.casefold())
    return f" {' '.join(words)} "


def _document(title: str, text: str) -> Document:
    return Document(title, f'"{title}"', text)


def _one_search(
    question: str,
    answer: str,
    found: Document,
    need: str,
    fact: str,
    noise: Document,
    about_answer: Document | None = None,
) -> Example:
    """about_answer: None where a search for the answer finds the same."""
    about_answer = about_answer or found
    return Example(question, answer, about_answer, (found,), (need,), (fact,), noise)


_OKER = Example(
    question="Which river flows through the city where Louis Spohr was born?",
    answer="Oker",
    about_answer=_document(
        "Oker", "The Oker is a river in Lower Saxony. It flows through Braunschweig."
    ),
    found=(
        _document("Louis Spohr", "Louis Spohr was a composer, born in Braunschweig in 1784."),
        _document(
            "Braunschweig",
            "Braunschweig is a city on the river Oker. Louis Spohr was born there in 1784.",
        ),
    ),
    needs=("First I need the city where Louis Spohr was born.", "Which river is there?"),
    facts=("Louis Spohr was born in Braunschweig.", "Braunschweig lies on the Oker."),
    noise=_document("Balaton", "The Balaton is a shallow lake in the west of Hungary."),
)
_SELBY = Example(
    question="In which town was the chemist born who discovered osmium?",
    answer="Selby",
    about_answer=_document(
        "Selby", "Selby is a town in Yorkshire. The chemist Smithson Tennant was born there."
    ),
    found=(
        _document("Osmium", "Osmium is a dense metal, discovered by Smithson Tennant in 1803."),
        _document(
            "Smithson Tennant",
            "Smithson Tennant was a chemist from Selby in Yorkshire, who discovered osmium.",
        ),
    ),
    needs=("Who discovered osmium?", "Now I want to know where he was born."),
    facts=("Smithson Tennant discovered osmium.", "Smithson Tennant was born in Selby."),
    noise=_document("Whitby", "Whitby is a harbour on the coast of Yorkshire."),
)
_STANFORD = Example(
    question="Who taught the composer of the Brook Green Suite at the Royal College of Music?",
    answer="Charles Villiers Stanford",
    about_answer=_document(
        "Charles Villiers Stanford",
        "Charles Villiers Stanford taught Gustav Holst at the Royal College of Music.",
    ),
    found=(
        _document("Brook Green Suite", "The Brook Green Suite is a work by Gustav Holst."),
        _document(
            "Gustav Holst",
            "Gustav Holst was the composer of the Brook Green Suite. His teacher at the Royal "
            "College of Music was Charles Villiers Stanford.",
        ),
    ),
    needs=("I must know who composed the Brook Green Suite.", "Who was his teacher?"),
    facts=(
        "Gustav Holst composed the Brook Green Suite.",
        "Charles Villiers Stanford taught Gustav Holst.",
    ),
    noise=_document("Concertgebouw", "The Concertgebouw is a concert hall in Amsterdam."),
)
_PENTLAND = Example(
    question="Which strait lies between Scotland and the islands where Skara Brae was found?",
    answer="Pentland Firth",
    about_answer=_document(
        "Pentland Firth", "The Pentland Firth is the strait between Scotland and Orkney."
    ),
    found=(
        _document("Skara Brae", "Skara Brae is a village of the Stone Age in Orkney."),
        _document(
            "Orkney",
            "Orkney is a group of islands north of Scotland, behind the Pentland Firth. "
            "Skara Brae was found there.",
        ),
    ),
    needs=("On which islands was Skara Brae found?", "Then I look for their strait."),
    facts=(
        "Skara Brae was found in Orkney.",
        "The Pentland Firth lies between Scotland and Orkney.",
    ),
    noise=_document("Skagerrak", "The Skagerrak lies between Norway and Denmark."),
)
_MENAI = _one_search(
    question="In which year was the Menai Suspension Bridge opened?",
    answer="1826",
    found=_document(
        "Menai Suspension Bridge", "The Menai Suspension Bridge in Wales was opened in 1826."
    ),
    need="The page of the Menai Suspension Bridge should have the year.",
    fact="The Menai Suspension Bridge was opened in 1826.",
    noise=_document("Forth Bridge", "The Forth Bridge was opened in 1890."),
)
_PAXTON = _one_search(
    question="Who designed the Crystal Palace?",
    answer="Joseph Paxton",
    about_answer=_document(
        "Joseph Paxton", "Joseph Paxton was a gardener, who designed the Crystal Palace in 1850."
    ),
    found=_document(
        "Crystal Palace", "The Crystal Palace was a hall of glass, designed by Joseph Paxton."
    ),
    need="I look up the Crystal Palace.",
    fact="Joseph Paxton designed the Crystal Palace.",
    noise=_document("Decimus Burton", "Decimus Burton designed a palm house in Kew."),
)
_OKAPI = _one_search(
    question="To which family of animals does the okapi belong?",
    answer="Giraffidae",
    about_answer=_document(
        "Giraffidae", "The Giraffidae are a family of animals: the giraffes and the okapi."
    ),
    found=_document("Okapi", "The okapi is an animal of the Congo, of the family Giraffidae."),
    need="What is known about the okapi?",
    fact="The okapi belongs to the Giraffidae.",
    noise=_document("Gerenuk", "The gerenuk is an antelope, of the family Bovidae."),
)
_HALL = _one_search(
    question="Which astronomer discovered Phobos?",
    answer="Asaph Hall",
    about_answer=_document(
        "Asaph Hall", "Asaph Hall was an astronomer in Washington. He discovered Phobos in 1877."
    ),
    found=_document("Phobos", "Phobos is a moon of Mars, discovered by Asaph Hall in 1877."),
    need="Phobos is a moon, so its page should name the astronomer.",
    fact="Asaph Hall discovered Phobos.",
    noise=_document("Hyperion", "Hyperion is a moon that William Bond discovered in 1848."),
)
_OLBERS = Example(
    question="In which city did the discoverer of the asteroid Vesta work as a physician?",
    answer="Bremen",
    about_answer=_document(
        "Bremen", "Bremen is a city on the Weser. Heinrich Olbers worked there as a physician."
    ),
    found=(
        _document("Vesta", "Vesta is an asteroid. Heinrich Olbers discovered it in 1807."),
        _document(
            "Heinrich Olbers",
            "Heinrich Olbers, a physician in Bremen, discovered the asteroid Vesta.",
        ),
    ),
    needs=("The discoverer of Vesta comes first.", "Next: the city where he was a physician."),
    facts=("Heinrich Olbers discovered Vesta.", "Heinrich Olbers was a physician in Bremen."),
    noise=_document("Pallas", "Pallas is an asteroid between Mars and Jupiter."),
)
_GARDON = _one_search(
    question="Which river does the Pont du Gard cross?",
    answer="Gardon",
    about_answer=_document("Gardon", "The Gardon is a river in France, below the Pont du Gard."),
    found=_document("Pont du Gard", "The Pont du Gard is a Roman aqueduct across the Gardon."),
    need="I search for the Pont du Gard.",
    fact="The Pont du Gard crosses the Gardon.",
    noise=_document("Aqua Claudia", "The Aqua Claudia was an aqueduct of Rome."),
)
_UNDSET = Example(
    question="In which year did the author of Kristin Lavransdatter win the Nobel Prize?",
    answer="1928",
    about_answer=_document(
        "Nobel Prize in Literature", "Sigrid Undset won the Nobel Prize in Literature in 1928."
    ),
    found=(
        _document("Kristin Lavransdatter", "Kristin Lavransdatter is a novel by Sigrid Undset."),
        _document(
            "Sigrid Undset",
            "Sigrid Undset wrote Kristin Lavransdatter and won the Nobel Prize in 1928.",
        ),
    ),
    needs=("I start with the author of Kristin Lavransdatter.", "When did she win the prize?"),
    facts=(
        "Sigrid Undset wrote Kristin Lavransdatter.",
        "Sigrid Undset won the Nobel Prize in 1928.",
    ),
    noise=_document("Halldis Moren Vesaas", "Halldis Moren Vesaas was a poet, born in 1907."),
)
_TACOMA = _one_search(
    question="In which year did the first Tacoma Narrows Bridge collapse?",
    answer="1940",
    found=_document(
        "Tacoma Narrows Bridge", "The first Tacoma Narrows Bridge collapsed in the wind in 1940."
    ),
    need="The year is asked for, so I read about the Tacoma Narrows Bridge.",
    fact="The first Tacoma Narrows Bridge collapsed in 1940.",
    noise=_document("Humber Bridge", "The Humber Bridge was opened in 1981."),
)

# So that each set has one question of two searches, then one of one search, then either.
EXAMPLES = (
    *(_OKER, _SELBY, _STANFORD, _PENTLAND),
    *(_MENAI, _PAXTON, _OKAPI, _HALL),
    *(_OLBERS, _GARDON, _UNDSET, _TACOMA),
)
# Few: each set's prompts begin with tokens of their own, which take time and memory once.
SETS = 4
MOST = len(EXAMPLES) // SETS  # in a set


def example_sets(number: int) -> tuple[tuple[Example, ...], ...]:
    """The fixed sets of so many examples, of which each game is shown one. No two share any."""
    if number == 0:
        return ((),)
    return tuple(EXAMPLES[first::SETS][:number] for first in range(SETS))
