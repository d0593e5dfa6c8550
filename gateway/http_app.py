"""The OpenAI HTTP door: routes, error shapes, the bound on bodies."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InvalidArgumentError, OctavoError
from .block_report import block_report
from .config import MAX_MESSAGE_BYTES
from .errors import PayloadTooLargeError
from .generation import GenerationService
from .open_calls import CallCounter
from .openai_chat import answer_chat
from .openai_completions import answer_completion
from .openai_models import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, plain_messages
from .sse import error_response, json_response

_MAX_REPORTED_ERRORS = 3
_MAX_NAME = 64  # characters of a name that nobody knows, in an error


class BodyLimit:
    """Refuses bodies over MAX_MESSAGE_BYTES with 413, by their stated length or as they come."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > MAX_MESSAGE_BYTES:
            await error_response(_too_large())(scope, receive, send)
            return
        num_bytes = 0

        async def bounded_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_MESSAGE_BYTES:
                raise HTTPException(413)  # the only kind of error that the framework lets through here
            return message

        await self._app(scope, bounded_receive, send)


def _too_large() -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is over {MAX_MESSAGE_BYTES} bytes")


def build_http_app(service: GenerationService) -> FastAPI:
    """The application; it holds no state of its own."""
    app = FastAPI(title="Octavo", version=metadata.version("octavo"))
    app.add_middleware(BodyLimit)
    app.add_middleware(CallCounter, calls=service.calls)
    app.add_exception_handler(OctavoError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_error)
    _add_generation_routes(app, service)
    _add_model_routes(app, service)
    _add_text_routes(app, service)
    _add_status_routes(app, service)
    return app


def _add_generation_routes(app: FastAPI, service: GenerationService) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody) -> Response:
        return await answer_completion(service, body)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody) -> Response:
        return await answer_chat(service, body)


def _add_model_routes(app: FastAPI, service: GenerationService) -> None:
    def describe(name: str) -> dict[str, Any]:
        limit = service.limits.max_model_len
        return {"id": name, "object": "model", "created": 0, "owned_by": "octavo", "max_model_len": limit}

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return json_response({"object": "list", "data": [describe(name) for name in service.model_names]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        return json_response(describe(service.check_model(name)))

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """200 when requests can be taken."""
        if service.calls.is_draining:
            return json_response({"status": "the server is shutting down"}, 503)
        ready = service.ready
        return json_response({"status": "ready" if ready else "the engine is not ready"}, 200 if ready else 503)

    @app.get("/version", response_model=None)
    async def version() -> Response:
        return json_response({"version": app.version})


def _add_text_routes(app: FastAPI, service: GenerationService) -> None:
    @app.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeBody) -> Response:
        service.check_model(body.model)
        token_ids = await _tokenize(service, body)
        text = service.require_text("prompt")
        strings = [text.token_name(token_id) for token_id in token_ids] if body.return_token_strs else None
        limit = service.limits.max_model_len
        content = {"count": len(token_ids), "max_model_len": limit, "tokens": token_ids, "token_strs": strings}
        return json_response(content)

    @app.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeBody) -> Response:
        service.check_model(body.model)
        return json_response({"prompt": service.decode(body.tokens, "tokens")})


def _add_status_routes(app: FastAPI, service: GenerationService) -> None:
    @app.get("/v1/octavo/blocks", response_model=None)
    async def blocks() -> Response:
        """The KV blocks of each group; the fields are BlockReport's."""
        status = await service.engine.get_status()
        groups = [block_report(group).to_json() for group in status.groups]
        return json_response({"object": "octavo.blocks", "model": status.model, "groups": groups})


async def _tokenize(service: GenerationService, body: TokenizeBody) -> Sequence[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidArgumentError("prompt: send either prompt or messages", "prompt")
    if body.messages is None:
        add = body.add_special_tokens is not False
        return await service.require_text("prompt").encode_async(body.prompt or "", add)
    messages = plain_messages(body.messages)
    return await service.encode_chat(messages, body.add_generation_prompt, bool(body.add_special_tokens))


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the framework refuses: an unknown path, a wrong method, a body that cannot be read."""
    assert isinstance(error, HTTPException)
    if error.status_code == 413:
        return error_response(_too_large())
    body = {"message": f"{request.method} {request.url.path}: {error.detail}", "type": "invalid_request_error"}
    return json_response({"error": {**body, "param": None, "code": None}}, error.status_code, error.headers)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    """Names the first wrong fields."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()[:_MAX_REPORTED_ERRORS]
    if problems[0]["loc"] == ("body",) and isinstance(error.body, bytes):
        return error_response(InvalidArgumentError("send JSON, with the header Content-Type: application/json"))
    named = [(_field(problem), _reason(problem)) for problem in problems]
    message = "; ".join(dict.fromkeys(f"{field}: {text}" if field else text for field, text in named))
    return error_response(InvalidArgumentError(message, named[0][0] or None))


def _field(problem: Mapping[str, Any]) -> str:
    """The path in the body, less the names that pydantic gives to a union's members."""
    location = problem["loc"][1:]  # less "body"
    if problem["type"] == "json_invalid":  # a position
        return ""
    parts = [str(part) for part in location[:-1] if _is_name(part)]
    if location and (_is_name(location[-1]) or problem["type"] == "extra_forbidden"):
        parts.append(str(location[-1])[:_MAX_NAME].encode(errors="replace").decode())
    return ".".join(parts)


def _is_name(part: str | int) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "float", "bool"))


def _reason(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return "this server knows no such field here"
    return str(problem["msg"])
