"""The routes: a request becomes calls of `AsyncClient`, and their chunks become OpenAI's answers, or Anthropic's."""

import asyncio
import importlib.metadata
import json
import re
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.routing import Route

from gmanager.gateway.answers import CompletionShape, Envelope, Form, Prompt, Shape, Wanted
from gmanager.gateway.aside import aside
from gmanager.gateway.backend import Backend, Served
from gmanager.gateway.chat_answers import ChatShape
from gmanager.gateway.config import GatewayConfig
from gmanager.gateway.conversation import Dialogue, encode
from gmanager.gateway.door import Answers, App, Door, Load
from gmanager.gateway.errors import MESSAGES_PATH, ApiError, ErrorBody, MessagesErrorBody, error_body, sampling_field, translate
from gmanager.gateway.fields import Body, Wrong
from gmanager.gateway.generation import Generation
from gmanager.gateway.index import list_routes, page
from gmanager.gateway.messages import CountTokensRequest, MessagesRequest
from gmanager.gateway.messages_answers import MessagesForm
from gmanager.gateway.metrics import CONTENT_TYPE, render
from gmanager.gateway.reading import JsonRoute, shown
from gmanager.gateway.reasoning import is_opened
from gmanager.gateway.reply import ReplyForm, reply_form
from gmanager.gateway.responses import ResponsesRequest
from gmanager.gateway.responses_answers import ResponsesForm
from gmanager.gateway.sampling import Sampled, Talk
from gmanager.gateway.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gmanager.gateway.streaming import EventStream, unless_gone
from gmanager.gateway.structure import Structure
from gmanager.gateway.toolbox import Toolbox
from gmanager.text.grammars import compile_grammar
from gmanager.wire.errors import NO_TOKENIZER, StructureError, TextError
from gmanager.wire.messages import SamplingParams, StructuredOutputsParams

IGNORED_HEADER = "x-ignored-fields"
MAX_IGNORED_NAMES = 16
_TAIL_TOKENS = 16
"""Of a prompt: enough to see whether it ends within thoughts."""

VERSION = importlib.metadata.version("distattn")

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is wrong, or longer than the model takes."},
    401: {"model": ErrorBody, "description": "No API key, or none that is known."},
    404: {"model": ErrorBody, "description": "No such model."},
    408: {"model": ErrorBody, "description": "The body did not come."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    422: {
        "model": ErrorBody,
        "description": "It needs more KV than the instances hold together, or would miss an objective even alone.",
    },
    429: {"model": ErrorBody, "description": "Too many requests are waiting or under way, or it would miss an objective now."},
    503: {"model": ErrorBody, "description": "Nobody can serve it now."},
}
MESSAGES_ERRORS = {status: told | {"model": MessagesErrorBody} for status, told in ERRORS.items()}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What may come instead of JSON."""
UNAVAILABLE: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 503)}


def make_app(config: GatewayConfig, backend: Backend) -> App:
    """The whole application. Its lifespan runs the backend."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(backend.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    app = FastAPI(title="distattn", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.route_class = JsonRoute
    app.exception_handler(ApiError)(_api_error)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http_error)
    answers: Answers = Counter()
    load = Load()
    routes = Routes(config, backend, answers, load)
    app.get("/health", responses={503: ERRORS[503]})(routes.health)
    app.get("/ping", responses={503: ERRORS[503]})(routes.ping)
    app.get("/version", responses={401: ERRORS[401]})(routes.version)
    app.get("/load", responses={401: ERRORS[401]})(routes.load)
    app.get("/metrics", responses=UNAVAILABLE, response_class=PlainTextResponse)(routes.metrics)
    app.get("/v1/models", responses=UNAVAILABLE)(routes.list_models)
    app.get("/v1/models/{name:path}", responses=UNAVAILABLE | {404: ERRORS[404]})(routes.get_model)
    for path, route, responses in (
        ("/v1/completions", routes.complete, ERRORS | STREAMED),
        ("/v1/chat/completions", routes.chat, ERRORS | STREAMED),
        ("/v1/responses", routes.respond, ERRORS | STREAMED),
        (MESSAGES_PATH, routes.messages, MESSAGES_ERRORS | STREAMED),
        (f"{MESSAGES_PATH}/count_tokens", routes.count_tokens, MESSAGES_ERRORS),
        ("/tokenize", routes.tokenize, ERRORS),
        ("/detokenize", routes.detokenize, ERRORS),
    ):
        app.post(path, responses=responses, response_model=None)(route)
    index = list_routes(app)
    app.router.routes += [
        Route("/", lambda _: JSONResponse({"service": "distattn", "routes": index})),
        Route("/docs", lambda _: HTMLResponse(page(index))),
    ]
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    door = Door(app, config, paths, answers, load)
    if not config.allow_origins:
        return door
    # around the door, so that a page may read its errors too
    return CORSMiddleware(
        door,
        allow_origins=config.allow_origins,
        allow_methods=("*",),
        allow_headers=("*",),
        expose_headers=(IGNORED_HEADER, "retry-after"),
    )


class Routes:
    """What the paths do."""

    def __init__(self, config: GatewayConfig, backend: Backend, answers: Answers, load: Load) -> None:
        self._config = config
        self._backend = backend
        self._answers = answers
        self._load = load

    # --- about the service --------------------------------------------------------------------------------------------

    async def health(self) -> dict[str, str]:
        """200 only when a cell can serve."""
        if not any(cell.state != "forming" for cell in (await self._backend.stats()).cells):
            raise ApiError(503, "no instances are ready to serve", code="not_ready")
        return {"status": "ready"}

    async def ping(self) -> dict[str, str]:
        """As /health."""
        return await self.health()

    async def load(self) -> dict[str, int]:
        """POST requests under way here, and most that may be."""
        return {"server_load": self._load.in_flight, "max_concurrency": self._config.max_concurrency}

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
        ignored = self._unknown(body)
        served = await self._served(body)
        tokenizer = served.tokenizer
        dialogue = body.dialogue()
        if dialogue is not None:
            ids = await self._chat_ids(http, served, dialogue)
        else:
            ids = await _ids(
                http, tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False), "prompt"
            )

        def answer() -> bytes:
            found: dict[str, Any] = {"count": len(ids), "max_model_len": served.max_context, "tokens": ids}
            if body.return_token_strs:
                found["token_strs"] = [tokenizer.bytes_of(token).decode(errors="replace") for token in ids]
            return msgspec.json.encode(found)

        return _naming(ignored, _json(await aside(len(ids), answer)))

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        ignored = self._unknown(body)
        served = await self._backend.model(body.model)
        if not served.tokenizer.reads_text:
            raise ApiError(400, "tokens: this model has no tokenizer, so that its tokens have no text", param="tokens")
        text = await aside(len(body.tokens), lambda: served.tokenizer.decode_all(body.tokens))
        return _naming(ignored, _json(msgspec.json.encode({"prompt": text})))

    # --- tokens -------------------------------------------------------------------------------------------------------

    async def complete(self, body: CompletionRequest, http: Request) -> Response:
        """Go on with one or more prompts."""
        ignored = self._unknown(body)
        served = await self._served(body)
        given = body.prompts()
        if len(given) > self._config.max_prompts:
            raise ApiError(400, f"{len(given)} prompts; a request has at most {self._config.max_prompts}", param="prompt")
        await _check_structure(body.structure(), Toolbox(), served)
        prompts = [await _prompt(http, served, body, name, prompt) for name, prompt in given]
        wanted = _wanted(body, body.logprobs)
        drops_tokens = body.max_tokens == 0
        structure = body.structure()
        scores = [body.prompt_logprobs, body.logprobs if body.echo else None]
        generation = Generation(
            client=self._backend.client(),
            model=served.root,
            form=_envelope(
                CompletionShape(served.tokenizer, wanted, echo=bool(body.echo), drops_tokens=drops_tokens), served, body
            ),
            prompts=prompts,
            params=self._params(
                body,
                body.n or 1,
                max_tokens=body.max_tokens,
                logprobs=body.logprobs,
                prompt_logprobs=_most(scores),
                structured_outputs=None if structure is None else structure.params,
            ),
            service=body.service(),
            drops_tokens=drops_tokens,
        )
        return _naming(ignored, await _answer(http, generation, streams=body.stream))

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        wanted = _wanted(body, body.num_logprobs)
        return await self._converse(
            http,
            body,
            lambda served, prompt, reply: _envelope(ChatShape(served.tokenizer, wanted, reply), served, body),
            num_choices=body.n or 1,
            logprobs=body.num_logprobs,
            prompt_logprobs=body.prompt_logprobs,
        )

    async def respond(self, body: ResponsesRequest, http: Request) -> Response:
        """Answer a conversation, in OpenAI's newer form."""
        return await self._converse(
            http,
            body,
            lambda served, prompt, reply: ResponsesForm(body, served.tokenizer, served.name, reply),
            logprobs=body.num_logprobs,
        )

    async def messages(self, body: MessagesRequest, http: Request) -> Response:
        """Answer a conversation, as Anthropic has it."""
        return await self._converse(
            http,
            body,
            lambda served, _, reply: MessagesForm(served.name, reply, body.stop_sequences or (), body.request_id),
            logprobs=None,
            prompt_logprobs=None,
        )

    async def count_tokens(self, body: CountTokensRequest, http: Request) -> Response:
        """How many tokens a conversation has, as Anthropic counts."""
        ignored = self._unknown(body)
        ids = await self._chat_ids(http, await self._served(body), body.dialogue())
        return _naming(ignored, JSONResponse({"input_tokens": len(ids)}))

    async def _converse(
        self,
        http: Request,
        body: Talk,
        form: Callable[[Served, Prompt, ReplyForm], Form],
        *,
        num_choices: int = 1,
        **params: Any,
    ) -> Response:
        """Answer a conversation, in the form of its route. `params`: of sampling, that the route says in its own way."""
        ignored = self._unknown(body)
        served = await self._served(body)
        dialogue, asked = body.dialogue(), body.structure()
        structure = dialogue.toolbox.structure(asked)
        await _check_structure(asked, dialogue.toolbox, served)
        ids = _truncated(await self._chat_ids(http, served, dialogue), body, body.most_tokens, served)
        tail = served.tokenizer.decode_all(ids[-_TAIL_TOKENS:])
        reply = reply_form(
            served.habits, dialogue.toolbox, asked, is_opened=is_opened(tail), tells_thoughts=body.tells_thoughts
        )
        prompt = Prompt(ids, "", dialogue.field)
        generation = Generation(
            client=self._backend.client(),
            model=served.root,
            form=form(served, prompt, reply),
            prompts=[prompt],
            params=self._params(
                body,
                num_choices,
                max_tokens=body.most_tokens,
                structured_outputs=None if structure is None else reply.structured(structure.params),
                shown_special_tokens=None if reply.is_plain else served.shown_special,
                **params,
            ),
            service=body.service(),
            drops_tokens=False,
        )
        return _naming(ignored, await _answer(http, generation, streams=body.stream))

    async def _served(self, body: CompletionRequest | Talk | TokenizeRequest | CountTokensRequest) -> Served:
        """The model that is meant. Raises ApiError if there is none, or it can't read what the body holds."""
        served = await self._backend.model(body.model)
        if not served.tokenizer.reads_text and (fields := body.text_fields()):
            raise ApiError(400, f"{fields[0]}: {NO_TOKENIZER}", param=fields[0])
        return served

    async def _chat_ids(self, http: Request, served: Served, given: Dialogue) -> list[int]:
        encoding = encode(served.tokenizer, given, served.habits, trust_special=self._config.trust_special_tokens)
        return await _ids(http, encoding, given.field)

    def _unknown(self, body: Body) -> list[str]:
        """Names of fields that are ignored. Raises ApiError if none is to be."""
        names = list(body.unread())
        if names and self._config.strict:
            raise ApiError(400, f"{names[0][:100]}: no such field is known, and this gateway is strict", param=names[0][:100])
        return names

    def _params(self, body: Sampled, n: int, **others: Any) -> list[SamplingParams]:
        if n > self._config.max_n:
            raise ApiError(400, f"n must be at most {self._config.max_n}, got {n}", param="n")
        try:
            return [body.sampling(choice, **others) for choice in range(n)]
        except ValueError as error:
            raise ApiError(400, str(error), param=sampling_field(str(error))) from error


async def _prompt(http: Request, served: Served, body: CompletionRequest, name: str, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        encoding = served.tokenizer.encode(given, add_special_tokens=body.add_special_tokens is not False)
        whole = await _ids(http, encoding, name)
    else:
        whole = given
    ids = _truncated(whole, body, body.max_tokens, served)
    if isinstance(given, str) and len(ids) == len(whole):
        return Prompt(ids, given, name)
    text = await aside(len(ids), lambda: served.tokenizer.decode_all(ids)) if body.echo else ""
    return Prompt(ids, text, name)


async def _check_structure(asked: Structure | None, toolbox: Toolbox, served: Served) -> None:
    """Raises ApiError with the field and the place in it, if what the text must be makes no sense. `asked`: of a text that
    calls no tool."""
    structure = toolbox.structure(asked)
    if structure is None or await _fault(structure, served) is None:
        return
    tools = [Structure(tool.field, StructuredOutputsParams(json=json.dumps(tool.schema))) for tool in toolbox.usable]
    for part in (*tools, asked, structure):  # it may be made of several, and what is wrong is named by where it came from
        if part is not None and (error := await _fault(part, served)) is not None:
            raise error


async def _fault(structure: Structure, served: Served) -> ApiError | None:
    try:
        await asyncio.to_thread(compile_grammar, structure.params, served.tokenizer.assets)
    except TextError as error:
        if not isinstance(error, StructureError):
            return translate(error, structure.field)
        place = ".".join(map(str, (structure.field, *error.place)))[:200]
        return ApiError(400, f"{place}: {error.reason}", param=place)
    return None


def _truncated(ids: list[int], body: Sampled, max_tokens: int | None, served: Served) -> list[int]:
    """The last tokens of a prompt, if no more are wanted."""
    kept = body.truncate_prompt_tokens
    if kept is None:
        return ids
    if kept == -1:
        kept = max(1, served.max_context - (1 if max_tokens is None else max_tokens))
    return ids[-kept:]


def _envelope(shape: Shape, served: Served, body: CompletionRequest | ChatRequest) -> Envelope:
    return Envelope(
        shape,
        served.name,
        body.request_id,
        ends_with_usage=body.includes_usage,
        continues_usage=body.continues_usage,
    )


def _wanted(body: CompletionRequest | ChatRequest, logprobs: int | None) -> Wanted:
    return Wanted(
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        skip_special=body.skip_special_tokens is not False,
    )


def _most(counts: list[int | None]) -> int | None:
    """The largest of those that are given."""
    return max((count for count in counts if count is not None), default=None)


async def _ids(http: Request, encoding: Awaitable["array[int]"], field: str) -> list[int]:
    """Token ids, unless the client leaves before they are there: others wait for the same process. Raises ApiError."""
    try:
        return (await unless_gone(http.receive, encoding)).tolist()
    except TextError as error:
        raise translate(error, field) from error


async def _answer(http: Request, generation: Generation, *, streams: bool | None) -> Response:
    """A whole answer, or a stream that will run it. Raises ApiError."""
    if streams:
        return EventStream(generation)
    return _json(await unless_gone(http.receive, generation.whole()))


def _naming(ignored: list[str], response: Response) -> Response:
    """The answer, with the names of ignored fields in a header: of those that fit into one."""
    if ignored:
        names = [re.sub(r"[^A-Za-z0-9_.-]", "?", name)[:64] for name in ignored[:MAX_IGNORED_NAMES]]
        more = [f"and {len(ignored) - len(names)} more"] if len(ignored) > len(names) else []
        response.headers[IGNORED_HEADER] = ", ".join(names + more)
    return response


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.since,
        "owned_by": "distattn",
        "root": served.root,
        "max_model_len": served.max_context,
        "rope_scaling": served.rotary or None,
        "kv_dtype": served.kv_dtype or None,
    }


# --- errors -----------------------------------------------------------------------------------------------------------


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    # json, not msgspec: it escapes what a request may have held and no UTF-8 can hold
    body = json.dumps(error_body(error, request.scope["path"]))
    return Response(body, error.status_code, error.headers, media_type="application/json")


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that isn't what the route takes: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    place = [*(part for part in first.get("loc", ()) if part != "body"), *(cause.place if isinstance(cause, Wrong) else ())]
    if not place and first["type"] == "missing":
        return await _api_error(request, ApiError(400, "the body is empty: a JSON object is needed"))
    param = ".".join(map(str, place))[:200] or None
    text = first["msg"].removeprefix("Value error, ")
    if cause is None and first["type"] != "missing":
        text += f", got {shown(first.get('input'))}"
    return await _api_error(request, ApiError(400, f"{param}: {text}" if param else text, param=param))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = await _api_error(request, ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}"))
    response.headers.update(error.headers or {})  # of a 405: what is allowed
    return response
