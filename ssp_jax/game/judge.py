"""Judges: models that say whether an answer is right where exact match cannot tell.

`policy` is the frozen initial model, in this process, through the same slots as the game. `openai`
is any server that speaks the OpenAI protocol, asked by its official client. Both take batches and
hand on each verdict as it comes.
"""

import asyncio
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import jax

from ssp_jax.errors import InputError, masked
from ssp_jax.game import prompts
from ssp_jax.game.roles import ASSISTANT, EpisodeContext, EpisodePlayer, episode_id
from ssp_jax.game.verdict import read_verdict
from ssp_jax.rollout.engine import Engine, Stats
from ssp_jax.runtime import processes
from ssp_jax.runtime.request import Secrets, check_address

PROBE_SECONDS = 60.0  # a server that is just starting may take its time for the first answer
# of a server's answer at most; with all its thoughts it has some ten thousand
REPLY_BYTES = 1 << 23
SHOWN_CHARS = 80  # of a reply in a message
KEPT_CHARS = 4000  # of a reply in verdicts.jsonl
_TICK_SECONDS = 0.5


@dataclass(frozen=True)
class Case:
    question: str
    answers: tuple[str, ...]  # the right ones
    answer: str  # the one to judge


@dataclass(frozen=True)
class Verdict:
    """right: None where the judge failed, or said neither; that is counted and never scored as
    right.
    """

    right: bool | None
    reply: str  # its words, or what failed
    failed: bool = False  # no words came


_PROBE = Case("How many days has a week?", ("7",), "seven")  # any server can be asked this


def _asked(case: Case) -> list[dict[str, str]]:
    return prompts.judge_messages(case.question, case.answers, case.answer)


Take = Callable[[int, Verdict], None]  # hears the number of a case and its verdict


class Judge(Protocol):
    name: str  # for people
    identity: str  # digest of what its verdicts depend on, beside the case

    def ask(self, cases: Sequence[Case], take: Take, progress: Callable[[], None]) -> None:
        """Calls take(i, verdict) once for each case, in any order, and `progress`, which may raise,
        now and then.
        """
        ...


class Policy:
    """The initial model. weights() gives the sampler's copy of it, which is let go when all cases
    are judged.

    model: digests of what the model is made of.
    """

    name = "policy"

    def __init__(
        self,
        engine: Engine,
        stage: EpisodeContext,
        model: Mapping[str, str],
        weights: Callable[[], Any],
        max_tokens: int,
        cache_tokens: int,
    ):
        self.identity = processes.digest((dict(model), stage.template, max_tokens, _asked(_PROBE)))
        room = cache_tokens - max_tokens
        limits = replace(
            stage.limits, prompt_tokens=room, response_tokens=max_tokens, turn_tokens=max_tokens
        )
        self._engine, self._stage, self._weights = engine, replace(stage, limits=limits), weights

    def ask(self, cases: Sequence[Case], take: Take, progress: Callable[[], None]) -> None:
        players = []
        for i, case in enumerate(cases):
            prompt = self._stage.prompt(_asked(case))
            players.append(
                EpisodePlayer(self._stage, ASSISTANT, episode_id(ASSISTANT, i, 0), 0.0, prompt)
            )
        rows = {player.uid: i for i, player in enumerate(players)}

        def finished(player: EpisodePlayer) -> list[EpisodePlayer]:
            reply = player.episode().text or f"stopped by {player.stop_reason}"
            take(rows[player.uid], Verdict(read_verdict(reply), _shortened(reply)))
            return []

        def playing(stats: Stats) -> None:
            progress()

        self._engine.play(self._weights(), jax.random.key(0), players, finished, playing)


class NoReply(Exception):
    """A server has answered, and not with a text of a model."""


def _text_of(body: str) -> str:
    """What the model said, in a chat completion. The client itself would take any body for one."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, TypeError, LookupError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise NoReply(f"it answers with no text of a model: {body or 'nothing'}")
    return text


def _bounded(seconds: float) -> Any:
    """The official client's HTTP. It bounds the time of a whole request and the size of its answer.

    (Its own timeout is of one read. A server that sends a byte now and then would be waited for
    without end.) Redirects are not followed: what is judged goes to no other address.
    """
    import httpx2  # which the client is made with

    class Bounded(httpx2.AsyncClient):
        async def send(self, request: Any, **options: Any) -> Any:
            options |= {"stream": True, "follow_redirects": False}
            try:
                async with asyncio.timeout(seconds):
                    response = await super().send(request, **options)
                    try:
                        body = await _body_of(response)
                    finally:
                        await response.aclose()
            except TimeoutError:
                late = f"no whole answer in {seconds:g} s"
                raise httpx2.ReadTimeout(late, request=request) from None
            status, headers = response.status_code, response.headers
            return httpx2.Response(status, headers=headers, content=body, request=request)

    return Bounded(limits=httpx2.Limits(max_connections=None))  # judge.concurrency is the limit


async def _body_of(response: Any) -> bytes:
    if 300 <= response.status_code < 400:
        where = response.headers.get("location", "elsewhere")
        expected = "which is not followed; expected the address itself"
        raise NoReply(f"it redirects to {where}, {expected}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise NoReply("it answers compressed, which it was asked not to")
    body = bytearray()
    async for part in response.aiter_raw():
        body += part
        if len(body) > REPLY_BYTES:
            raise NoReply(f"its answer is longer than {REPLY_BYTES >> 20} MiB")
    return bytes(body)


class OpenAI:
    """A server. The client itself repeats what timed out or was refused for load, after pauses that
    grow.

    Without threads, which could not be told to stop while the server keeps them waiting.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int,
        timeout_s: float,
        retries: int,
        max_tokens: int,
    ):
        """Asks one question at once, so that a wrong address is told before anything is compiled."""
        try:
            import openai
        except ImportError:
            raise InputError(
                "the openai judge: expected the package openai; pip install '.[openai]'"
            ) from None
        check_address("judge.url", url)
        key = os.environ.get("OPENAI_API_KEY") or "none"  # servers of one's own ask for none
        if not re.fullmatch("[!-~]+", key):
            raise InputError(
                "environment variable OPENAI_API_KEY: expected visible ASCII characters and no others"
            )
        self.name = f"openai {model}"
        self.identity = processes.digest((masked(url), model, max_tokens, _asked(_PROBE)))
        self._errors = openai.OpenAIError, NoReply
        self._model = model
        self._concurrency = concurrency
        self._url = url
        self._timeout_s = timeout_s
        self._secrets = Secrets(url, os.environ.get("OPENAI_API_KEY", ""))
        address = urlsplit(url)
        self._open = functools.partial(
            openai.AsyncOpenAI,
            base_url=urlunsplit(address._replace(query="", fragment="")),
            api_key=key,
            default_query=dict(parse_qsl(address.query)),
            default_headers={"Accept-Encoding": "identity"},  # whose size is that of what comes
            max_retries=retries,
        )
        self._options: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}
        asyncio.run(self._probe(max(timeout_s, PROBE_SECONDS)))

    def _connect(self, timeout_s: float) -> Any:
        """One for each batch: its connections are closed when all has been judged."""
        return self._open(timeout=timeout_s, http_client=_bounded(timeout_s))

    async def _probe(self, timeout_s: float) -> None:
        """Finds the arguments that the server takes: OpenAI's newer models have another limit and
        no temperature.
        """
        import openai

        try:
            async with asyncio.timeout(2 * timeout_s), self._connect(timeout_s) as client:
                try:
                    await self._complete(client, _PROBE)
                except openai.BadRequestError as error:
                    self._options = {"max_completion_tokens": self._options["max_tokens"]}
                    try:
                        await self._complete(client, _PROBE)
                    except openai.BadRequestError:
                        raise error from None
        except TimeoutError:
            raise self._useless(f"no answer in {2 * timeout_s:g} s") from None
        except self._errors as error:
            raise self._useless(self._told(error)) from None

    def ask(self, cases: Sequence[Case], take: Take, progress: Callable[[], None]) -> None:
        """InputError where the server has gone away; a case that fails has a verdict that says so."""
        asyncio.run(self._ask(cases, take, progress))

    async def _ask(self, cases: Sequence[Case], take: Take, progress: Callable[[], None]) -> None:
        left = iter(enumerate(cases))
        at_once = min(self._concurrency, len(cases))
        failed_in_a_row = 0
        async with self._connect(self._timeout_s) as client:

            async def work() -> None:
                nonlocal failed_in_a_row
                for i, case in left:
                    verdict = await self._judge(client, case)
                    take(i, verdict)
                    failed_in_a_row = failed_in_a_row + 1 if verdict.failed else 0
                    if failed_in_a_row == at_once:
                        failed_in_a_row = 0
                        await self._check(client)

            workers = running = {asyncio.create_task(work()) for _ in range(at_once)}
            try:
                while running:
                    done, running = await asyncio.wait(running, timeout=_TICK_SECONDS)
                    for worker in done:
                        worker.result()  # raises what `take` has raised
                    progress()
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _check(self, client: Any) -> None:
        """InputError unless it was the cases that failed: any server answers this one."""
        try:
            await self._complete(client, _PROBE)
        except self._errors as error:
            raise self._useless(self._told(error)) from None

    async def _judge(self, client: Any, case: Case) -> Verdict:
        try:
            reply = await self._complete(client, case)
        except self._errors as error:
            return Verdict(None, f"{type(error).__name__}: {self._told(error)}", failed=True)
        return Verdict(read_verdict(reply), self._secrets.hidden(_shortened(reply)))

    async def _complete(self, client: Any, case: Case) -> str:
        create = client.chat.completions.with_raw_response.create
        answer = await create(model=self._model, messages=_asked(case), **self._options)
        return _text_of(answer.http_response.text)

    def _told(self, error: Exception) -> str:
        """In one line, with the cause: of a connection the client itself says only that it failed."""
        said = " ".join(f"{error} {error.__cause__ or ''}".split())
        return self._secrets.hidden(said)[:200]

    def _useless(self, found: str) -> InputError:
        return InputError(
            f"config key judge.url: {masked(self._url)}: expected a server that completes chats of "
            f"judge.model {self._model!r}: {found}"
        )


def _shortened(reply: str) -> str:
    """Of a long reply the beginning and the end: the words that decide stand there."""
    half = KEPT_CHARS // 2
    return reply if len(reply) <= KEPT_CHARS else f"{reply[:half]} ... {reply[-half:]}"


def check_policy(stage: EpisodeContext) -> None:
    """InputError where the chat template refuses what the policy judge is asked."""
    stage.prompt(_asked(_PROBE))


def shown(reply: str) -> str:
    """A reply in a message."""
    words = " ".join(reply.split())
    return repr(words if len(words) <= SHOWN_CHARS else f"{words[:SHOWN_CHARS]}...")
