"""Makes the goldens of checks 3 and 4: benchmarks/goldens/greedy_tiny.json and rewards_tiny.json.

    JAX_PLATFORMS=cpu python benchmarks/gpu_proof.py --write

Of many prompts those are taken whose smallest gap is largest: the distance of the two best logits
at a sampled token, over all of an episode. Rounding in float32 moves a logit by about 1e-5, so an
episode whose smallest gap is above 1e-3 has the same tokens on any device that computes right.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.proof import tiny_run
from benchmarks.proof.tokens import GOLDEN, ONE_PIECE, ROOT, Model, Overlap, load_model, play
from ssp_jax.game import prompts, roles
from ssp_jax.model import attention, decoder

MINIMUM_GAP = 1e-3
CANDIDATES = 60  # of each kind
TAKEN = 3  # of each kind
MATERIALS = (1, 2, 6)  # documents of a verifier's prompt, a kind each


def write() -> None:
    write_tokens()
    tiny_run.write()


def write_tokens() -> None:
    model = load_model()
    search = Overlap()
    rows = []
    for kind in candidates(model, search):
        episodes, _ = play(model, ONE_PIECE, kind, search)
        measured = [(smallest_gap(model, episode), episode) for episode in episodes]
        measured.sort(key=lambda pair: pair[0], reverse=True)
        for gap, episode in measured[:TAKEN]:
            assert gap > MINIMUM_GAP, f"{episode.role}: a gap of {gap}"
            rows.append(row(gap, episode))
            print(f"{episode.role}, smallest gap {gap:.4f}: {episode.text!r}")
    made_by = f"jax {jax.__version__} on {jax.default_backend()}, float32"
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = f'{{"made_by": {json.dumps(made_by)}, "rows": [\n{lines}\n]}}\n'
    GOLDEN.write_text(text, encoding="utf-8")


def row(gap: float, episode: roles.Episode) -> dict[str, Any]:
    return {
        "role": episode.role,
        "gap": round(gap, 4),
        "stop_reason": episode.stop_reason,
        "prompt_ids": episode.tokens[: episode.prompt_length],
        "tokens": episode.tokens,
    }


def candidates(model: Model, search: Overlap) -> list[list[tuple[roles.Role, list[int]]]]:
    """Prompts, kind by kind: of solvers, of proposers, and of verifiers by their materials."""
    context = model.context
    style = context.style
    one_hop = _values("one_hop", "question")
    two_hop = _values("two_hop", "question")
    answers = [line["ground_truth"] for line in _lines("answers.jsonl")[:CANDIDATES]]

    def solver(question: str) -> tuple[roles.Role, list[int]]:
        return roles.SOLVER, context.prompt(prompts.solver_messages(style, question))

    def proposer(answer: str) -> tuple[roles.Role, list[int]]:
        return roles.PROPOSER, context.prompt(prompts.proposer_messages(style, answer, 1, ""))

    def verifier(question: str, number: int) -> tuple[roles.Role, list[int]]:
        documents = Overlap(number)([question])[0]
        messages = prompts.verifier_messages(style, question, documents)
        return roles.VERIFIER, context.prompt(messages)

    kinds = [[solver(q) for q in one_hop], [solver(q) for q in two_hop]]
    kinds.append([proposer(answer) for answer in answers])
    for number in MATERIALS:
        overlap = one_hop[: CANDIDATES // 2]
        kinds.append([verifier(question, number) for question in overlap])
    return kinds


def _lines(name: str) -> list[dict[str, Any]]:
    text = (ROOT / "assets/tiny" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _values(questions: str, key: str) -> list[str]:
    return [line[key] for line in _lines(f"qa/{questions}.jsonl")[:CANDIDATES]]


def smallest_gap(model: Model, episode: roles.Episode) -> float:
    """The least distance of the two best logits at a sampled token, from a full forward pass."""
    T = ONE_PIECE.cache_tokens  # one length, one program
    tokens_T = np.zeros((T,), np.int32)
    tokens_T[: len(episode.tokens)] = episode.tokens
    segments_T = (np.arange(T) < len(episode.tokens)).astype(np.int32)
    gaps_T = np.asarray(_gaps(model.config, model.stacked, tokens_T[None], segments_T[None]))
    before = np.flatnonzero(episode.sampled) - 1  # the logits of a token are those before it
    return float(gaps_T[before].min())


@functools.partial(jax.jit, static_argnums=0)
def _gaps(
    config: decoder.ModelConfig, params: decoder.Params, tokens_BT: Any, segments_BT: Any
) -> jax.Array:
    """[T]: the distance of the two best logits after each token of a single row."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return attention.packed(q, k, v, segments_BT), None

    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    hidden_BTD = decoder.forward(config, params, tokens_BT, positions_BT, attend, dtype=jnp.float32)
    best_T2 = jax.lax.top_k(decoder.logits(params, hidden_BTD[0]), 2)[0]
    return best_T2[:, 0] - best_T2[:, 1]
