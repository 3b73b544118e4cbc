"""The numbers of a round: the funnel of questions, lengths of episodes, rates of play."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from ssp_jax.game import rules
from ssp_jax.game.causes import CAUSES
from ssp_jax.game.roles import Episode
from ssp_jax.game.rounds import Game
from ssp_jax.rollout.engine import Stats


def round_metrics(games: Sequence[Game], stats: Stats) -> dict[str, float]:
    """The funnel of questions, rewards, lengths of episodes, and rates of play."""
    proposers = [game.proposer for game in games if game.proposer is not None]
    solvers = [episode for game in games for episode in game.attempts]
    verified = [game for game in games if game.verifier is not None]
    scores = [score for game in games for score in game.scores]
    answered = sum(episode.stop_reason == "answer" for episode in solvers)

    metrics = _funnel(games) | _causes(games)
    metrics["verifier/noise"] = _mean(len(game.noise) for game in verified)
    metrics["reward/proposer"] = _mean(game.proposer_reward for game in games)
    metrics["reward/solver"] = _mean(scores)
    metrics |= _lengths("solver", solvers)
    metrics["solver/answered"] = answered / max(len(solvers), 1)
    metrics |= _lengths("proposer", proposers)
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
