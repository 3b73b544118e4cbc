"""Judges: models that say whether an answer is right where exact match cannot tell.

`policy` is the frozen initial model in this process, played through the slots of the game. `openai`
is any server that speaks the OpenAI protocol, asked through the official client. Both take batches
and report each verdict as it comes.
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

PROBE_SECONDS = 60.0  # a server that has just started may be slow at its first answer
REPLY_BYTES = 1 << 23  # the longest answer of a server; one with thoughts has some ten thousand
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
    """A judge's word on an answer.

    right is None where the judge failed, or said neither. That is counted, and never right.
    """

    right: bool | None
    reply: str  # the judge's words, or the error
    failed: bool = False  # there was no reply


_PROBE = Case("How many days has a week?", ("7",), "seven")  # which any server can judge


def _messages(case: Case) -> list[dict[str, str]]:
    return prompts.judge_messages(case.question, case.answers, case.answer)


OnVerdict = Callable[[int, Verdict], None]  # gets the index of a case and its verdict


class Judge(Protocol):
    """A judge of answers."""

    name: str  # for people
    identity: str  # digest of all that its verdicts depend on, beside the case

    def ask(
        self, cases: Sequence[Case], on_verdict: OnVerdict, progress: Callable[[], None]
    ) -> None:
        """Calls on_verdict(i, verdict) once for each case, in any order.

        progress is called now and then, and may raise.
        """
        ...


class Policy:
    """The initial model as a judge.

    weights() gives the sampler's copy of its parameters, which is freed when all cases are judged.
    model: digests of the files that the model is made of.
    """

    name = "policy"

    def __init__(
        self,
        engine: Engine,
        context: EpisodeContext,
        model: Mapping[str, str],
        weights: Callable[[], Any],
        max_tokens: int,
        cache_tokens: int,
    ):
        depends_on = (dict(model), context.template, max_tokens, _messages(_PROBE))
        self.identity = processes.digest(depends_on)
        limits = replace(
            context.limits,
            prompt_tokens=cache_tokens - max_tokens,
            response_tokens=max_tokens,
            turn_tokens=max_tokens,
        )
        self._engine = engine
        self._context = replace(context, limits=limits)
        self._weights = weights

    def ask(
        self, cases: Sequence[Case], on_verdict: OnVerdict, progress: Callable[[], None]
    ) -> None:
        players = []
        for i, case in enumerate(cases):
            prompt = self._context.prompt(_messages(case))
            uid = episode_id(ASSISTANT, i, 0)
            players.append(EpisodePlayer(self._context, ASSISTANT, uid, 0.0, prompt, tag=i))

        def finished(player: EpisodePlayer) -> list[EpisodePlayer]:
            reply = player.episode().text or f"stopped by {player.stop_reason}"
            on_verdict(player.tag, Verdict(read_verdict(reply), _shortened(reply)))
            return []

        def playing(stats: Stats) -> None:
            progress()

        self._engine.play(self._weights(), jax.random.key(0), players, finished, playing)


class NoReply(Exception):
    """A server's answer holds no text of a model."""


def _text_of(body: str) -> str:
    """The model's text in a chat completion. NoReply where there is none.

    (The client itself accepts any body as a completion.)
    """
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, TypeError, LookupError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise NoReply(f"it answers with no text of a model: {body or 'nothing'}")
    return text


def _bounded(seconds: float) -> Any:
    """An HTTP client that bounds the time of a whole request and the size of its answer.

    (The official client's timeout bounds one read. It would wait without end for a server that
    sends a byte now and then.) Redirects are not followed: cases go to no other address.
    """
    import httpx2  # which the official client uses

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
            return httpx2.Response(
                response.status_code, headers=response.headers, content=body, request=request
            )

    return Bounded(limits=httpx2.Limits(max_connections=None))  # judge.concurrency is the limit


async def _body_of(response: Any) -> bytes:
    if 300 <= response.status_code < 400:
        where = response.headers.get("location", "elsewhere")
        expected = "which is not followed; expected the address itself"
        raise NoReply(f"it redirects to {where}, {expected}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise NoReply("it answers compressed, which it was asked not to")
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > REPLY_BYTES:
            raise NoReply(f"its answer is longer than {REPLY_BYTES >> 20} MiB")
    return bytes(body)


class OpenAI:
    """A server as a judge.

    The official client repeats requests that timed out or were refused for load, after pauses that
    grow. There are no threads: they could not be stopped while they wait for the server.
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
        """Sends one case at once, so that a wrong address is found before anything is compiled.

        InputError without the package, with a wrong address or key, or without a usable server.
        """
        try:
            import openai
        except ImportError:
            raise InputError(
                "the openai judge: expected the package openai; pip install '.[openai]'"
            ) from None
        check_address("judge.url", url)
        key = os.environ.get("OPENAI_API_KEY") or "none"  # which private servers do not check
        if not re.fullmatch("[!-~]+", key):
            raise InputError(
                "environment variable OPENAI_API_KEY: expected visible ASCII characters and no "
                "others"
            )
        self.name = f"openai {model}"
        self.identity = processes.digest((masked(url), model, max_tokens, _messages(_PROBE)))
        self._errors = (openai.OpenAIError, NoReply)
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
            # Compressed answers would be larger than the bytes that are counted.
            default_headers={"Accept-Encoding": "identity"},
            max_retries=retries,
        )
        self._options: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}
        asyncio.run(self._probe(max(timeout_s, PROBE_SECONDS)))

    def _connect(self, timeout_s: float) -> Any:
        """A client for one batch: its connections are closed when all cases are judged."""
        return self._open(timeout=timeout_s, http_client=_bounded(timeout_s))

    async def _probe(self, timeout_s: float) -> None:
        """Finds the options that the server takes.

        OpenAI's newer models refuse max_tokens and the temperature.
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
            raise self._useless(self._one_line(error)) from None

    def ask(
        self, cases: Sequence[Case], on_verdict: OnVerdict, progress: Callable[[], None]
    ) -> None:
        """InputError where the server has gone away. A failed case has a failed verdict."""
        asyncio.run(self._ask(cases, on_verdict, progress))

    async def _ask(
        self, cases: Sequence[Case], on_verdict: OnVerdict, progress: Callable[[], None]
    ) -> None:
        left = iter(enumerate(cases))
        at_once = min(self._concurrency, len(cases))
        unjudged = len(cases)
        # As many as there are workers, or the last cases: perhaps the server has gone away. Then
        # their failures say nothing of the answers.
        failed_in_a_row = 0
        async with self._connect(self._timeout_s) as client:

            async def work() -> None:
                nonlocal failed_in_a_row, unjudged
                for i, case in left:
                    verdict = await self._judge(client, case)
                    on_verdict(i, verdict)
                    unjudged -= 1
                    failed_in_a_row = failed_in_a_row + 1 if verdict.failed else 0
                    if failed_in_a_row == at_once or (failed_in_a_row and not unjudged):
                        failed_in_a_row = 0
                        await self._check(client)

            workers = running = {asyncio.create_task(work()) for _ in range(at_once)}
            try:
                while running:
                    done, running = await asyncio.wait(running, timeout=_TICK_SECONDS)
                    for worker in done:
                        worker.result()  # raises what on_verdict has raised
                    progress()
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _check(self, client: Any) -> None:
        """InputError where the server no longer judges a case that any server can judge."""
        try:
            await self._complete(client, _PROBE)
        except self._errors as error:
            raise self._useless(self._one_line(error)) from None

    async def _judge(self, client: Any, case: Case) -> Verdict:
        try:
            reply = await self._complete(client, case)
        except self._errors as error:
            return Verdict(None, f"{type(error).__name__}: {self._one_line(error)}", failed=True)
        return Verdict(read_verdict(reply), self._secrets.hidden(_shortened(reply)))

    async def _complete(self, client: Any, case: Case) -> str:
        create = client.chat.completions.with_raw_response.create
        answer = await create(model=self._model, messages=_messages(case), **self._options)
        return _text_of(answer.http_response.text)

    def _one_line(self, error: Exception) -> str:
        """The error and its cause, which alone says why a connection failed."""
        line = " ".join(f"{error} {error.__cause__ or ''}".split())
        return self._secrets.hidden(line)[:200]

    def _useless(self, found: str) -> InputError:
        return InputError(
            f"config key judge.url: {masked(self._url)}: expected a server that completes chats of "
            f"judge.model {self._model!r}: {found}"
        )


def _shortened(reply: str) -> str:
    """The beginning and the end of a long reply, where the words that decide stand."""
    if len(reply) <= KEPT_CHARS:
        return reply
    half = KEPT_CHARS // 2
    return f"{reply[:half]} ... {reply[-half:]}"


def check_policy(context: EpisodeContext) -> None:
    """InputError where the chat template refuses the prompt of the policy judge."""
    context.prompt(_messages(_PROBE))


def shown(reply: str) -> str:
    """A reply in a message."""
    words = " ".join(reply.split())
    return repr(words if len(words) <= SHOWN_CHARS else f"{words[:SHOWN_CHARS]}...")
