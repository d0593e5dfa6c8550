"""`octavo bench serve`: clients at a public door, in a process of their own, at given arrival rates."""

import contextlib
import math
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson

from ..errors import InternalError, InvalidArgumentError, UnavailableError
from ..workers.model_config import ModelConfig
from .load_client import LoadSpec
from .observation import Observation
from .report import Report, Row
from .summary import percentile_columns
from .synthetic_tokenizer import write_tokenizer

_SECONDS_OF_ARRIVALS = 20  # how many requests a rate gets, unless told
_ALL_AT_ONCE_REQUESTS = 1000
_WARM_UP_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """One load for each rate, in this order."""

    request_rates: tuple[float, ...]  # requests a second; inf: all at once
    num_prompts: int | None  # None: as many as arrive in _SECONDS_OF_ARRIVALS
    input_len: str  # as LengthRange.parse
    output_len: int
    seed: int

    def __post_init__(self) -> None:
        if wrong := [rate for rate in self.request_rates if not rate > 0]:
            raise InvalidArgumentError(f"request_rate must be over 0 (or inf), got {wrong[0]}", "request_rate")

    def count(self, rate: float) -> int:
        if self.num_prompts is not None:
            return self.num_prompts
        return _ALL_AT_ONCE_REQUESTS if math.isinf(rate) else max(1, round(rate * _SECONDS_OF_ARRIVALS))


def load_specs(settings: ServeSettings, door: str, target: str, model: str, vocab_size: int) -> list[LoadSpec]:
    """Raises InvalidArgumentError for settings that make no sense, before anything is started."""
    specs = [
        LoadSpec(
            door=door,
            target=target,
            model=model,
            vocab_size=vocab_size,
            num_prompts=settings.count(rate),
            input_len=settings.input_len,
            output_len=settings.output_len,
            requests_per_s=None if math.isinf(rate) else rate,
            seed=settings.seed + index,  # no rate finds the blocks of another's prompts
        )
        for index, rate in enumerate(settings.request_rates)
    ]
    for spec in specs:
        spec.workload()
    return specs


def run_serve(specs: Sequence[LoadSpec], report: Report) -> None:
    """Adds the table `Served` to the report."""
    warm_up = replace(specs[0], num_prompts=_WARM_UP_REQUESTS, requests_per_s=None, seed=specs[-1].seed + 1)
    run_clients(warm_up)
    for spec in specs:
        report.add("Served", summarize(spec, run_clients(spec)))


def run_clients(spec: LoadSpec) -> list[Observation]:
    """In a process of their own. Raises UnavailableError if every request fails."""
    command = [sys.executable, "-m", "octavo.benchmarks.load_client"]
    clients = subprocess.run(command, input=orjson.dumps(asdict(spec)), stdout=subprocess.PIPE, check=False)
    if clients.returncode != 0:
        raise InternalError(f"the client process failed with status {clients.returncode}; its log is above")
    observations = [Observation(**fields) for fields in orjson.loads(clients.stdout)]
    errors = [observation.error for observation in observations if observation.error is not None]
    if len(errors) == len(observations):
        raise UnavailableError(f"every request failed: {errors[0]}")
    return observations


def summarize(spec: LoadSpec, observations: Sequence[Observation]) -> Row:
    """One row. Times are those of the requests that ended well and were streamed."""
    done = [observation for observation in observations if observation.error is None]
    duration_s = max(one.finished_at_s for one in done) - min(one.sent_at_s for one in done)
    return {
        "asked_requests_per_s": "all at once" if spec.requests_per_s is None else spec.requests_per_s,
        "requests": len(observations),
        "failed": len(observations) - len(done),
        "done_requests_per_s": len(done) / duration_s,
        "generated_tokens_per_s": sum(one.num_tokens for one in done) / duration_s,
        **percentile_columns("ttft", [one.ttft_s for one in done if one.is_streamed]),
        **percentile_columns("itl", [gap_s for one in done for gap_s in one.gaps_s]),
    }


@contextlib.contextmanager
def with_tokenizer(directory: Path) -> Iterator[Path]:
    """The model's directory; one with a synthetic tokenizer if it has none."""
    if (directory / "tokenizer.json").is_file():
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as made:
        for path in [directory / "config.json", *directory.glob("*.safetensors*")]:
            (Path(made) / path.name).symlink_to(path.resolve())
        write_tokenizer(Path(made), ModelConfig.from_directory(directory).vocab_size)
        yield Path(made)


def free_port() -> int:
    """One that nobody has now; another process may take it before its use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
