"""Offline generation: `LLM(model).generate(prompts, SamplingParams(...))`, on the same processes as a server."""

import atexit
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import InvalidArgumentError, UnavailableError
from .beam_search import BeamSearchOutput, BeamSearchParams, add_text, beam_search_output
from .bulk import BulkClient, BulkRequest
from .config import OFFLINE_DEFAULTS, ServeConfig
from .config_file import check_type
from .outputs import RequestOutput
from .prompts import (
    AnyParams,
    ChatMessage,
    Prompt,
    RequestOptions,
    TextPrompt,
    TokensPrompt,
    build_request,
    prompt_text,
)
from .sampling_params import SamplingParams
from .start_display import StartDisplay
from .supervisor import Supervisor

OfflinePrompt = str | TokensPrompt | TextPrompt
_NOT_OFFLINE = frozenset(
    {"host", "port", "grpc_port", "served_model_name", "first_request", "max_restarts"}
    | {"num_spare_ranks", "min_num_groups", "max_num_groups"}
)
_MAX_NUM_REQUESTS = 4096  # on their way at once; enough to keep any batch full


class LLM:
    """A model on its own coordinator, gateway and ranks, with no public port. End it with `shutdown` or `with`."""

    def __init__(self, model: str | None = None, **options: Any) -> None:  # noqa: ANN401 (options of every type)
        """`options` are those of `octavo serve`, with their names and types; `itl_target_ms` is 0 unless given. Returns
        when the model is ready.

        Raises OctavoError's kinds, in one line; nothing is left running then.
        """
        config = _offline_config(options if model is None else options | {"model": model})
        self._console = Console(stderr=True)
        self._hurry = threading.Event()
        self._supervisor: Supervisor | None = Supervisor(config, StartDisplay(self._console))
        self._client: BulkClient | None = None
        self._has_text = not config.skip_tokenizer_init
        try:
            self._supervisor.start()
            max_num_requests = min(_MAX_NUM_REQUESTS, config.max_num_waiting)
            self._client = BulkClient(self._supervisor.local_addresses[0], max_num_requests)
        except BaseException:
            self.shutdown()
            raise
        atexit.register(self.shutdown)

    def generate(
        self,
        prompts: OfflinePrompt | Sequence[OfflinePrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output a prompt, in the order of the prompts, with `n` samples in its `outputs`. `use_tqdm` shows a
        progress bar (the name is vLLM's)."""
        several = _several(prompts)
        return self._run(several, _params_for(sampling_params, len(several)), use_tqdm)

    def beam_search(
        self, prompts: OfflinePrompt | Sequence[OfflinePrompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The best sequences of each prompt, in the order of the prompts; as in vLLM their tokens and text include the
        prompt's."""
        several = _several(prompts)
        outputs = self._run(several, [params] * len(several), use_tqdm)
        found = [beam_search_output(output, params) for output in outputs]
        if self._has_text and self._client is not None:
            add_text(found, self._client.detokenize)
        return found

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or a list of them."""
        if not messages:
            raise InvalidArgumentError("messages must have at least one message", "messages")
        is_one = isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Prompt]", [messages] if is_one else messages)
        if not all(conversations):
            raise InvalidArgumentError("messages must have at least one message each", "messages")
        return self._run(conversations, _params_for(sampling_params, len(conversations)), use_tqdm)

    def _run(self, prompts: Sequence[Prompt], params: Sequence[AnyParams], use_tqdm: bool) -> list[RequestOutput]:
        if self._client is None or self._supervisor is None:
            raise InvalidArgumentError("this LLM is shut down; make another")
        requests = [_bulk_request(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        with _progress(self._console, use_tqdm) as progress:
            task = progress.add_task("Generating", total=len(requests), speed="")
            meter = _Meter(progress, task)
            try:
                return self._client.run(requests, meter.add)
            except UnavailableError:
                self._supervisor.check()  # names the process that died, if that is why
                raise

    def shutdown(self) -> None:
        """Ends the processes. May be called again."""
        atexit.unregister(self.shutdown)
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._supervisor is not None:
            self._supervisor.stop(self._hurry)
            self._supervisor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


class _Meter:
    """Counts outputs into a progress bar, with the speed so far."""

    def __init__(self, progress: Progress, task: Any) -> None:  # noqa: ANN401 (rich's TaskID)
        self._progress = progress
        self._task = task
        self._num_tokens = 0

    def add(self, output: RequestOutput) -> None:
        self._num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        elapsed_s = self._progress.tasks[0].elapsed or 0.0
        speed = f"{self._num_tokens / elapsed_s:.0f} tokens/s" if elapsed_s else ""
        self._progress.update(self._task, advance=1, speed=speed)


def _progress(console: Console, is_shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
        console=console,
        disable=not is_shown,
    )


def _offline_config(options: Mapping[str, Any]) -> ServeConfig:
    types = get_type_hints(ServeConfig)
    for name in options:
        if name in _NOT_OFFLINE or name not in types:
            raise InvalidArgumentError(f"LLM takes no option {name!r}", name)
    checked = {name: check_type(name, name, value, types[name]) for name, value in options.items()}
    return ServeConfig(**(OFFLINE_DEFAULTS | checked), port=0, grpc_port=0)


def _several(prompts: OfflinePrompt | Sequence[OfflinePrompt]) -> list[OfflinePrompt]:
    several = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    if any(not isinstance(prompt, str | Mapping) for prompt in several):
        raise InvalidArgumentError("prompts must be text or {'prompt_token_ids': [...]}, or a list of those", "prompts")
    return several


def _params_for(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    """One for each prompt. Raises InvalidArgumentError for a list of another length."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise InvalidArgumentError(
            f"sampling_params has {len(params)} entries for {num_prompts} prompts", "sampling_params"
        )
    return list(params)


def _bulk_request(prompt: Prompt, params: AnyParams) -> BulkRequest:
    return BulkRequest(build_request(prompt, params, RequestOptions(only_end=True)), prompt_text(prompt))
