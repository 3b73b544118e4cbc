"""Who judges answers: a rule, a server, a function of the user's, or the initial model."""

import functools
from collections.abc import Callable, Collection, Mapping

from ml_collections import ConfigDict

from ssp_jax.game import judge, roles
from ssp_jax.model.decoder import Params
from ssp_jax.rollout.engine import Engine
from ssp_jax.user_code import load as user_code
from ssp_jax.user_code.metric import Function


def open_judges(
    config: ConfigDict, context: roles.EpisodeContext, eval_sets: Collection[str], evaluating: bool
) -> dict[str, judge.Judge]:
    """The server that judges, and functions of the user's, by metric.

    Raises InputError where a judge could not judge.
    """
    c = config.eval
    kinds = {}  # metric -> the key that has it
    if evaluating or (eval_sets and (c.before or c.every or c.after)):
        kinds[c.judge] = "eval.judge"
    if not evaluating:
        kinds[config.reward.metric] = "reward.metric"
    judges: dict[str, judge.Judge] = {}
    for metric, key in kinds.items():
        if metric == "policy":
            judge.check_policy(context)
        elif metric == "openai":
            judges[metric] = judge.OpenAI(**config.judge)
        elif user_code.is_one(metric):
            judges[metric] = Function(key, metric)
    return judges


def make_judges(
    config: ConfigDict,
    engine: Engine,
    context: roles.EpisodeContext,
    digests: Mapping[str, str],
    ready: Mapping[str, judge.Judge],
    initial: Callable[[], Params],
) -> Callable[[str], judge.Judge | None]:
    """The judge of reward.metric or eval.judge, each made once; None for a metric without one.

    digests: of a run's inputs. ready: the judges that were found with them.
    initial: gives the sampler's copy of the initial weights.
    """
    names = ("the weights", "the model's shape", "the tokenizer")
    model = {name: digests[name] for name in names} | {"model.dtype": config.model.dtype}
    max_tokens = config.judge.max_tokens
    cache_tokens = config.engine.cache_tokens

    @functools.cache
    def of_metric(metric: str) -> judge.Judge | None:
        if metric == "policy":
            return judge.Policy(engine, context, model, initial, max_tokens, cache_tokens)
        return ready.get(metric)

    return of_metric
