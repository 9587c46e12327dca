"""LLaMA-Factory's API over a hybrid model: requests that cannot be served end at the door.

Without it a request with a negative length, a NaN or a prompt of megabytes reaches `generate`: it
ends in status 500, or takes memory and the processor until it is done, long after its sender has
gone. Errors have the form that clients of OpenAI's API read.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from kt_sft.errors import RequestError

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_PATH = "/v1/chat/completions"
# Of a request; images come in it as text.
_MOST_BYTES = 64 << 20
_MOST_ANSWERS = 16
# No token of a prompt is longer on average: what has more characters is not even tokenized.
_CHARACTERS_PER_TOKEN = 64
# (field, least, most, whether the least itself is let in)
_RANGES = (
    ("temperature", 0.0, 2.0, True),
    ("top_p", 0.0, 1.0, False),
    ("presence_penalty", 0.0, 2.0, True),
)

# Set when the sender of the request that is being served has gone.
_gone: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("gone", default=None)


class _SenderGone(StoppingCriteria):
    """Ends a generation after the token that it is at."""

    def __init__(self, gone: threading.Event) -> None:
        self._gone = gone

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._gone.is_set(), device=input_ids.device)


def problems_of(request: Any, context: int) -> Iterator[tuple[str, str]]:
    """What is wrong with the body of a request: field, and what was got and expected.

    context: the most tokens that the model takes. What the API itself refuses is left to it.
    """
    if not isinstance(request, Mapping):
        yield "body", f"got {type(request).__name__}, expected an object"
        return
    for field, limit in (("max_tokens", context), ("n", _MOST_ANSWERS)):
        value = request.get(field)
        if value is not None and not (type(value) is int and 1 <= value <= limit):
            yield field, f"got {_shown(value)}, expected 1 to {limit}"
    for field, least, most, closed in _RANGES:
        value = request.get(field)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not least <= value <= most:
            yield field, f"got {_shown(value)}, expected {least} to {most}"
        elif value == least and not closed:
            yield field, f"got {_shown(value)}, expected more than {least}"
    if request.get("stream"):
        for field in ("n", "tools"):
            if request.get(field) not in (None, 1, []):
                yield field, "does not go together with stream"
    messages = request.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        empty = isinstance(message, Mapping) and message.get("content") is None
        if empty and not message.get("tool_calls"):
            yield f"messages.{i}.content", "got null, expected text"


def _shown(value: Any) -> str:
    return str(value)[:40]


def _texts(request: Mapping[str, Any]) -> Iterator[str]:
    """The parts of a request that become the prompt, images left out."""
    for message in request.get("messages") or ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else [{"text": content}]:
            text = part.get("text") if isinstance(part, Mapping) else None
            if isinstance(text, str):
                yield text
    if request.get("tools"):
        yield json.dumps(request["tools"])


def refuse_long_prompts(request: Mapping[str, Any], tokenizer: Any, context: int) -> None:
    """Raises RequestError where prompt and answer are longer than the model's context."""
    texts = list(_texts(request))
    characters = sum(map(len, texts))
    if characters > _CHARACTERS_PER_TOKEN * context:
        raise RequestError(
            f"messages: got {characters} characters, expected a prompt that fits the model's "
            f"context of {context} tokens; shorten it"
        )
    refuse_over_context(
        sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts),
        request.get("max_tokens") or 1,
        context,
    )


def refuse_over_context(prompt: int, answer: int, context: int) -> None:
    """Raises RequestError; all in tokens."""
    if prompt + answer > context:
        raise RequestError(
            f"messages: got {prompt} tokens, and max_tokens {answer}; the model's context is "
            f"{context} tokens. Shorten the prompt, or ask for fewer"
        )


def context_of(model: Any) -> int:
    """The most tokens that a model's positions are made for."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "max_position_embeddings", 0) or 1 << 20)


def guarded_arguments(stock: Callable) -> Callable:
    """`HuggingfaceEngine._process_args` that keeps to the context, and ends with its sender."""

    def process_args(model: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], int]:
        gone = _gone.get()
        if gone is None:  # not through the API
            return stock(model, *args, **kwargs)
        if gone.is_set():
            raise RequestError("the connection was cut before its turn came")
        asked = (args[-1] if args else kwargs["input_kwargs"]) or {}
        answer = asked.get("max_new_tokens")
        generation, prompt = stock(model, *args, **kwargs)
        context, settings = context_of(model), generation["generation_config"]
        refuse_over_context(prompt, answer or 1, context)
        if answer is None and settings.max_new_tokens is not None:
            settings.max_new_tokens = min(settings.max_new_tokens, context - prompt)
        generation["stopping_criteria"] = StoppingCriteriaList([_SenderGone(gone)])
        return generation, prompt

    return process_args


class ApiGuard:
    """ASGI middleware around the API's application."""

    def __init__(self, app: Any, tokenizer: Any, context: int) -> None:
        self._app, self._tokenizer, self._context = app, tokenizer, context

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answers = _Answers(send)
        if scope["method"] == "POST" and scope["path"].endswith(_PATH):
            await self._serve_chat(scope, receive, answers)
        else:
            await self._app(scope, receive, answers)

    async def _serve_chat(
        self, scope: Mapping[str, Any], receive: Receive, answers: _Answers
    ) -> None:
        body = await _whole(receive)
        if body is None:
            await answers.refuse(413, f"got more than {_MOST_BYTES} bytes")
            return
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            await answers.refuse(400, f"body: not JSON: {str(error)[:200]}")
            return
        found = next(problems_of(request, self._context), None)
        if found is not None:
            await answers.refuse(400, f"{found[0]}: {found[1]}", found[0])
            return
        if request.get("presence_penalty") == 0:
            # OpenAI's "none"; the API takes the number for a factor, which must not be 0.
            del request["presence_penalty"]
            body = json.dumps(request).encode()
        gone, left = threading.Event(), asyncio.Event()
        given = False

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            left.set()

        async def again() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        watching = asyncio.create_task(watch())
        _gone.set(gone)
        try:
            # Not in the loop, which goes on to answer others.
            await asyncio.to_thread(refuse_long_prompts, request, self._tokenizer, self._context)
            await self._app(scope, again, answers)
        except RequestError as error:
            await answers.refuse(400, str(error), "messages")
        except Exception:
            if answers.started:
                raise
            logger.exception("a request to the API failed")
            await answers.refuse(500, "the server failed at this request; its log says why")
        finally:
            gone.set()
            watching.cancel()


async def _whole(receive: Receive) -> bytes | None:
    """The body of a request; None where it is larger than any that is served."""
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > _MOST_BYTES:
            return None
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


class _Answers:
    """A `send` that gives errors the form of OpenAI's: {"error": {message, type, param, code}}."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self._status = 0
        self._detail = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._status = message["status"]
            return
        if not self._status:
            self.started = True
            await self._send(message)
            return
        self._detail += message.get("body", b"")
        if not message.get("more_body"):
            status, self._status = self._status, 0
            await self.refuse(400 if status == 422 else status, _said(self._detail))

    async def refuse(self, status: int, text: str, param: str | None = None) -> None:
        """Answers with an error, unless an answer has begun."""
        if self.started:
            return
        self.started = True
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": text, "type": kind, "param": param, "code": None}
        body = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
        ]  # fmt: skip
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _said(detail: bytes) -> str:
    """The text of FastAPI's error, `{"detail": text or a list of {loc, msg}}`."""
    try:
        found = json.loads(detail)["detail"]
    except (ValueError, KeyError, TypeError):
        return detail.decode(errors="replace")
    if not isinstance(found, list):
        return str(found)
    return "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in found)
