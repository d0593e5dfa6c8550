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
from .engine_stream import EngineDelta, EngineRequest
from .errors import UnknownModelError
from .open_calls import OpenCalls
from .output import OutputAssembler, OutputOptions, RequestDelta, Usage, best, merge, without_logprobs
from .samples import Samples, StreamField, check_may_stream, check_samples
from .sampling import ModelLimits, SamplingRequest, check_prompt, check_token_ids, resolve_sampling
from .submission import Submission
from .text import TextModel

MAX_REQUEST_ID_BYTES = 256
MAX_CACHE_SALT_BYTES = 64
MAX_MESSAGES = 4096
MAX_DECODED_TOKENS = 1_000_000  # a tenth of a second of the event loop


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request says beside prompt and sampling."""

    request_id: str = ""  # empty: made up here
    priority: int = 0
    cache_salt: str = ""
    streams_by: StreamField | None = None  # None: the whole output is wanted


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that the engine may take: nothing in it can be refused for its form any more."""

    request_id: str
    prompt_token_ids: NDArray[np.int32]  # little-endian
    sampling_params: sampling_pb2.SamplingParams
    samples: Samples
    shows_logprobs: bool  # whether the client asked for those that the engine sends
    output_options: OutputOptions
    priority: int
    cache_salt: bytes

    def submission(self) -> Submission:
        return Submission(
            prompt_token_ids=self.prompt_token_ids.tobytes(),
            sampling_params=self.sampling_params,
            priority=self.priority,
            num_samples=self.samples.num_drawn,
            cache_salt=self.cache_salt,
            beam_search=self.samples.beam_search,
        )


class GenerationService:
    """What both doors share: the served names, the model's text side, the way to the engine."""

    def __init__(
        self, settings: GatewaySettings, text: TextModel | None, engine: EngineClient, calls: OpenCalls
    ) -> None:
        self.model_names = settings.served_model_names
        self.limits = ModelLimits(settings.max_model_len, settings.vocab_size, frozenset(settings.eos_token_ids), text)
        self.engine = engine
        self.calls = calls
        self._text = text
        self._seeds = random.Random(settings.seed) if settings.seed is not None else None  # noqa: S311 - no secret

    @property
    def ready(self) -> bool:
        """Whether requests can be taken."""
        return self.engine.ready and not self.calls.is_draining

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
        self, prompt_token_ids: Sequence[int], sampling: SamplingRequest, options: RequestOptions
    ) -> CheckedRequest:
        """Raises InvalidArgumentError naming the field: `prompt`, or one of SamplingRequest's or RequestOptions's."""
        _check_options(options)
        prompt = check_prompt(prompt_token_ids, self.limits)
        samples = check_samples(sampling, self.limits.vocab_size)
        if options.streams_by is not None:
            check_may_stream(samples, options.streams_by)
        return CheckedRequest(
            request_id=options.request_id or secrets.token_hex(12),
            prompt_token_ids=prompt,
            sampling_params=resolve_sampling(sampling, len(prompt), self.limits, self._draw_seed),
            samples=samples,
            shows_logprobs=sampling.logprobs is not None,
            output_options=self._output_options(sampling),
            priority=options.priority,
            cache_salt=options.cache_salt.encode(),
        )

    def _output_options(self, sampling: SamplingRequest) -> OutputOptions:
        named = frozenset(sampling.stop_token_ids)
        return OutputOptions(
            stop=tuple(sampling.stop),
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            skip_special_tokens=sampling.skip_special_tokens,
            min_tokens=sampling.min_tokens,
            named_stop_token_ids=named if sampling.ignore_eos else named - self.limits.eos_token_ids,
        )

    async def stream(self, request: CheckedRequest, only_end: bool = False) -> AsyncGenerator[RequestDelta]:
        """Output as it comes, the last with usage. Closing the generator early cancels the request.

        `only_end` says that deltas will be merged anyway, so that tokens need not wake the reader one by one.
        Raises: UnavailableError, ResourceExhaustedError or what else the engine ends the request with.
        """
        outputs = _RequestOutputs(request, self._text)
        quiet = only_end and not request.output_options.stop  # a stop string must be seen when it comes
        engine_request = self.engine.submit(request.submission(), quiet)
        try:
            while True:
                delta = outputs.push(await engine_request.read(), engine_request, self.engine)
                yield delta
                if delta.usage is not None:
                    return
        finally:
            self.engine.release(engine_request)

    async def complete(self, request: CheckedRequest) -> RequestDelta:
        """The whole output at once, of best_of the best. Cancelling the caller cancels the request."""
        async with aclosing(self.stream(request, only_end=True)) as deltas:
            whole = merge([delta async for delta in deltas])
        if not request.samples.are_ranked:
            return whole
        ranked = best(whole, request.samples.n)
        return ranked if request.shows_logprobs else without_logprobs(ranked)

    def _draw_seed(self) -> int:
        return self._seeds.getrandbits(64) if self._seeds is not None else secrets.randbits(64)


def _check_options(options: RequestOptions) -> None:
    if len(options.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise InvalidArgumentError(f"request_id takes at most {MAX_REQUEST_ID_BYTES} bytes", "request_id")
    if not -(2**31) <= options.priority < 2**31:
        raise InvalidArgumentError(f"priority must be a 32-bit integer, got {options.priority}", "priority")
    if len(options.cache_salt.encode()) > MAX_CACHE_SALT_BYTES:
        message = f"cache_salt takes at most {MAX_CACHE_SALT_BYTES} bytes; send a hash of a longer one"
        raise InvalidArgumentError(message, "cache_salt")


class _RequestOutputs:
    """The outputs of one request on their way: what each sample's tokens say, and their count."""

    def __init__(self, request: CheckedRequest, text: TextModel | None) -> None:
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._num_output_tokens = [0] * request.samples.num_drawn
        self._assemblers = [self._assembler(request, text, index) for index in range(request.samples.num_drawn)]

    @staticmethod
    def _assembler(request: CheckedRequest, text: TextModel | None, index: int) -> OutputAssembler:
        options = request.output_options
        detokenizer = text.new_detokenizer(options.skip_special_tokens) if text is not None else None
        return OutputAssembler(options, detokenizer, index)

    def push(
        self, news: Sequence[tuple[int, EngineDelta]], request: EngineRequest, engine: EngineClient
    ) -> RequestDelta:
        """Reads news. A sample that a stop string ends here is ended in the engine, which does not know."""
        outputs = []
        for index, delta in news:
            output = self._assemblers[index].push(delta)
            self._num_output_tokens[index] = output.num_output_tokens
            if output.finish_reason:
                engine.stop(request.streams[index])
            outputs.append(output)
        usage = None if request.num_open else self._usage(request)
        return RequestDelta(outputs, request.prompt_logprobs, usage)

    def _usage(self, request: EngineRequest) -> Usage:
        return Usage(self._num_prompt_tokens, sum(self._num_output_tokens), request.num_cached_tokens)
