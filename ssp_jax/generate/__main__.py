"""Ask a model, through the same slot engine that training uses:

    python -m ssp_jax.generate --model=FOLDER --prompts=IN.jsonl --out=OUT.jsonl \\
        --max_tokens=256 --temperature=0
    python -m ssp_jax.generate --model=FOLDER --index=INDEX --prompts=QUESTIONS.jsonl \\
        --out=OUT.jsonl
    python -m ssp_jax.generate --model=FOLDER --index=INDEX  # type a question and watch it search
    python -m ssp_jax.generate --model=FOLDER --adapter=FOLDER ...  # with a LoRA adapter

--prompts has lines {"prompt": text}, continued as it stands, or {"messages": [{"role", "content"},
...]}, put through the chat template. OUT has as many lines in the same order: {"token_ids",
"logprobs", "text", "stop_reason"}. With --index (a built search index) the lines are {"question":
text}, the model plays the solver, and OUT adds "question", "searches", "answer" and "turns";
token_ids then hold inserted results too, with null for their logprobs. Without --prompts questions
are read from the standard input, one a line. Without --out lines go to the standard output.

"prompt" is taken as it stands, control tokens such as <|im_end|> included; in all other texts they
are plain text. OUT is replaced when all lines are there.

--adapter=FOLDER   an adapter of the model, as PEFT and --config.checkpoint.export=adapter write it;
                   it is applied beside the weights, not merged into them
--max_tokens=1024  tokens after the prompt, search results included, within the model's context
--temperature=0    0 is greedy; otherwise --seed=0 fixes the random numbers
--dtype=float32    or bfloat16; by default bfloat16 on accelerators and float32 on CPUs
--top_k=3          passages per search; --max_searches=10 searches per question
--style=search_r1  search_r1 | r_search | brief: what the model was trained on
--template=chat    chat | raw_chatml
--worked_example   show a played example first, to a model that was never trained to search
"""

import sys

from absl import flags

from ssp_jax.config import BOUNDS, CHOICES
from ssp_jax.errors import InputError
from ssp_jax.runtime import command, platform
from ssp_jax.runtime.command import user_path

PATHS = ("model", "adapter", "prompts", "out", "index")  # flags
BOUNDED = {  # flag -> the config key whose bounds it has
    "max_tokens": "limits.response_tokens",
    "top_k": "retriever.top_k",
    "max_searches": "limits.searches",
    "seed": "seed",
    "temperature": "sampling.eval_temperature",
}


def parse_flags(argv: list[str]) -> flags.FlagValues:
    f = flags.FlagValues()
    for name in PATHS:
        flags.DEFINE_string(name, "", name, flag_values=f)
    choices = {
        "dtype": ["", "float32", "bfloat16"],
        "style": list(CHOICES["prompt.style"]),
        "template": list(CHOICES["prompt.template"]),
    }
    for name, values in choices.items():
        flags.DEFINE_enum(name, values[0], values, name, flag_values=f)
    for name, value in (("max_tokens", 1024), ("top_k", 3), ("max_searches", 10), ("seed", 0)):
        flags.DEFINE_integer(name, value, name, flag_values=f)
    flags.DEFINE_float("temperature", 0.0, "temperature", flag_values=f)
    flags.DEFINE_bool("worked_example", False, "example", flag_values=f)
    try:
        stray = f(argv)[1:]
    except flags.Error as error:
        raise InputError(command.one_line(error)) from None
    if stray:
        raise InputError(f"unexpected argument {stray[0]!r}; write flags as --NAME=VALUE")
    if not f.model:
        raise InputError("flag --model is missing; expected a Hugging Face folder")
    for name, key in BOUNDED.items():
        BOUNDS[key].check(f"flag --{name}", getattr(f, name))
    for name in PATHS:
        f[name].value = user_path(getattr(f, name), f"--{name}")
    if f.out and not f.prompts:
        raise InputError("flag --out needs --prompts; typed questions are answered on the screen")
    return f


def main(argv: list[str]) -> int:
    return command.run_command(_run, argv, help=__doc__)


def _run(argv: list[str]) -> None:
    f = parse_flags(argv)
    # Imported here, so that mistakes above are reported before the seconds that JAX takes to load.
    from ssp_jax.generate import ask

    ask.answer(f)


if __name__ == "__main__":
    platform.prepare()
    sys.exit(main(sys.argv))
