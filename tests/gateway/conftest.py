"""A real gateway between real clients and an engine that says what a test tells it to."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import grpc
import httpx
import openai
import pytest
import tokenizers
from octavo.gateway.config import check_config
from octavo.gateway.server import Gateway
from octavo.proto import admin_pb2_grpc, engine_pb2_grpc, gateway_pb2, generation_pb2_grpc
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from .fake_engine import EOS, FakeEngine

MAX_MODEL_LEN = 256
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
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
            "max_outage_s": 60.0,
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
