"""A model over HTTP, as OpenAI's clients ask: `/v1/chat/completions`, `/v1/models`, and `/health`."""

import asyncio
import contextlib
import hmac
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ..video_limits import Limits
from .engine import Engine
from .media import Media, MediaRules
from .protocol import ApiError, ChatRequest, Reply, TextPart, read_request, usage_of
from .questions import Asked, Busy, End, Failure, Piece, Question

T = TypeVar("T")


@dataclass(frozen=True)
class ServerSettings:
    """
    What a server allows; all defaults are ours.

    name: the model's name to clients.
    api_key: what clients must send, if anything.
    allow_files: a folder whose files requests may name by path. allow_private: whether they may name servers of this
        machine and of private networks.
    max_requests: that are taken at a time; one more is told to come back later.
    max_body_mb, max_video_mb: of a request, and of a video that is fetched. max_frames: read of a video.
    max_new_tokens: of an answer; a request that says nothing gets `default_new_tokens`.
    fetch_seconds: for fetching, and again for reading, one video. answer_seconds: from a request to the end of its
        answer.
    """

    name: str
    api_key: str | None = None
    allow_files: Path | None = None
    allow_private: bool = False
    max_requests: int = 64
    max_body_mb: int = 64
    max_video_mb: int = 512
    max_frames: int = 256
    max_new_tokens: int = 1024
    default_new_tokens: int = 256
    fetch_seconds: float = 60.0
    answer_seconds: float = 300.0

    @property
    def limits(self) -> Limits:
        return Limits(
            frames=self.max_frames,
            download_bytes=self.max_video_mb * 2**20,
            seconds=self.fetch_seconds,
            answer_seconds=min(10.0, self.fetch_seconds),
            private_addresses=self.allow_private,
        )


def create_app(engine: Engine, settings: ServerSettings, close_seconds: float = 30.0) -> FastAPI:
    """The server's application; at its end it closes the engine, within `close_seconds`."""
    server = _Server(engine, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, close_seconds)
        server.fetching.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="LinVT", summary=f"{settings.name}, asked about videos", lifespan=lifespan)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _refused(error)

    schema = {"requestBody": {"content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}}

    @app.post("/v1/chat/completions", dependencies=[Depends(server.authorize)], openapi_extra=schema)
    async def chat_completions(request: Request) -> Response:
        return await server.chat(request)

    @app.get("/v1/models", dependencies=[Depends(server.authorize)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(server.authorize)])
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return server.model

    @app.get("/health")
    async def health() -> Response:
        state = {"status": "ok" if engine.alive else "stopping", "requests": server.requests}
        state |= {"answering": engine.answering, "waiting": engine.waiting}
        return JSONResponse(state, 200 if engine.alive else 503)

    return app


class _Streamed(StreamingResponse):
    """Says when it is over, also where it never began."""

    def __init__(self, content: AsyncIterator[str], over: Callable[[], None]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._over = over

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


class _Server:
    def __init__(self, engine: Engine, settings: ServerSettings):
        self.engine, self.settings = engine, settings
        self.requests = 0
        self.fetching = ThreadPoolExecutor(8, thread_name_prefix="linvt-fetching")
        self.model = {"id": settings.name, "object": "model", "created": int(time.time()), "owned_by": "linvt_hf"}

    async def authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.settings.api_key is not None and not hmac.compare_digest(given, self.settings.api_key.encode()):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")

    def check_model(self, name: str) -> None:
        if name != self.settings.name:
            raise ApiError(
                404, f"There is no model {name!r} here, only {self.settings.name!r}.", code="model_not_found"
            )

    async def chat(self, request: Request) -> Response:
        if self.requests >= self.settings.max_requests:
            raise ApiError(429, f"{self.requests} requests are answered already, as many as may; ask again later.")
        exchange = _Exchange(self)
        try:
            return await exchange.response(request)
        except BaseException:
            exchange.close()
            raise


class _Exchange:
    """One request on its way to its answer. `close` frees what it holds, however it ends."""

    def __init__(self, server: _Server):
        self._server, self._settings = server, server.settings
        self._folder = Path(tempfile.mkdtemp(prefix="linvt-request-"))
        self._asked: Asked | None = None
        self._events: asyncio.Queue[Piece | End | Failure] = asyncio.Queue()
        self._end, self._closed = time.monotonic() + self._settings.answer_seconds, False
        server.requests += 1

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._asked is not None:
            self._asked.cancel()
        self._server.requests -= 1
        shutil.rmtree(self._folder, ignore_errors=True)  # something may still be fetched into it

    async def response(self, request: Request) -> Response:
        try:
            chat = read_request(await asyncio.wait_for(self._body(request), self._settings.fetch_seconds))
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"The request took longer than {self._settings.fetch_seconds:g} s to come.") from error
        self._server.check_model(chat.model)
        self._check_limits(chat)
        rules = MediaRules(self._settings.limits, self._settings.allow_files)
        self._media = Media(rules, self._folder, self._end)
        loop = asyncio.get_running_loop()
        parts = [part for message in chat.messages if not isinstance(message.content, str) for part in message.content]
        if all(isinstance(part, TextPart) for part in parts):
            messages = self._media.chat(chat.messages)  # nothing to fetch, so nobody to wait behind
        else:
            fetching = loop.run_in_executor(self._server.fetching, self._media.chat, chat.messages)
            messages = await self._wait(request, fetching)
        try:
            self._asked = self._server.engine.ask(
                self._question(chat, messages), lambda event: loop.call_soon_threadsafe(self._events.put_nowait, event)
            )
        except Busy as error:
            raise ApiError(429, str(error)) from error
        except RuntimeError as error:
            raise ApiError(503, "The server is stopping.") from error
        first = await self._wait(request, self._events.get())
        if isinstance(first, Failure):
            raise self._api_error(first.error)
        reply = Reply(self._settings.name)
        if chat.stream:
            with_usage = chat.stream_options is not None and chat.stream_options.include_usage
            return _Streamed(self._stream(first, reply, with_usage), self.close)
        text, event = "", first
        while isinstance(event, Piece):
            text += event.text
            event = await self._wait(request, self._events.get())
        self.close()
        if isinstance(event, Failure):
            raise self._api_error(event.error)
        return JSONResponse(reply.whole(text, event.reason, usage_of(event.prompt_tokens, event.new_tokens)))

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Send the request as application/json.")
        body, most = bytearray(), self._settings.max_body_mb * 2**20
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise ApiError(413, f"The request is larger than {self._settings.max_body_mb} MB; give a video's URL.")
        return bytes(body)

    def _check_limits(self, chat: ChatRequest) -> None:
        for param, value, most in (
            ("max_tokens", chat.most_new_tokens, self._settings.max_new_tokens),
            ("num_frames", chat.num_frames, self._settings.max_frames),
        ):
            if value is not None and value > most:
                raise ApiError(400, f"{param} is {value}, and {most} is the most here.", param=param)

    def _question(self, chat: ChatRequest, messages: list[dict]) -> Question:
        return Question(
            messages,
            num_frames=chat.num_frames,
            fps=chat.fps,
            max_new_tokens=chat.most_new_tokens or self._settings.default_new_tokens,
            temperature=chat.temperature,
            top_p=chat.top_p,
            seed=chat.seed,
            stop=chat.stops,
            seconds=max(self._end - time.monotonic(), 0),
            limits=self._settings.limits,
        )

    async def _wait(self, request: Request, what: Awaitable[T]) -> T:
        """What it gives. Raises `ApiError` where time is over, or, for nobody to read, the client is gone."""
        waiting = asyncio.ensure_future(what)
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=0.5)
                if not waiting.done() and await request.is_disconnected():
                    raise ApiError(499, "The client went away.")
                if not waiting.done() and time.monotonic() > self._end:
                    raise self._api_error(TimeoutError())
            return waiting.result()
        finally:
            waiting.cancel()

    async def _stream(self, event: Piece | End | Failure, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
        yield _line(reply.piece({"role": "assistant", "content": ""}))
        while isinstance(event, Piece):
            yield _line(reply.piece({"content": event.text}))
            event = await self._events.get()
        if isinstance(event, Failure):
            yield _line(self._api_error(event.error).content())
            return
        yield _line(reply.piece({}, event.reason))
        if with_usage:
            yield _line(reply.usage(usage_of(event.prompt_tokens, event.new_tokens)))
        yield "data: [DONE]\n\n"

    def _api_error(self, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            seconds = self._settings.answer_seconds
            return ApiError(504, f"There was no whole answer within {seconds:g} s.", code="timeout")
        if isinstance(error, ValueError | OSError):
            return ApiError(400, self._media.in_the_requests_words(error))
        if isinstance(error, torch.OutOfMemoryError):
            return ApiError(503, "The request does not fit into memory; ask for fewer frames.")
        return ApiError(500, "The server failed; its log says why.")  # the engine wrote it there


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _refused(error: ApiError) -> Response:
    later = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.content(), error.status, headers=later)
