"""Chat templates: a prompt holds what was put in, whatever the template does; a template ends in
bounded time.
"""

import threading
import time

import pytest

from ssp_jax.errors import InputError
from ssp_jax.game import chat, prompts
from ssp_jax.game.examples import example_sets
from tests.tokenizer_kinds import CHATML, KINDS

# As Qwen3's: of earlier assistant turns only what follows the thoughts.
CUTS = CHATML.replace(
    "m['content']",
    "(m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'])",
)
# As Qwen3's for a last assistant turn: thoughts are put into a form of their own.
REFORMS = CHATML.replace("m['content']", "m['content'].replace('</think> ', '</think>\n\n')")
TRIMS = CHATML.replace("m['content']", "(m['content'] | trim)")
SYSTEM_LAST = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% elif loop.last %}[{{ ns.system }} {{ m['content'] }}]"
    "{% else %}[{{ m['content'] }}]{% endif %}{% endfor %}"
)
PLAYED = [
    {"role": "system", "content": "Be brief. \n"},
    {"role": "user", "content": "Who?"},
    {
        "role": "assistant",
        "content": "<think> a </think> <search> b </search>\n<think> c </think>\n<answer> d",
    },
    {"role": "user", "content": " user "},
]


@pytest.fixture
def tokenizer():
    return KINDS["byte_level"]()


def rendered(tokenizer, template, messages=PLAYED):
    tokenizer.chat_template = template
    return chat.render_chat(tokenizer, messages)


@pytest.mark.parametrize("template", [CHATML, TRIMS, REFORMS, SYSTEM_LAST])
def test_what_a_template_makes_stays_where_all_is_in_it(tokenizer, template):
    tokenizer.chat_template = template
    own = tokenizer.apply_chat_template(PLAYED, add_generation_prompt=True, tokenize=False)
    assert chat.render_chat(tokenizer, PLAYED) == own


def test_a_template_that_cuts_thoughts_cuts_none_here(tokenizer):
    assert rendered(tokenizer, CUTS) == rendered(tokenizer, CHATML)


@pytest.mark.parametrize("name", sorted(prompts.STYLES))
def test_worked_examples_keep_their_searches_with_such_a_template(tokenizer, name):
    style = prompts.STYLES[name]
    shown = example_sets(1)[0]
    for messages in (
        prompts.solver_messages(style, "Who?", shown),
        prompts.proposer_messages(style, "Paris", 2, "", shown),
    ):
        text = rendered(tokenizer, CUTS, messages)
        assert (
            all(message["content"].strip() in text for message in messages)
            and text.count("</search>") >= 2
        )


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (
            "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['content'] }}]{% endif %}"
            "{% endfor %}",
            "1 of 4",
        ),
        (
            "{% for m in messages %}{% if not loop.last %}[{{ m['content'] }}]{% endif %}"
            "{% endfor %}",
            "4 of 4",
        ),
        ("{% for m in messages[::-1] %}[{{ m['content'] }}]{% endfor %}", "3 of 4"),
        ("{% for m in messages %}[{{ m['content'][:3] }}]{% endfor %}", "1 of 4"),
        # "user" stands there, but it is not the message
        ("[{{ messages[0]['content'] }}]user", "2 of 4"),
    ],
)
def test_a_template_that_drops_a_message_is_refused(tokenizer, template, lost):
    with pytest.raises(InputError, match=f"drops message {lost}"):
        rendered(tokenizer, template)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% import 'os' as os %}", "cannot be read|refuses"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for m in messages %}", "refuses these messages"),
        ("{{ messages[0].nothing.at.all }}", "refuses these messages"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        ("{{ messages | join(5) + 5 }}", "TypeError"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 3 s",
        ),
        ("{{ 'a' * 10 ** 11 }}", "takes more than 3 s"),
        (
            {"rag": CHATML, "tool_use": CHATML},
            "templates named 'rag', 'tool_use', and none named \"default\"",
        ),
        ({}, "has no chat template"),
        ("", "has no chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(tokenizer, template, said):
    begin = time.monotonic()
    with pytest.raises(InputError, match=said):
        rendered(tokenizer, template)
    assert time.monotonic() - begin < chat.PROBE_SECONDS + 10


def test_of_several_templates_the_default_is_taken(tokenizer):
    assert rendered(tokenizer, {"rag": "{{ 1 / 0 }}", "default": CHATML}) == rendered(
        tokenizer, CHATML
    )


def test_bounds_hold_in_other_threads_too(tokenizer):
    """An alarm would need the main thread."""
    found = []

    def play():
        try:
            rendered(tokenizer, "{{ 9 ** 999999999 }}")
        except InputError as error:
            found.append(str(error))

    thread = threading.Thread(target=play)
    thread.start()
    thread.join()
    assert len(found) == 1 and "takes more than" in found[0]


@pytest.mark.parametrize(
    ("template", "tame"),
    [
        (CHATML, True),
        (CUTS, True),
        (
            "{% for m in messages %}{{ loop.index0 % 2 }}{% for t in m.calls %}{{ t }}{% endfor %}"
            "{% endfor %}",
            True,
        ),
        # Qwen3's has one
        ("{% for a in range(messages | length, -1, -1) %}{{ messages[a] }}{% endfor %}", True),
        ("{% for a in range(9) %}{% for b in range(9) %}{% endfor %}{% endfor %}", False),
        ("{% for a in messages %}{% for b in range(9) %}{% endfor %}{% endfor %}", False),
        ("{{ range(9) | join }}", False),
        (
            "{% for a in x %}{% for b in x %}{% for c in x %}{% endfor %}{% endfor %}{% endfor %}",
            False,
        ),
        (
            "{% set ns = namespace(x='a') %}{% for m in messages %}{% set ns.x = ns.x + ns.x %}"
            "{% endfor %}",
            False,
        ),
        ("{% macro f() %}{% endmacro %}", False),
        ("{{ 'a' | center(99) }}", False),
        ("{{ '{:>999999}'.format(1) }}", False),
        ("{{ lipsum() }}", False),
        ("{{ 100000 }}", False),
        ("{{ '%99999999999d' % 1 }}", False),
        ("{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", False),
        # only transformers knows it; it may still be used
        ("{% generation %}{% endgeneration %}", False),
    ],
)
def test_only_simple_templates_are_believed(template, tame):
    assert chat._is_tame(template) == tame


def test_a_template_that_is_not_simple_but_ends_is_used(tokenizer):
    macro = "{% macro say(m) %}<{{ m['content'] }}>{% endmacro %}"
    macro += "{% for m in messages %}{{ say(m) }}{% endfor %}"
    assert rendered(tokenizer, macro, PLAYED[1:2]) == "<Who?>"
