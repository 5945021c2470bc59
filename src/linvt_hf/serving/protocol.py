"""OpenAI's chat completions as this server speaks them: what is taken, what is refused, and how answers look."""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# Of OpenAI's own settings: what changes nothing here, and what would change the answer and is not there.
_IGNORED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
_MISSING = {
    "audio": None,
    "frequency_penalty": 0,
    "function_call": None,
    "functions": None,
    "logit_bias": None,
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "prediction": None,
    "presence_penalty": 0,
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "tools": None,
    "top_logprobs": None,
    "verbosity": None,
    "web_search_options": None,
}
_STOPS, _STOP_LENGTH = 4, 1000  # as many as with OpenAI; the length is ours


class ApiError(Exception):
    """What is answered instead: an HTTP status, and one sentence."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def content(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Url(_Strict):
    """An http(s) or data: URL, or, where the server allows it, a path. `detail` is OpenAI's, and changes nothing."""

    url: str
    detail: str | None = None


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: Url


class VideoPart(_Strict):
    type: Literal["video_url"]
    video_url: Url


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    """
    OpenAI's request for a chat completion, with `video_url` parts, and two settings more:

    num_frames, fps: how videos are sampled, instead of the model's defaults.

    `temperature` and `top_p` that are not given are the model's own.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    num_frames: int | None = Field(default=None, ge=1)
    fps: float | None = Field(default=None, gt=0)

    @property
    def most_new_tokens(self) -> int | None:
        """By its new name or its old one."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


def read_request(body: bytes) -> ChatRequest:
    """Raises `ApiError` for what is no request, and for what this server would have to leave out."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        where, wrong = _what_is_wrong(error)
        raise ApiError(400, f"{where or 'The request'}: {wrong}.", param=where) from error
    if len(request.stops) > _STOPS or any(len(text) > _STOP_LENGTH for text in request.stops):
        longest = max(map(len, request.stops))
        raise ApiError(
            400,
            f"stop holds {len(request.stops)} texts of up to {longest} characters; {_STOPS} of {_STOP_LENGTH} are the "
            "most.",
            param="stop",
        )
    for name, value in (request.model_extra or {}).items():
        if name in _MISSING:
            if value not in (None, _MISSING[name], [], {}):
                raise ApiError(400, f"{name} is not supported by this server; leave it out.", param=name)
        elif name not in _IGNORED:
            raise ApiError(400, f"There is no setting {name}.", param=name)
    return request


def _what_is_wrong(error: ValidationError) -> tuple[str | None, str]:
    """Where in the request, and what."""
    # A content may be a text or a list of parts, and what is neither is an error of both; the one that lies deeper is
    # of what was meant. Beside the request's own names a place holds those of such types.
    found = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    names = [str(part) for part in found["loc"]]
    return ".".join(name for name in names if name != "str" and "[" not in name) or None, found["msg"]


class Reply:
    """How one answer is written, whole or in pieces."""

    def __init__(self, model: str):
        self._about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return {**self._about, "object": "chat.completion", "choices": [choice], "usage": usage}

    def piece(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**self._about, "object": "chat.completion.chunk", "choices": [choice]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._about, "object": "chat.completion.chunk", "choices": [], "usage": usage}


def usage_of(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }
