"""Messages → token ids of a prompt, by the tokenizer's chat template or the reference's raw ChatML.

A chat template is a program that comes with the model. It may fail, run for ever, or drop parts of
the messages: those of Qwen3 and R1 cut <think> out of earlier assistant turns. Here it ends in
bounded time, its failures are one sentence, and a prompt holds every message.
"""

import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from ssp_jax.errors import InputError, reading
from ssp_jax.model import tokens

Message = dict[str, Any]  # "role" and "content", and other keys that a template knows

# Bounds of the process that plays a template: a usual one takes a millisecond of it.
PROBE_CPU_SECONDS = 3
PROBE_BYTES = 4 << 30  # of address space, most of it the interpreter's
PROBE_SECONDS = 120.0  # with the start of the interpreter, on a busy machine
# A template within these bounds is tame: it needs no such process.
TAME_LOOPS = 2  # nested ones
TAME_NUMBER = 10_000


def encode_prompt(tokenizer: Any, messages: Sequence[Message], template: str) -> list[int]:
    """Token ids of a prompt that ends where the assistant begins.

    template: "chat" uses the tokenizer's own Jinja template; "raw_chatml" is the SSP reference's
    form, which writes no <|im_end|> between turns (models trained with it exist).
    """
    if template not in ("chat", "raw_chatml"):
        raise InputError(
            f'config key prompt.template is {template!r}; expected "chat" or "raw_chatml"'
        )
    spelled = tokens.Spelled(tokenizer)
    marked = spelled.mark(list(messages))
    text = render_chat(tokenizer, marked) if template == "chat" else _raw_chatml(tokenizer, marked)
    return spelled.encode(tokenizer, text)


def _raw_chatml(tokenizer: Any, messages: Sequence[Message]) -> str:
    if "<|im_start|>" not in tokenizer.get_vocab():
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} lacks <|im_start|>, which "
            "prompt.template=raw_chatml needs"
        )
    turns = [f"<|im_start|>{message['role']}\n{message['content']}" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


# --- contents: a prompt holds every message ---


def render_chat(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The template's text of the messages, with every content in it. InputError if one is lost.

    The template also renders marks in place of the contents, which it cannot tell apart. Where that
    gives another text, the template has changed a content. Its text stays if only spaces differ;
    else the marks are replaced by the unchanged contents.
    """
    source = _checked_source(tokenizer)
    text = _render(tokenizer, messages)
    contents = [message["content"].strip() for message in messages]
    roles = [message["role"] for message in messages]
    marks = [tokens.new_mark(i) if content else "" for i, content in enumerate(contents)]
    outline = _outline(tokenizer, source, messages, marks)
    lost = _missing(roles, marks, outline)
    filled = outline
    for mark, content in zip(marks, contents, strict=True):
        if mark:
            filled = filled.replace(mark, content)
    if lost is None and filled == text:
        return text
    without_spaces = ["".join(content.split()) for content in contents]
    if _missing(roles, without_spaces, "".join(text.split())) is None:
        return text
    if lost is None:
        return filled
    raise InputError(
        f"the chat template of {tokenizer.name_or_path!r} drops message {lost + 1} of "
        f"{len(messages)} ({roles[lost]}: {contents[lost][:60]!r}) or moves it; expected a "
        "template that keeps all of them in order, or prompt.template=raw_chatml"
    )


def _missing(roles: Sequence[str], contents: Sequence[str], text: str) -> int | None:
    """The index of the first content that the text does not have after those before it.

    The system turn may stand anywhere: some templates put it into the last user turn.
    """
    position = 0
    for i, (role, content) in enumerate(zip(roles, contents, strict=True)):
        found = text.find(content, 0 if role == "system" else position)
        if found < 0:
            return i
        if role != "system":
            position = found + len(content)
    return None


def _outline(tokenizer: Any, source: str, messages: Sequence[Message], marks: Sequence[str]) -> str:
    """The template's text with marks for contents; "" where it refuses the marks.

    The spaces around the contents stay, for many templates trim them.
    """
    changed = []
    for message, mark in zip(messages, marks, strict=True):
        content = message["content"]
        stripped = content.strip()
        begin = content.find(stripped) if stripped else len(content)
        spaces = (content[:begin], content[begin + len(stripped) :])
        changed.append({**message, "content": mark.join(spaces)})
    try:
        return _outline_of(tokenizer, source, json.dumps(changed))
    except InputError:
        return ""


@functools.lru_cache(maxsize=64)
def _outline_of(tokenizer: Any, source: str, messages: str) -> str:
    """Cached: the prompts of a run have a handful of outlines. source is part of the key only."""
    return _render(tokenizer, json.loads(messages))


# --- time: a template ends ---


def _checked_source(tokenizer: Any) -> str:
    """The source of the template. InputError where there is none, or one that runs for long."""
    name = tokenizer.name_or_path
    source = tokens.template_of(tokenizer)
    if source and isinstance(source, dict):
        names = ", ".join(map(repr, sorted(source)))
        raise InputError(
            f'tokenizer {name!r} has chat templates named {names}, and none named "default"; '
            "expected one, or prompt.template=raw_chatml"
        )
    if not isinstance(source, str) or not source:
        raise InputError(
            f"tokenizer {name!r} has no chat template; expected one, or prompt.template=raw_chatml"
        )
    if not _is_bounded(source):
        raise InputError(
            f"the chat template of {name!r} takes more than {PROBE_CPU_SECONDS} s or "
            f"{PROBE_BYTES >> 30} GiB for a short chat; expected one that ends at once, or "
            "prompt.template=raw_chatml"
        )
    return source


def _render(tokenizer: Any, messages: Sequence[Message]) -> str:
    place = f"the chat template of {tokenizer.name_or_path!r}"
    with reading(place):
        try:
            text: str = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:  # a template also refuses an order of roles so
            raise InputError(f"{place} refuses these messages: {error}") from None
    return tokens.whole(text)


@functools.lru_cache(maxsize=8)
def _is_bounded(source: str) -> bool:
    """Whether a template ends soon. One that is not tame is played once in a process of its own.

    The system ends that process: no alarm of Python reaches into one long multiplication.
    """
    return _is_tame(source) or _probe(source)


_UNTAME_NODES = (nodes.Pow, nodes.Mul, nodes.Macro, nodes.CallBlock)
_UNTAME_CALLS = frozenset(
    ("range", "lipsum", "cycler", "joiner", "format", "ljust", "rjust", "zfill", "center")
    + ("expandtabs", "wordwrap", "indent", "batch", "slice")
)


def _is_tame(source: str) -> bool:
    """Whether a template has only a few loops over its inputs, and nothing that grows texts.

    One range is allowed where no loop is inside or around it: jinja2 itself bounds its length.
    """
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        loops = list(tree.find_all(nodes.For))
        inner = {id(loop) for outer in loops for loop in outer.find_all(nodes.For)}
        allowed = set()  # what the loops without another one are over, such as a range
        for loop in loops:
            if id(loop) not in inner and not any(loop.find_all(nodes.For)):
                allowed |= {id(loop.iter), id(getattr(loop.iter, "node", None))}
        others = (node for node in tree.find_all(nodes.Node) if id(node) not in allowed)
        return _loop_depth(tree) <= TAME_LOOPS and not any(map(_is_untame, others))
    except (jinja2.TemplateError, RecursionError):
        return False  # the template's own environment decides


def _loop_depth(tree: nodes.Node) -> int:
    inner = max(map(_loop_depth, tree.iter_child_nodes()), default=0)
    return inner + isinstance(tree, nodes.For)


def _is_untame(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Const) and isinstance(node.value, int | float):
        return abs(node.value) > TAME_NUMBER
    if isinstance(node, nodes.Mod):  # on a text this formats, as in '%999999d' % 1
        return getattr(node.left, "attr", None) not in ("index", "index0")
    if isinstance(node, nodes.For):
        return node.recursive or any(map(_grows, node.find_all(nodes.Assign)))
    name = getattr(node, "name", getattr(node, "attr", None))
    return isinstance(node, _UNTAME_NODES) or name in _UNTAME_CALLS


def _grows(assign: nodes.Assign) -> bool:
    """Whether a text outlives a turn of the loop and is added to: it could double each time."""
    sums = nodes.Add | nodes.Concat
    adds = isinstance(assign.node, sums) or any(assign.node.find_all((nodes.Add, nodes.Concat)))
    return isinstance(assign.target, nodes.NSRef) and adds


_SAMPLE = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "<think> Hm. </think>\nI."},
    {"role": "user", "content": "Why?"},
)


def _probe(source: str) -> bool:
    """Plays the template in a process of its own: whether it ends, well or not, within bounds."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    quiet = {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ssp_jax.game.chat"],
            input=json.dumps(source).encode(),
            env=os.environ | quiet,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _play_probe() -> None:
    """Runs in the process of its own. Ends with code 0, or the system ends it."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    source = json.load(sys.stdin)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = source
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime) + 1 + PROBE_CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(OSError, ValueError):  # macOS does not bound memory so
        resource.setrlimit(resource.RLIMIT_AS, (PROBE_BYTES, PROBE_BYTES))
    with contextlib.suppress(InputError):  # a template that fails has ended
        _render(tokenizer, _SAMPLE)


if __name__ == "__main__":
    _play_probe()
