"""The numbers of a round: the funnel of questions, lengths of episodes, rates of play."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ssp_jax.game import rules
from ssp_jax.game.causes import CAUSES
from ssp_jax.game.examples import leaks
from ssp_jax.game.prompts import first_question, format_documents
from ssp_jax.game.roles import PROPOSER, SOLVER, VERIFIER, Episode
from ssp_jax.game.rounds import Game
from ssp_jax.rollout.engine import Stats


def round_metrics(games: Sequence[Game], stats: Stats) -> dict[str, float]:
    """The funnel of questions, rewards, lengths of episodes, and rates of play."""
    proposers = [game.proposer for game in games if game.proposer is not None]
    solvers = [episode for game in games for episode in game.attempts]
    verified = [game for game in games if game.verifier is not None]
    scores = [score for game in games for score in game.scores]
    answered = sum(episode.stop_reason == "answer" for episode in solvers)

    metrics = _funnel(games) | _causes(games) | _cuts(games)
    metrics["verifier/noise"] = _mean(len(game.noise) for game in verified)
    metrics["reward/proposer"] = _mean(game.proposer_reward for game in games)
    metrics["reward/solver"] = _mean(scores)
    metrics |= _lengths("solver", solvers)
    metrics["solver/answered"] = _share(answered, len(solvers))
    metrics |= _lengths("proposer", proposers)
    if any(game.shown for game in games):
        metrics |= _leaks(games)
    return metrics | _rates(stats)


def _funnel(games: Sequence[Game]) -> dict[str, float]:
    """How many questions came how far, and why the others did not."""
    faults = Counter(game.fault for game in games if game.fault)
    malformed = faults.total() - sum(faults[name] for name in rules.VERIFICATION_FAULTS)
    fresh = [game for game in games if game.is_fresh]
    counts: dict[str, float] = {
        "funnel/proposed": len(games),
        "funnel/well_formed": len(games) - malformed,
        "funnel/verified": len(fresh),
        "funnel/reused": sum(game.is_reused for game in games),
        "funnel/distinct": len({game.question.text for game in games if game.question}),
        "funnel/solved": _mean(_mean(game.scores) for game in fresh),
    }
    return counts | {f"fault/{name}": float(faults[name]) for name in rules.FAULTS}


def _causes(games: Sequence[Game]) -> dict[str, float]:
    """What was behind the faults that have several causes."""
    counts = Counter((game.fault, game.cause) for game in games)
    return {
        f"cause/{fault}/{name}": float(counts[fault, name])
        for fault, names in CAUSES.items()
        for name in names
    }


def _cuts(games: Sequence[Game]) -> dict[str, float]:
    """Shares of what a limit has cut or refused; CUTS names the limits."""
    proposers = [game.proposer for game in games if game.proposer is not None]
    verifiers = [game.verifier for game in games if game.verifier is not None]
    players = [*proposers, *(episode for game in games for episode in game.attempts)]
    played = [episode for episode in (*players, *verifiers) if episode.num_sampled]
    faults = Counter(game.fault for game in games)
    results = sum(episode.num_results for episode in players)
    cut_results = sum(episode.cut_results for episode in players)
    refused = sum(faults[name] for name in rules.PROMPT_FAULTS)
    return {
        "cut/results": _share(cut_results, results),
        "cut/prompts": _share(refused, len(games)),
        "cut/verifier_prompts": _share(faults["too_long_to_verify"], len(verifiers)),
        "cut/turns": _ended_by("turn_tokens", played),
        "cut/responses": _ended_by("response_tokens", players),
    }


def _ended_by(reason: str, episodes: Sequence[Episode]) -> float:
    return _share(sum(episode.stop_reason == reason for episode in episodes), len(episodes))


def _share(part: float, whole: float) -> float:
    return part / max(whole, 1)


# Metric -> what its share is of, and the config key to raise.
CUTS = {
    "cut/results": ("search results were cut", "limits.observation_tokens"),
    "cut/prompts": ("games had too long a prompt", "limits.prompt_tokens"),
    "cut/verifier_prompts": ("verifiers had too long a prompt", "limits.verify_prompt_tokens"),
    "cut/turns": ("episodes ended in a turn that was cut", "limits.turn_tokens"),
    "cut/responses": ("proposers and solvers were cut", "limits.response_tokens"),
}
_MUCH = 0.1  # a share that is worth a sentence


def cut_sentences(metrics: Mapping[str, float]) -> dict[str, str]:
    """Metric of CUTS -> a sentence, for those of which a limit cuts more than a tenth."""
    sentences = {}
    for name, (what, key) in CUTS.items():
        if (share := metrics[name]) > _MUCH:
            sentences[name] = f"{100 * share:.0f} % of {what} ({name}): a larger {key} cuts less"
    return sentences


def _leaks(games: Sequence[Game]) -> dict[str, float]:
    """Shares of episodes in which a name stands that only the worked examples can have given."""
    found: dict[str, list[bool]] = {role.name: [] for role in (PROPOSER, VERIFIER, SOLVER)}
    for game in games:
        for episode, given in _players(game):
            found[episode.role].append(leaks(episode.turns, episode.role, given, game.shown))
    return {f"{role}/leak": _share(sum(of_role), len(of_role)) for role, of_role in found.items()}


def _players(game: Game) -> Iterator[tuple[Episode, str]]:
    """The episodes of a game, each with what its prompt gave it to read beside the examples."""
    if game.proposer is not None:
        yield game.proposer, f"{game.task.answers[0]} {game.task.examples}"
    if game.proposer is not None and game.verifier is not None:
        materials = format_documents([*game.proposer.documents, *game.noise])
        yield game.verifier, f"{first_question(game.proposer.text)} {materials}"
    for attempt in game.attempts:
        yield attempt, game.question.text if game.question else ""


def _lengths(role: str, episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over a role's episodes; length: tokens of the prompt, sampled and inserted ones."""
    return {
        f"{role}/searches": _mean(len(episode.queries) for episode in episodes),
        f"{role}/tokens": _mean(episode.num_sampled for episode in episodes),
        f"{role}/length": _mean(len(episode.tokens) for episode in episodes),
    }


def _rates(stats: Stats) -> dict[str, float]:
    seconds = max(stats.seconds, 1e-9)
    slot_steps = max(stats.slot_steps, 1)
    return {
        "play/seconds": stats.seconds,
        "play/episodes": float(stats.finished),
        "play/tokens_per_second": stats.tokens_per_second,
        "play/written_tokens_per_second": stats.written_tokens / seconds,
        "play/occupancy": stats.busy_steps / slot_steps,
        # of slots that waited for memory
        "play/stalled": stats.stalled_steps / slot_steps,
        "play/searches_per_second": stats.searches / seconds,
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else 0.0
