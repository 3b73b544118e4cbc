"""The common form of the real and the invented worlds: countries, facts, passages, questions.

Nothing here is about a language model or a retriever. A fact is (country, relation, value);
relation "city" may hold several values, "borders" and "continent" are only there to be found by
mistake. A question starts from something named in it and ends at an answer; when neither end is the
country, the country is the bridge that has to be found first.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ssp_jax.data import Document

# one value a country; these can be asked for
VALUE_RELATIONS = ("capital", "currency", "language", "domain", "code")
START_RELATIONS = (*VALUE_RELATIONS, "city")  # a value of these can lead to the country

# {c} country, {v} value. Each text holds the word by which a search can ask for its relation. Facts
# about a country have its name as their title, so that it counts the same in a search for any of
# them.
PASSAGES = {
    "capital": (
        "The capital of {c} is {v}.",
        "{v} is the capital city of {c}.",
        "{c} is governed from its capital, {v}.",
        "{v} has long been the capital of {c}.",
    ),
    "currency": (
        "The currency of {c} is the {v}.",
        "The {v} is the currency of {c}.",
        "In {c} goods are paid for in the local currency, the {v}.",
    ),
    "language": (
        "The main language of {c} is {v}.",
        "{v} is the main language of {c}.",
        "In {c} the language most often heard is {v}.",
    ),
    "domain": (
        "The internet domain of {c} is {v} on all networks.",
        "{c} has the internet domain {v} for its pages.",
        "Addresses in {c} carry the internet domain {v} at the end.",
    ),
    "code": (
        "The calling code of {c} is {v}.",
        "{c} has the calling code {v} for its telephones.",
        "Calls from abroad to {c} begin with the calling code {v}.",
    ),
    "continent": (
        "{c} is a country in {v}.",
        "The country of {c} lies in {v}.",
        "On the map {c} is found in {v}.",
    ),
    "borders": (
        "{c} shares a border with {v}.",
        "The neighbours of {c} include {v}.",
        "On the map {c} lies next to {v}.",
    ),
    "city": (
        "{v} is a place in {c}.",
        "{v} lies within the borders of {c}.",
        "Among the larger places in {c} is {v}.",
        "{v} is a well known place in {c}.",
    ),
}

# {c} is a country's name or, in a two-hop question, a description of it.
VALUE_QUESTIONS = {
    "capital": (
        "What is the capital of {c}?",
        "Which city is the capital of {c}?",
        "In which city does the government of {c} sit?",
    ),
    "currency": (
        "What is the currency of {c}?",
        "Which currency does one need in {c}?",
        "What money do people spend in {c}?",
    ),
    "language": (
        "What is the main language of {c}?",
        "Which language is mostly used in {c}?",
        "What do most people speak in {c}?",
    ),
    "domain": (
        "What is the internet domain of {c}?",
        "Which internet domain belongs to {c}?",
        "What do web sites from {c} end with?",
    ),
    "code": (
        "What is the calling code of {c}?",
        "Which calling code belongs to {c}?",
        "Which number does one dial first to phone {c}?",
    ),
}
COUNTRY_QUESTIONS = {
    "capital": (
        "Which country has the capital {v}?",
        "{v} is the capital of which country?",
        "Which country is run from {v}?",
    ),
    "currency": (
        "Which country uses the {v}?",
        "The {v} is the currency of which country?",
        "Where do people spend the {v}?",
    ),
    "language": (
        "In which country is {v} the main language?",
        "Which country has the main language {v}?",
        "Where do most people speak {v}?",
    ),
    "domain": (
        "Which country has the internet domain {v}?",
        "{v} is the internet domain of which country?",
        "Where are web sites that end with {v} from?",
    ),
    "code": (
        "Which country has the calling code {v}?",
        "{v} is the calling code of which country?",
        "Where does one call by dialling {v} first?",
    ),
    "city": (
        "In which country is {v}?",
        "Which country does {v} belong to?",
        "Where does one find {v}?",
    ),
}
BRIDGES = {
    "capital": (
        "the country with the capital {v}",
        "the country whose capital is {v}",
        "the country run from {v}",
    ),
    "currency": (
        "the country that uses the {v}",
        "the country with the currency {v}",
        "the place where people spend the {v}",
    ),
    "language": (
        "the country with the main language {v}",
        "the country whose main language is {v}",
        "the place where most people speak {v}",
    ),
    "domain": (
        "the country with the internet domain {v}",
        "the country whose internet domain is {v}",
        "the place where web sites end with {v}",
    ),
    "code": (
        "the country with the calling code {v}",
        "the country whose calling code is {v}",
        "the place where phone numbers start with {v}",
    ),
    "city": (
        "the country where {v} lies",
        "the country that {v} belongs to",
        "the place where one finds {v}",
    ),
}

# Two letters that a search throws away as English words, so that nothing can be found by them.
STOPWORD_DOMAINS = frozenset(
    ["as", "at", "be", "by", "if", "in", "is", "it", "no", "of", "on", "or", "to"]
)


@dataclass(frozen=True)
class Country:
    """Empty text means that the world does not say."""

    name: str
    capital: str
    currency: str
    language: str
    domain: str
    code: str
    continent: str
    cities: tuple[str, ...]
    neighbours: tuple[str, ...] = ()

    def values(self, relation: str) -> tuple[str, ...]:
        if relation == "city":
            return self.cities
        if relation == "borders":
            return (" and ".join(self.neighbours),) if self.neighbours else ()
        value = getattr(self, relation)
        return (value,) if value else ()


@dataclass(frozen=True)
class Passage:
    """A document and the fact it states."""

    document: Document
    country: str
    relation: str
    value: str


@dataclass(frozen=True)
class Question:
    """A question about `country`.

    start: relation of the named value to it, or "country" if the country itself is named. target:
    relation of the answer to it, or "country".
    """

    text: str
    answer: str
    country: str
    start: str
    start_value: str
    target: str

    @property
    def hops(self) -> int:
        return 1 if "country" in (self.start, self.target) else 2


@dataclass(frozen=True)
class World:
    countries: tuple[Country, ...]

    @cached_property
    def by_name(self) -> dict[str, Country]:
        return {country.name: country for country in self.countries}

    @cached_property
    def owners(self) -> dict[tuple[str, str], list[str]]:
        """(relation, value) -> names of the countries that have it."""
        found: dict[tuple[str, str], list[str]] = {}
        for country in self.countries:
            for relation in START_RELATIONS:
                for value in country.values(relation):
                    found.setdefault((relation, value), []).append(country.name)
        return found

    def leads(self, relation: str, value: str) -> bool:
        """Whether the value can stand for its country: one owner, found by search, no giveaway."""
        owners = self.owners.get((relation, value), [])
        return len(owners) == 1 and searchable(value) and not similar(value, owners[0])


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def similar(first: str, second: str) -> bool:
    """Whether a word of one name begins like a word of the other, or is inside it."""
    pairs = ((a, b) for a in words(first) for b in words(second))
    return any(
        a == b or (min(len(a), len(b)) >= 4 and (a[:4] == b[:4] or a in b or b in a))
        for a, b in pairs
    )


def searchable(value: str) -> bool:
    """A search index drops single characters and stop words."""
    return any(len(word) > 1 and word not in STOPWORD_DOMAINS for word in words(value))


def passages(world: World, rng: random.Random) -> list[Passage]:
    """One passage a fact, in random phrasing and order; document ids count from 0 in that order."""
    drafts = []
    for country in world.countries:
        for relation in PASSAGES:
            for value in country.values(relation):
                text = rng.choice(PASSAGES[relation]).format(c=country.name, v=value)
                title = value if relation == "city" else country.name
                drafts.append((title, text, country.name, relation, value))
    rng.shuffle(drafts)
    return [
        Passage(Document(id=str(row), title=f'"{title}"', text=text), country, relation, value)
        for row, (title, text, country, relation, value) in enumerate(drafts)
    ]


def value_question(country: Country, target: str, rng: random.Random) -> Question:
    text = rng.choice(VALUE_QUESTIONS[target]).format(c=country.name)
    return Question(text, country.values(target)[0], country.name, "country", country.name, target)


def country_question(country: Country, start: str, value: str, rng: random.Random) -> Question:
    text = rng.choice(COUNTRY_QUESTIONS[start]).format(v=value)
    return Question(text, country.name, country.name, start, value, "country")


def bridge_question(
    country: Country, start: str, value: str, target: str, rng: random.Random
) -> Question:
    bridge = rng.choice(BRIDGES[start]).format(v=value)
    text = rng.choice(VALUE_QUESTIONS[target]).format(c=bridge)
    return Question(text, country.values(target)[0], country.name, start, value, target)


def one_hop_questions(world: World, country: Country, rng: random.Random) -> list[Question]:
    """Every fair question with one link about a country: its wording does not reveal the answer."""
    forward = [
        value_question(country, target, rng)
        for target in VALUE_RELATIONS
        for value in country.values(target)
        if not similar(value, country.name)
    ]
    return forward + [country_question(country, *start, rng) for start in starts(world, country)]


def two_hop_questions(world: World, country: Country, rng: random.Random) -> list[Question]:
    return [
        bridge_question(country, *start, target, rng)
        for start in starts(world, country)
        for target in VALUE_RELATIONS
        for value in country.values(target)
        if target != start[0] and not similar(value, start[1])
    ]


def starts(world: World, country: Country) -> list[tuple[str, str]]:
    """The (relation, value) pairs that can stand for the country."""
    return [(r, v) for r in START_RELATIONS for v in country.values(r) if world.leads(r, v)]


@lru_cache(maxsize=1)
def template_words() -> frozenset[str]:
    """All words of the templates and prompts: an invented name must not be one of them."""
    prompts = {"prompts": ("Question Write a question Searches Answer Doc Title",)}
    tables = (prompts, PASSAGES, VALUE_QUESTIONS, COUNTRY_QUESTIONS, BRIDGES)
    return frozenset(
        word
        for table in tables
        for texts in table.values()
        for text in texts
        for word in words(text)
    )


@dataclass(frozen=True)
class Pieces:
    """Pieces of a tokenizer's vocabulary for invented names, and the words to avoid."""

    starts: tuple[str, ...]  # begin a capitalised word
    endings: tuple[str, ...]  # go on inside one
    taken: frozenset[str]  # lower-case words of real names and of the templates


def vocabulary_pieces(vocabulary: Iterable[str], real_words: Iterable[str]) -> Pieces:
    """From the tokens of a byte-level BPE, where "Ġ" stands for the space before a word.

    Start pieces include whole real names (only ever used with an ending), so that each token of a
    real name is trained on.
    """
    tokens = sorted(vocabulary)
    common = template_words()
    begins = [
        t[1:] for t in tokens if re.fullmatch("Ġ[A-Z][a-z]*", t) and t[1:].lower() not in common
    ]
    endings = [t for t in tokens if re.fullmatch("[a-z]{1,9}", t) and t not in common]
    return Pieces(tuple(begins), tuple(endings), common | frozenset(real_words))


def _invent_word(rng: random.Random, pieces: Pieces) -> str:
    while True:
        count = rng.choices((0, 1, 2), (3, 5, 2))[0]
        word = rng.choice(pieces.starts) + "".join(rng.choice(pieces.endings) for _ in range(count))
        if 3 <= len(word) <= 16 and word.lower() not in pieces.taken:
            return word


def make_invented_world(
    rng: random.Random, pieces: Pieces, num_countries: int = 20, num_cities: int = 7
) -> World:
    """A world of random names: nothing in it can be known, everything has to be read and copied."""
    used: set[str] = set()

    def name(two_words: float = 0.15) -> str:
        while True:
            parts = [_invent_word(rng, pieces) for _ in range(2 if rng.random() < two_words else 1)]
            if not used & {part.lower() for part in parts}:
                used.update(part.lower() for part in parts)
                return ("-" if rng.random() < 0.2 else " ").join(parts)

    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [a + b for a in letters for b in letters if a + b not in STOPWORD_DOMAINS]
    domains = rng.sample(pairs, num_countries)
    codes = rng.sample(range(20, 1000), num_countries)
    continents = [name(0.0) for _ in range(4)]
    coins = [name(0.0) for _ in range(3)]
    shared_currencies, shared_languages = [name() for _ in range(2)], [name(0.0) for _ in range(3)]
    names = [name() for _ in range(num_countries)]
    countries = []
    for row, own in enumerate(names):
        coin = name(0.0) if rng.random() < 0.5 else f"{name(0.0)} {rng.choice(coins)}"
        countries.append(
            Country(
                name=own,
                capital=name(),
                currency=rng.choice(shared_currencies) if rng.random() < 0.25 else coin,
                language=rng.choice(shared_languages) if rng.random() < 0.4 else name(0.0),
                domain="." + domains[row],
                code=str(codes[row]),
                continent=rng.choice(continents),
                cities=tuple(name() for _ in range(rng.randint(num_cities - 2, num_cities))),
                neighbours=tuple(rng.sample([n for n in names if n != own], rng.randint(0, 3))),
            )
        )
    return World(tuple(countries))
