"""`octavo bench throughput`: many requests at once, offline, on the way that `LLM.generate` takes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import InternalError, InvalidArgumentError
from ..launch.bulk import BulkRequest
from ..launch.client import Client
from ..launch.config import ServeConfig
from ..launch.prompts import RequestOptions, build_request
from ..launch.sampling_params import SamplingParams
from .probe import StepMeans, total_steps
from .report import Report, Row
from .roof import Roof, percent_of_roof
from .system import System, open_bulk, running_system
from .workload import Workload

_WARM_UP_REQUESTS = 16
_WARM_UP_OUTPUT_LEN = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One system on one workload."""

    system: str
    num_prompt_tokens: int
    num_output_tokens: Sequence[int]  # of each request
    duration_s: float
    steps: StepMeans | None = None  # of Octavo only
    num_cached_tokens: int | None = None  # of the prompts' tokens; of Octavo only
    roof_s: float | None = None  # the least time, where the hardware is known

    @property
    def generated_tokens_per_s(self) -> float:
        return sum(self.num_output_tokens) / self.duration_s


def check_throughput(workload: Workload, config: ServeConfig) -> None:
    """Raises InvalidArgumentError for a workload that the system could not hold."""
    if config.max_model_len is not None and workload.longest > config.max_model_len:
        raise InvalidArgumentError(
            f"input_len and output_len come to {workload.longest} tokens, over max_model_len ({config.max_model_len})",
            "output_len",
        )


def run_throughput(config: ServeConfig, workload: Workload, num_repeats: int, report: Report) -> None:
    """Adds the table `Throughput` to the report: a row for each repeat."""
    with running_system(config) as system:
        for run in run_octavo(system, config, workload, num_repeats):
            report.add("Throughput", row_of(run))


def run_octavo(system: System, config: ServeConfig, workload: Workload, num_repeats: int) -> Iterator[Run]:
    """The workload, so many times, with other prompts each time. A short one before does what is slow only once."""
    vocab_size = system.model.config.vocab_size
    with open_bulk(system.address, config.max_num_waiting) as bulk, Client(system.address) as client:
        warm_up = workload.prompts(vocab_size, repeat=num_repeats)[:_WARM_UP_REQUESTS]
        bulk.run(_requests(warm_up, _WARM_UP_OUTPUT_LEN), lambda output: None)
        status = client.status()
        roof = Roof.of(system.model.config, status, sum(len(group.ranks) for group in status.groups))
        for repeat in range(num_repeats):
            prompts = workload.prompts(vocab_size, repeat)
            requests = _requests(prompts, workload.output_len)
            before = total_steps(client.status())
            started = time.perf_counter()
            outputs = bulk.run(requests, lambda output: None)
            duration_s = time.perf_counter() - started
            steps = StepMeans.between(before, total_steps(client.status()))
            counts = [len(output.outputs[0].token_ids) for output in outputs]
            num_cached = sum(output.num_cached_tokens or 0 for output in outputs)
            lengths = [len(prompt) for prompt in prompts]
            roof_s = None if roof is None else roof.requests_s(lengths, num_cached, counts)
            yield checked(Run("octavo", sum(lengths), counts, duration_s, steps, num_cached, roof_s), workload)


def checked(run: Run, workload: Workload) -> Run:
    """Raises InternalError if a system did less than it was asked for: its time would mean nothing."""
    if list(run.num_output_tokens) != [workload.output_len] * workload.num_prompts:
        raise InternalError(f"{run.system} generated {sum(run.num_output_tokens)} tokens, which is not what was asked")
    return run


def row_of(run: Run) -> Row:
    num_generated = sum(run.num_output_tokens)
    steps = run.steps
    return {
        "system": run.system,
        "requests": len(run.num_output_tokens),
        "s": run.duration_s,
        "requests_per_s": len(run.num_output_tokens) / run.duration_s,
        "total_tokens_per_s": (run.num_prompt_tokens + num_generated) / run.duration_s,
        "generated_tokens_per_s": run.generated_tokens_per_s,
        "roof_percent": percent_of_roof(run.roof_s, run.duration_s),
        "prompt_tokens": run.num_prompt_tokens,
        "cached_tokens": run.num_cached_tokens,
        "steps": None if steps is None else steps.num_steps,
        "step_ms": None if steps is None else steps.step_s * 1e3,
        "model_ms": None if steps is None else steps.model_s * 1e3,
    }


def _requests(prompts: Sequence[list[int]], output_len: int) -> list[BulkRequest]:
    params = SamplingParams(temperature=1.0, max_tokens=output_len, ignore_eos=True)
    options = RequestOptions(only_end=True)
    return [BulkRequest(build_request({"prompt_token_ids": prompt}, params, options), None) for prompt in prompts]
