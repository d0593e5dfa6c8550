"""From a checked request to its output, whatever the door: check, submit, assemble, cancel."""

import random
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidArgumentError
from ..proto import sampling_pb2
from .chat_template import Message
from .config import GatewaySettings
from .engine_client import EngineClient
from .errors import UnknownModelError
from .output import OutputAssembler, OutputDelta, OutputOptions, merge
from .sampling import ModelLimits, SamplingRequest, check_prompt, check_token_ids, resolve_sampling
from .text import TextModel

MAX_REQUEST_ID_BYTES = 256
MAX_MESSAGES = 4096
MAX_DECODED_TOKENS = 1_000_000  # a tenth of a second of the event loop


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that the engine may take: nothing in it can be refused for its form any more."""

    request_id: str
    prompt_token_ids: NDArray[np.int32]  # little-endian
    sampling_params: sampling_pb2.SamplingParams
    options: OutputOptions
    priority: int = 0


class GenerationService:
    """What both doors share: the served names, the model's text side, the way to the engine."""

    def __init__(self, settings: GatewaySettings, text: TextModel | None, engine: EngineClient) -> None:
        self.model_names = settings.served_model_names
        self.limits = ModelLimits(settings.max_model_len, settings.vocab_size, frozenset(settings.eos_token_ids), text)
        self.engine = engine
        self._text = text
        self._seeds = random.Random(settings.seed) if settings.seed is not None else None  # noqa: S311 - no secret

    def check_model(self, name: str) -> str:
        """The name to show; empty means the first. Raises UnknownModelError with those served."""
        if name and name not in self.model_names:
            served = ", ".join(self.model_names)
            raise UnknownModelError(f"model {name!r} is not served; served: {served}")
        return name or self.model_names[0]

    def require_text(self, field: str) -> TextModel:
        """The text side. Raises InvalidArgumentError naming `field` when only token ids are served."""
        if self._text is None:
            raise InvalidArgumentError(f"{field}: this server has no tokenizer; send token ids", field)
        return self._text

    async def encode_prompt(self, prompt: str, field: str, add_special_tokens: bool = True) -> list[int]:
        """A plain prompt's token ids. Raises InvalidArgumentError naming `field` for an empty one."""
        text = self.require_text(field)
        if not prompt:
            raise InvalidArgumentError(f"{field} must not be empty", field)
        return await text.encode_async(prompt, add_special_tokens)

    async def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, add_special_tokens: bool = False
    ) -> list[int]:
        """A conversation's token ids. Raises InvalidArgumentError naming `messages`."""
        text = self.require_text("messages")
        if not 1 <= len(messages) <= MAX_MESSAGES:
            raise InvalidArgumentError(f"messages takes 1 to {MAX_MESSAGES}, got {len(messages)}", "messages")
        return await text.encode_chat(messages, add_generation_prompt, add_special_tokens)

    def decode(self, token_ids: Sequence[int], field: str) -> str:
        """All their text, special tokens too. Raises InvalidArgumentError naming `field`."""
        text = self.require_text(field)
        if len(token_ids) > MAX_DECODED_TOKENS:
            raise InvalidArgumentError(f"{field} takes at most {MAX_DECODED_TOKENS}, got {len(token_ids)}", field)
        check_token_ids(field, token_ids, self.limits.vocab_size)
        return text.decode(token_ids)

    def check(
        self, prompt_token_ids: Sequence[int], sampling: SamplingRequest, request_id: str = "", priority: int = 0
    ) -> CheckedRequest:
        """Raises InvalidArgumentError naming the field: `prompt`, `request_id` or one of SamplingRequest's."""
        if len(request_id.encode()) > MAX_REQUEST_ID_BYTES:
            raise InvalidArgumentError(f"request_id takes at most {MAX_REQUEST_ID_BYTES} bytes", "request_id")
        if not -(2**31) <= priority < 2**31:
            raise InvalidArgumentError(f"priority must be a 32-bit integer, got {priority}", "priority")
        prompt = check_prompt(prompt_token_ids, self.limits)
        params = resolve_sampling(sampling, len(prompt), self.limits, self._draw_seed)
        named = frozenset(sampling.stop_token_ids)
        options = OutputOptions(
            stop=tuple(sampling.stop),
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            skip_special_tokens=sampling.skip_special_tokens,
            min_tokens=sampling.min_tokens,
            named_stop_token_ids=named if sampling.ignore_eos else named - self.limits.eos_token_ids,
        )
        return CheckedRequest(request_id or secrets.token_hex(12), prompt, params, options, priority)

    async def stream(self, request: CheckedRequest, only_end: bool = False) -> AsyncGenerator[OutputDelta]:
        """Output as it comes, the last with a finish reason. Closing the generator early cancels the request.

        `only_end` says that deltas will be merged anyway, so that tokens need not wake the reader one by one.
        Raises: UnavailableError, ResourceExhaustedError or what else the engine ends the request with.
        """
        detokenizer = self._text.new_detokenizer(request.options.skip_special_tokens) if self._text else None
        assembler = OutputAssembler(request.options, detokenizer)
        packed = request.prompt_token_ids.tobytes()
        quiet = only_end and not request.options.stop  # a stop string must be seen when it comes
        stream = self.engine.submit(packed, request.sampling_params, request.priority, quiet)
        try:
            while True:
                output = assembler.push(await stream.read())
                if output.finish_reason:
                    self.engine.stop(stream)  # a stop string ends it here, and the engine does not know
                yield output
                if output.finish_reason:
                    return
        finally:
            self.engine.release(stream)

    async def complete(self, request: CheckedRequest) -> OutputDelta:
        """The whole output at once. Cancelling the caller cancels the request."""
        async with aclosing(self.stream(request, only_end=True)) as deltas:
            return merge([delta async for delta in deltas])

    def _draw_seed(self) -> int:
        return self._seeds.getrandbits(64) if self._seeds is not None else secrets.randbits(64)
