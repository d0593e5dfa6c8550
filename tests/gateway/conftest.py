"""A real gateway between real clients and an engine that says what a test tells it to."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import grpc
import httpx
import numpy as np
import openai
import pytest
import tokenizers
from octavo.gateway.config import check_config
from octavo.gateway.server import Gateway
from octavo.proto import (
    admin_pb2,
    admin_pb2_grpc,
    engine_pb2,
    engine_pb2_grpc,
    gateway_pb2,
    generation_pb2,
    generation_pb2_grpc,
    sampling_pb2,
)
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
MAX_MODEL_LEN = 256
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
EOS = 1
LETTER_A = 37  # the id of "A"; the other capitals follow
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if loop.first and m.role == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """A small BPE: common words are a token, rare characters one token for each of their bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    bos = ("<|bos|>", 0)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing("<|bos|> $A", special_tokens=[bos])]
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@dataclass
class Answer:
    """What the engine says to a request: its tokens a few at a time, then how it ends."""

    token_ids: list[int]
    finish_reason: int = STOP
    tokens_per_message: int = 1
    hold_after: int | None = None  # tokens; what follows waits for `FakeEngine.hold` to be set
    failure: engine_pb2.Failure | None = None
    logprobs_of: list[float] = field(default_factory=lambda: [-0.5, -1.5, -2.5, -3.5])  # by rank
    samples: list[list[int]] = field(default_factory=list)  # tokens of each, where they differ
    sample_logprobs: list[float] = field(default_factory=list)  # of each token of each, where they differ
    beam_scores: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0

    def of_sample(self, index):
        """What one sample hears."""
        one = replace(self, token_ids=self.samples[index] if self.samples else self.token_ids)
        if self.sample_logprobs:
            one.logprobs_of = [0, self.sample_logprobs[index], -8, -9]
        return one


class FakeEngine(engine_pb2_grpc.EngineServicer):
    """The coordinator's service. Runs on the gateway's event loop; tests tell it beforehand what to answer."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._sessions: list[asyncio.Queue[engine_pb2.SessionResponse | None]] = []
        self.accepts = asyncio.Event()
        self.accepts.set()
        self.reset()

    def reset(self) -> None:
        self.hold = asyncio.Event()
        self.submits: list[engine_pb2.Submit] = []
        self.cancels: list[int] = []
        self.stops: list[int] = []
        self.status = admin_pb2.GetStatusResponse(version="0", model="tiny", num_gateways=1)
        self.answer = Answer([EOS])

    def say(self, text: str, **options) -> list[int]:
        """The next answers are this text, then the end-of-sequence token (or no more room: LENGTH)."""
        token_ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if options.get("finish_reason", STOP) == STOP:
            token_ids = [*token_ids, EOS]
        self.answer = Answer(token_ids, **options)
        return token_ids

    def say_samples(self, *texts: str, **options) -> list[list[int]]:
        """The next answers' samples are these texts; see `say`."""
        samples = [self.say(text, **options) for text in texts]
        self.answer = Answer([], samples=samples, **options)
        return samples

    def fail(self, code: int, message: str, **fields) -> None:
        failure = engine_pb2.Failure(code=code, message=message, **fields)
        self.answer = Answer([], failure=failure)

    def break_sessions(self) -> None:
        for news in self._sessions:
            news.put_nowait(None)

    def send(self, response: engine_pb2.SessionResponse) -> None:
        """News of a test's own."""
        for news in self._sessions:
            news.put_nowait(response)

    async def Session(self, requests, context):
        await self.accepts.wait()
        news = asyncio.Queue()
        self._sessions.append(news)
        answers = {}
        reader = asyncio.create_task(self._read(requests, news, answers))
        try:
            yield engine_pb2.SessionResponse()
            while (response := await news.get()) is not None:
                yield response
        finally:
            for task in (reader, *answers.values()):
                task.cancel()
            self._sessions.remove(news)

    async def GetStatus(self, request, context):
        return self.status

    async def _read(self, requests, news, answers):
        async for request in requests:
            for submit in request.submits:
                self.submits.append(submit)
                for handle, answer in self._answers(submit, news, self.answer, self.hold):
                    assert handle not in answers or answers[handle].done(), "a handle is used twice"
                    answers[handle] = asyncio.create_task(answer)
            for handle in np.frombuffer(request.cancel_handles, "<u4").tolist():
                self.cancels.append(handle)
                if handle in answers:  # a beam search speaks by its first
                    answers[handle].cancel()
            for handle in np.frombuffer(request.stop_handles, "<u4").tolist():
                self.stops.append(handle)
                answers[handle].cancel()

    def _answers(self, submit, news, answer, hold):
        """For each handle of the request, what speaks to it."""
        assert submit.num_samples >= 1
        handles = range(submit.handle, submit.handle + submit.num_samples)
        if answer.failure is not None:
            return [(submit.handle, self._fail(submit, news, answer))]
        if submit.HasField("beam_search"):
            return [(submit.handle, self._answer_beams(submit, news, answer, hold))]
        parts = [answer.of_sample(index) for index in range(submit.num_samples)]
        speaking = [self._answer(submit, handle, news, one, hold) for handle, one in zip(handles, parts, strict=True)]
        return list(zip(handles, speaking, strict=True))

    async def _fail(self, submit, news, answer):
        failure = engine_pb2.Failure()
        failure.CopyFrom(answer.failure)
        failure.handle = submit.handle
        news.put_nowait(engine_pb2.SessionResponse(failures=[failure]))

    async def _answer_beams(self, submit, news, answer, hold):
        """All of them in one message, with their scores."""
        if answer.hold_after is not None:
            await hold.wait()
        response = engine_pb2.SessionResponse()
        for index in range(submit.num_samples):
            one = answer.of_sample(index)
            ended = _response(submit, submit.handle + index, one.token_ids, answer.finish_reason, one)
            response = _joined(response, ended)
        response.beam_scores = np.array(answer.beam_scores[: submit.num_samples], "<f4").tobytes()
        news.put_nowait(_with_cached(response, submit, answer))

    async def _answer(self, submit, handle, news, answer, hold):
        is_first = handle == submit.handle
        if submit.sampling_params.HasField("num_prompt_logprobs") and is_first:
            prompt = np.frombuffer(submit.prompt_token_ids, "<i4").tolist()[1:]
            table = logprob_table(prompt, submit.sampling_params.num_prompt_logprobs, answer.logprobs_of)
            chunk = engine_pb2.PromptLogprobs(handle=handle, start=1, table=table)
            news.put_nowait(engine_pb2.SessionResponse(prompt_logprobs=[chunk]))
        token_ids = answer.token_ids[: submit.sampling_params.max_tokens]
        finish_reason = answer.finish_reason if token_ids == answer.token_ids else LENGTH
        for start in range(0, len(token_ids), answer.tokens_per_message):
            if answer.hold_after is not None and start >= answer.hold_after:
                await hold.wait()
            piece = token_ids[start : start + answer.tokens_per_message]
            ends = start + len(piece) == len(token_ids)
            response = _response(submit, handle, piece, finish_reason if ends else 0, answer)
            if start == 0 and is_first:
                response = _with_cached(response, submit, answer)
            news.put_nowait(response)
            await asyncio.sleep(0)


def _response(submit, handle, token_ids, finish_reason, answer):
    response = engine_pb2.SessionResponse(
        handles=np.array([handle], "<u4").tobytes(),
        num_tokens=np.array([len(token_ids)], "<u4").tobytes(),
        finish_reasons=bytes([finish_reason]),
        token_ids=np.array(token_ids, "<i4").tobytes(),
    )
    if submit.sampling_params.HasField("num_logprobs"):
        table = logprob_table(token_ids, submit.sampling_params.num_logprobs, answer.logprobs_of)
        response.logprobs.add(entry=0, table=table)
    return response


def _joined(first, second):
    """The packed arrays of both, one after another."""
    joined = engine_pb2.SessionResponse()
    for name in ("handles", "num_tokens", "finish_reasons", "token_ids", "beam_scores"):
        setattr(joined, name, getattr(first, name) + getattr(second, name))
    return joined


def _with_cached(response, submit, answer):
    if answer.num_cached_tokens:
        response.cached_handles = np.array([submit.handle], "<u4").tobytes()
        response.num_cached_tokens = np.array([answer.num_cached_tokens], "<u4").tobytes()
    return response


def logprob_table(token_ids, num_top, logprobs):
    """Each token is the second likeliest; the likeliest ones are the letters from "A" on."""
    tops = list(range(LETTER_A, LETTER_A + num_top))
    rows = [[token_id, *tops] for token_id in token_ids]
    values = [[logprobs[1], *logprobs[:num_top]] for _ in token_ids]
    return sampling_pb2.LogprobTable(
        num_columns=1 + num_top,
        token_ids=np.array(rows, "<i4").tobytes(),
        logprobs=np.array(values, "<f4").tobytes(),
        ranks=np.full(len(token_ids), 2, "<i4").tobytes(),
    )


class EventLoopThread:
    """An event loop that runs beside the test."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def start(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine):
        return self.start(coroutine).result(timeout=30)

    def call(self, function, *arguments):
        """Runs a function on the loop."""

        async def calling():
            return function(*arguments)

        return self.run(calling())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def loop():
    thread = EventLoopThread()
    yield thread
    thread.close()


@contextmanager
def reserved_port():
    """A port that nobody else gets: bound, not listening, and shared with whoever asks to share."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


async def _serve_engine(engine, address):
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    server.add_insecure_port(address)
    await server.start()
    return server


@contextmanager
def running_gateway(loop, tokenizer, model_dir, directory, **overrides):
    """A gateway on ports of its own with clients, and the engine behind it."""
    engine = loop.call(FakeEngine, tokenizer)
    engine_address = f"unix:{directory}/engine.sock"
    server = loop.run(_serve_engine(engine, engine_address))
    with reserved_port() as http_port, reserved_port() as grpc_port:
        config = {
            "engine_address": engine_address,
            "host": "127.0.0.1",
            "http_port": http_port,
            "grpc_port": grpc_port,
            "model_path": str(model_dir),
            "served_model_names": ["tiny", "tiny-alias"],
            "max_model_len": MAX_MODEL_LEN,
            "vocab_size": 384,
            "eos_token_ids": [EOS],
            "local_address": f"unix:{directory}/gateway.sock",
        }
        settings = check_config(gateway_pb2.GatewayConfig(**(config | overrides)))
        gateway = loop.call(Gateway, settings)
        running = loop.start(gateway.run())
        url = f"http://127.0.0.1:{http_port}"
        channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
        with httpx.Client(base_url=url, timeout=10) as http, channel:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10)
            names = SimpleNamespace(
                engine=engine,
                engine_server=server,
                gateway=gateway,
                running=running,
                settings=settings,
                channel=channel,
                generation=generation_pb2_grpc.GenerationStub(channel),
                admin=admin_pb2_grpc.AdminStub(channel),
                http=http,
                openai=client,
            )
            wait_until(lambda: running.done() or _is_ready(http))
            try:
                yield names
            finally:
                client.close()
                loop.call(gateway.stop, 0)
                running.result(timeout=30)
                loop.run(server.stop(0))


def _is_ready(http):
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def start_gateway(loop, tokenizer, model_dir, tmp_path):
    """start_gateway(**overrides of GatewayConfig): a context manager with a gateway of the test's own."""

    def start(**overrides):
        return running_gateway(loop, tokenizer, model_dir, tmp_path, **overrides)

    return start


@pytest.fixture(scope="session")
def shared_gateway(loop, tokenizer, model_dir, tmp_path_factory):
    with running_gateway(loop, tokenizer, model_dir, tmp_path_factory.mktemp("run")) as gateway:
        yield gateway


@pytest.fixture
def gateway(loop, shared_gateway):
    """The gateway that tests share, its engine as new."""
    loop.call(shared_gateway.engine.reset)
    wait_until(lambda: _is_ready(shared_gateway.http))  # a test before may have broken the session
    return shared_gateway


@pytest.fixture
def eventually():
    return wait_until
