"""Asks a model, through the same slot engine that training uses.

    python -m ssp_jax.generate --model=FOLDER --prompts=IN.jsonl --out=OUT.jsonl \\
        --max_tokens=256 --temperature=0
    python -m ssp_jax.generate --model=FOLDER --index=INDEX --prompts=QUESTIONS.jsonl \\
        --out=OUT.jsonl
    python -m ssp_jax.generate --model=FOLDER --index=INDEX  # type a question and watch it search
    python -m ssp_jax.generate FOLDER "Who wrote Emma?" --index=INDEX  # one question, then the end
    python -m ssp_jax.generate --model=FOLDER --adapter=FOLDER ...  # with a LoRA adapter

--prompts has lines {"prompt": text}, continued as it stands, or {"messages": [{"role", "content"},
...]}, put through the chat template. OUT has as many lines in the same order: {"token_ids",
"logprobs", "text", "stop_reason"}. With --index (a built search index) the lines are {"question":
text}, the model plays the solver, and OUT adds "question", "searches", "answer" and "turns";
token_ids then hold inserted results too, with null for their logprobs. Without --prompts questions
are those of the command line, or are read from the standard input, one a line; there Ctrl-C stops
an answer, and Ctrl-D leaves. Without --out lines go to the standard output.

"prompt" is taken as it stands, control tokens such as <|im_end|> included; in all other texts they
are plain text. OUT is replaced when all lines are there. A model that was trained here is asked as
it was trained, by the file ssp_jax_training.json beside its weights: --style, --template,
--worked_examples, and with --index --top_k, --max_searches and --max_tokens are then not needed
(and else search_r1, chat, 0, 3, 10 and 1024).
"""

import argparse
from collections.abc import Sequence

from ssp_jax.config.values import BOUNDS, CHOICES
from ssp_jax.errors import InputError
from ssp_jax.export import form
from ssp_jax.retriever import settings
from ssp_jax.runtime import command, platform, signals
from ssp_jax.runtime.command import user_path

PATHS = ("model", "adapter", "prompts", "out", "index", "encoder")  # flags
BOUNDED = {  # flag -> the config key whose bounds it has
    "max_tokens": "limits.response_tokens",
    "top_k": "retriever.top_k",
    "max_searches": "limits.searches",
    "seed": "seed",
    "temperature": "sampling.eval_temperature",
    "worked_examples": "prompt.worked_examples",
}


_PROG = "python -m ssp_jax.generate"


def parse_flags(arguments: Sequence[str] | None, prog: str = _PROG) -> argparse.Namespace:
    """The flags; those are None that form.fill gives a value. Raises InputError."""
    parser = command.Parser(prog=prog, description=__doc__)
    _add_files(parser)
    _add_settings(parser)
    f = parser.parse(arguments)
    if not f.model and f.words:
        f.model, *f.words = f.words
    if not f.model:
        raise InputError("flag --model is missing; expected a Hugging Face folder")
    for name, key in BOUNDED.items():
        if getattr(f, name) is not None:
            BOUNDS[key].check(f"flag --{name}", getattr(f, name))
    for name in PATHS:
        setattr(f, name, user_path(getattr(f, name), f"--{name}"))
    if f.words and f.prompts:
        raise InputError(f"expected --prompts or questions, found both: {f.words[0]!r}")
    if f.out and not f.prompts:
        raise InputError("flag --out needs --prompts; typed questions are answered on the screen")
    return f


def _add_files(parser: command.Parser) -> None:
    adapter = (
        "an adapter of the model, as PEFT and --config.checkpoint.export=adapter write it; applied "
        "beside the weights, not merged into them"
    )
    words = "the model, unless --model has it, and questions to be answered at once"
    parser.add_argument("words", nargs="*", metavar="TEXT", help=words)
    parser.add_argument("--model", default="", metavar="FOLDER", help="Hugging Face folder")
    parser.add_argument("--adapter", default="", metavar="FOLDER", help=adapter)
    parser.add_argument("--index", default="", metavar="FOLDER", help="a built search index")
    encoder = "that made the index's vectors, for --kind=dense and hybrid"
    parser.add_argument("--encoder", default="", metavar="FOLDER", help=encoder)
    parser.add_argument("--prompts", default="", metavar="IN.jsonl", help="typed without it")
    parser.add_argument("--out", default="", metavar="OUT.jsonl", help="of --prompts")


def _add_settings(parser: command.Parser) -> None:
    max_tokens = "tokens after the prompt, search results included, in the model's context"
    worked = "played examples to show first, to a model that was never trained to search"
    # What is None here has the value of the model's training.
    styles = tuple(CHOICES["prompt.style"])
    templates = tuple(CHOICES["prompt.template"])
    dtypes = ("", "float32", "bfloat16")
    add = parser.add_argument
    add("--max_tokens", default=None, type=int, metavar="N", help=max_tokens)
    add("--temperature", default=0.0, type=float, metavar="X", help="0 is greedy (0)")
    add("--seed", default=0, type=int, metavar="N", help="of the random numbers (0)")
    add("--dtype", default="", choices=dtypes, help="bfloat16 on accelerators, else float32")
    add("--kind", default="bm25", choices=settings.INDEX_KINDS, help="of search (bm25)")
    add("--top_k", default=None, type=int, metavar="N", help="passages per search")
    add("--max_searches", default=None, type=int, metavar="N", help="per question")
    add("--style", default=None, choices=styles, help="of the prompts")
    add("--template", default=None, choices=templates, help="of the prompts")
    add("--worked_examples", default=None, type=int, metavar="N", help=worked)


def main(arguments: Sequence[str] | None = None, prog: str = _PROG) -> int:
    return command.exit_code(lambda: _run(arguments, prog))


def _run(arguments: Sequence[str] | None, prog: str) -> None:
    flags = parse_flags(arguments, prog)
    form.fill(flags)
    settings.check_flags(flags.kind, flags.encoder, flags.top_k)

    # From here on JAX is needed: mistakes above are reported before the seconds that it takes.
    platform.prepare_once()
    from ssp_jax.generate import ask

    ask.answer(flags)


if __name__ == "__main__":
    signals.leave(main())
