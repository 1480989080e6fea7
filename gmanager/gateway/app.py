"""The routes: a request becomes calls of `AsyncClient`, and their chunks become OpenAI's answers."""

import asyncio
import importlib.metadata
import json
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from gmanager.gateway.answers import ChatShape, CompletionShape, Envelope, Prompt
from gmanager.gateway.aside import aside
from gmanager.gateway.backend import Backend, Served
from gmanager.gateway.config import GatewayConfig
from gmanager.gateway.door import Answers, Door
from gmanager.gateway.errors import ApiError, ErrorBody, translate
from gmanager.gateway.generation import Generation
from gmanager.gateway.metrics import CONTENT_TYPE, render
from gmanager.gateway.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gmanager.gateway.streaming import EventStream, unless_gone
from gmanager.wire.errors import TextError
from gmanager.wire.messages import SamplingParams

VERSION = importlib.metadata.version("distattn")

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is wrong, or longer than the model takes."},
    401: {"model": ErrorBody, "description": "No API key, or none that is known."},
    404: {"model": ErrorBody, "description": "No such model."},
    408: {"model": ErrorBody, "description": "The body did not come."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    422: {"model": ErrorBody, "description": "It needs more KV than the instances hold together."},
    429: {"model": ErrorBody, "description": "Too many requests are waiting or under way."},
    503: {"model": ErrorBody, "description": "Nobody can serve it now."},
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What may come instead of JSON."""
UNAVAILABLE: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 503)}


def make_app(config: GatewayConfig, backend: Backend) -> Door:
    """The whole application. Its lifespan runs the backend."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(backend.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    app = FastAPI(title="distattn", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.exception_handler(ApiError)(_api_error)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http_error)
    answers: Answers = Counter()
    routes = Routes(config, backend, answers)
    app.get("/health", responses={503: ERRORS[503]})(routes.health)
    app.get("/version", responses={401: ERRORS[401]})(routes.version)
    app.get("/metrics", responses=UNAVAILABLE, response_class=PlainTextResponse)(routes.metrics)
    app.get("/v1/models", responses=UNAVAILABLE)(routes.list_models)
    app.get("/v1/models/{name:path}", responses=UNAVAILABLE | {404: ERRORS[404]})(routes.get_model)
    for path, route, responses in (
        ("/v1/completions", routes.complete, ERRORS | STREAMED),
        ("/v1/chat/completions", routes.chat, ERRORS | STREAMED),
        ("/tokenize", routes.tokenize, ERRORS),
        ("/detokenize", routes.detokenize, ERRORS),
    ):
        app.post(path, responses=responses, response_model=None)(route)
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    return Door(app, config, paths, answers)


class Routes:
    """What the paths do."""

    def __init__(self, config: GatewayConfig, backend: Backend, answers: Answers) -> None:
        self._config = config
        self._backend = backend
        self._answers = answers

    # --- about the service --------------------------------------------------------------------------------------------

    async def health(self) -> dict[str, str]:
        """200 only when a cell can serve."""
        if not any(cell.state == "ready" for cell in (await self._backend.stats()).cells):
            raise ApiError(503, "no instances are ready to serve", code="not_ready")
        return {"status": "ready"}

    async def version(self) -> dict[str, str]:
        """Of this gateway."""
        return {"version": VERSION}

    async def metrics(self) -> Response:
        """The service's and this gateway's, for Prometheus."""
        return Response(render(await self._backend.stats(), self._answers), media_type=CONTENT_TYPE)

    async def list_models(self) -> dict[str, Any]:
        """Models that can be asked now."""
        return {"object": "list", "data": [_model(served) for served in await self._backend.models()]}

    async def get_model(self, name: str) -> dict[str, Any]:
        """One of them."""
        return _model(await self._backend.model(name))

    # --- text ---------------------------------------------------------------------------------------------------------

    async def tokenize(self, body: TokenizeRequest, http: Request) -> Response:
        """A text, or a conversation in the model's template, as token ids."""
        served = await self._backend.model(body.model)
        tokenizer = served.tokenizer
        if body.messages is not None:
            ids = await _ids(http, tokenizer.encode_chat([turn.plain() for turn in body.messages]))
        else:
            ids = await _ids(http, tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens))

        def answer() -> bytes:
            found: dict[str, Any] = {"count": len(ids), "max_model_len": served.max_context, "tokens": ids}
            if body.return_token_strs:
                found["token_strs"] = [tokenizer.bytes_of(token).decode(errors="replace") for token in ids]
            return msgspec.json.encode(found)

        return _json(await aside(len(ids), answer))

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        served = await self._backend.model(body.model)
        return {"prompt": await aside(len(body.tokens), lambda: served.tokenizer.decode_all(body.tokens))}

    # --- tokens -------------------------------------------------------------------------------------------------------

    async def complete(self, body: CompletionRequest, http: Request) -> Response:
        """Go on with one or more prompts."""
        served = await self._backend.model(body.model)
        given = body.prompts()
        if len(given) > self._config.max_prompts:
            raise ApiError(400, f"{len(given)} prompts; a request has at most {self._config.max_prompts}", param="prompt")
        prompts = [await _prompt(http, served, prompt, echo=bool(body.echo)) for prompt in given]
        drops_tokens = body.max_tokens == 0
        prompt_logprobs = body.logprobs if body.echo else None
        shape = CompletionShape(served.tokenizer, logprobs=body.logprobs, echo=bool(body.echo), drops_tokens=drops_tokens)
        most_tokens = 1 if drops_tokens else body.max_tokens
        generation = Generation(
            client=self._backend.client(),
            envelope=Envelope(shape, served.name),
            prompts=prompts,
            params=self._params(body, most_tokens, body.logprobs, prompt_logprobs),
            spread=body.spread,
            drops_tokens=drops_tokens,
        )
        return await _answer(http, generation, stream=bool(body.stream), with_usage=body.includes_usage)

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        served = await self._backend.model(body.model)
        ids = await _ids(http, served.tokenizer.encode_chat([turn.plain() for turn in body.messages]))
        generation = Generation(
            client=self._backend.client(),
            envelope=Envelope(ChatShape(served.tokenizer, logprobs=body.num_logprobs), served.name),
            prompts=[Prompt(ids, "")],
            params=self._params(body, body.most_tokens, body.num_logprobs, None),
            spread=body.spread,
            drops_tokens=False,
        )
        return await _answer(http, generation, stream=bool(body.stream), with_usage=body.includes_usage)

    def _params(
        self, body: CompletionRequest | ChatRequest, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> list[SamplingParams]:
        n = body.n or 1
        if n > self._config.max_n:
            raise ApiError(400, f"n must be at most {self._config.max_n}, got {n}", param="n")
        try:
            return [body.sampling(choice, max_tokens, logprobs, prompt_logprobs) for choice in range(n)]
        except ValueError as error:
            raise ApiError(400, str(error)) from error


async def _prompt(http: Request, served: Served, given: str | list[int], *, echo: bool) -> Prompt:
    if isinstance(given, str):
        return Prompt(await _ids(http, served.tokenizer.encode(given)), given)
    text = await aside(len(given), lambda: served.tokenizer.decode_all(given)) if echo else ""
    return Prompt(given, text)


async def _ids(http: Request, encoding: Awaitable["array[int]"]) -> list[int]:
    """Token ids, unless the client leaves before they are there: others wait for the same process. Raises ApiError."""
    try:
        return (await unless_gone(http.receive, encoding)).tolist()
    except TextError as error:
        raise translate(error) from error


async def _answer(http: Request, generation: Generation, *, stream: bool, with_usage: bool) -> Response:
    """A whole answer, or a stream that will run it. Raises ApiError."""
    if stream:
        return EventStream(generation, with_usage=with_usage)
    return _json(await unless_gone(http.receive, generation.whole()))


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.since,
        "owned_by": "distattn",
        "max_model_len": served.max_context,
    }


# --- errors -----------------------------------------------------------------------------------------------------------


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    # json, not msgspec: it escapes what a request may have held and no UTF-8 can hold
    return Response(json.dumps(error.body()), error.status_code, error.headers, media_type="application/json")


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that isn't what the route takes: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    place = [str(part) for part in first.get("loc", ()) if part != "body"]
    param = ".".join(place) or None
    text = first["msg"].removeprefix("Value error, ")
    return await _api_error(request, ApiError(400, f"{param}: {text}" if param else text, param=param))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = await _api_error(request, ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}"))
    response.headers.update(error.headers or {})  # of a 405: what is allowed
    return response
