"""One command, a real two-rank Ray cluster, and real clients: grpcio, the openai package, curl."""

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import openai
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from octavo.proto import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc

from .ports import free_port

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30
NUM_CONCURRENT = 64


@dataclass
class Server:
    """`octavo serve` in a process of its own."""

    process: subprocess.Popen
    http_port: int
    grpc_port: int
    output: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.output)

    def read(self) -> None:
        with self.process.stdout as lines:
            self.output.extend(lines)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ctrl-C stops it" not in self.text:
            assert self.process.poll() is None, f"the server ended:\n{self.text}"
            assert time.monotonic() < deadline, f"the server is not ready:\n{self.text}"
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def start_server(*options: str) -> Server:
    http_port, grpc_port = free_port(), free_port()
    command = [sys.executable, "-m", "octavo", "serve", *options]
    command += ["--device", "cpu", "--port", str(http_port), "--grpc-port", str(grpc_port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    server = Server(process, http_port, grpc_port)
    threading.Thread(target=server.read, daemon=True).start()
    return server


def stop_server(server: Server, number: int = signal.SIGINT) -> int:
    """Interrupts; checks that every process and port is gone; the exit code."""
    family = server.family()
    server.process.send_signal(number)
    code = server.process.wait(STOP_TIMEOUT_S)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive, f"left running: {[process.cmdline() for process in alive]}"
    for port in (server.http_port, server.grpc_port):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} still answers"
    return code


@pytest.fixture(scope="module")
def server():
    running = start_server("--tensor-parallel-size", "2", "--num-gateways", "2", "--first-request", "What is 27 + 15?")
    try:
        running.wait_until_ready()
        yield running
    finally:
        if running.process.poll() is None:
            stop_server(running)


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(f"localhost:{server.grpc_port}") as channel:
        yield channel


@pytest.fixture
def generation(channel):
    return generation_pb2_grpc.GenerationStub(channel)


@pytest.fixture
def status(channel):
    admin = admin_pb2_grpc.AdminStub(channel)
    return lambda: admin.GetStatus(admin_pb2.GetStatusRequest())


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"http://localhost:{server.http_port}/v1", api_key="none") as client:
        yield client


def wait_until_idle(status) -> None:
    """All blocks come back, and nothing runs or waits."""
    deadline = time.monotonic() + 10
    while True:
        now = status()
        if all(g.num_running == 0 and g.num_free_blocks == g.num_blocks for g in now.groups) and not now.num_waiting:
            return
        assert time.monotonic() < deadline, now
        time.sleep(0.05)


def chat_request(question: str, **sampling) -> generation_pb2.GenerateRequest:
    message = generation_pb2.ChatMessage(role="user", content=question)
    return generation_pb2.GenerateRequest(
        chat=generation_pb2.ChatPrompt(messages=[message]),
        sampling_params=generation_pb2.SamplingParams(**({"temperature": 0, "max_tokens": 64} | sampling)),
    )


def endless_request() -> generation_pb2.GenerateRequest:
    sampling = generation_pb2.SamplingParams(max_tokens=1800, ignore_eos=True, seed=3)
    return generation_pb2.GenerateRequest(text="Once upon a time", sampling_params=sampling)


def test_the_command_shows_its_steps_an_answer_and_how_to_ask_more(server):
    for step in ("ray ", "ranks ", "weights", "groups ", "gateways "):
        assert re.search(rf"^ *(group 0 +)?{step}.*\d\.\d s$", server.text, re.MULTILINE), server.text
    assert "27 + 15 = 42." in server.text
    assert f"--address localhost:{server.grpc_port}" in server.text
    assert f"curl http://localhost:{server.http_port}/v1/completions" in server.text


def test_ranks_run_with_the_variables_that_they_need_and_others_do_not(server):
    family = {process: " ".join(process.cmdline()) for process in server.family()}
    ranks = [process for process, command in family.items() if "RankActor" in command]
    others = [process for process, command in family.items() if "octavo." in command]  # gateways and the coordinator
    wanted = {"OMP_WAIT_POLICY": "passive", "GRPC_VERBOSITY": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    assert [wanted.items() <= rank.environ().items() for rank in ranks] == [True, True]
    assert [other.environ().get("OMP_WAIT_POLICY") for other in others] == [None] * 3


def test_grpc_streams_deltas_and_usage_with_the_last(generation):
    responses = list(generation.Generate(chat_request("What is 44 + 19?")))
    assert len(responses) > 3
    assert "".join(output.text for r in responses for output in r.outputs) == "44 + 19 = 63."
    num_tokens = sum(len(output.token_ids) for r in responses for output in r.outputs)
    assert [r.HasField("usage") for r in responses] == [False] * (len(responses) - 1) + [True]
    assert responses[-1].usage.completion_tokens == num_tokens
    assert responses[-1].outputs[0].finish_reason == generation_pb2.FINISH_REASON_STOP


def test_openai_chat_streamed_equals_whole(client):
    messages = [{"role": "user", "content": "Tell me a story about a fox."}]
    whole = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    streamed = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(streamed)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(re.findall(r"[.!?]", text)) >= 3, text
    assert chunks[-1].usage == whole.usage


def test_seeded_completions_repeat(client):
    def ask(seed):
        return client.completions.create(
            model="demo", prompt="Once upon a time", max_tokens=40, temperature=1.2, seed=seed, logprobs=2
        ).choices[0]

    first, again, other = ask(5), ask(5), ask(6)
    assert first.text == again.text != other.text
    # The other request's step may add in another order: the numbers agree to rounding.
    assert first.logprobs.token_logprobs == pytest.approx(again.logprobs.token_logprobs, abs=1e-4)
    assert first.logprobs.tokens == again.logprobs.tokens


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_reads_server_sent_events(server):
    body = {"model": "demo", "prompt": "36 + 48 =", "max_tokens": 6, "temperature": 0, "stream": True, "stop": "."}
    url = f"http://localhost:{server.http_port}/v1/completions"
    header = "Content-Type: application/json"
    answer = subprocess.run(
        ["curl", "-sSN", url, "-H", header, "-d", json.dumps(body)], capture_output=True, text=True, check=True
    ).stdout
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == " 84"


def test_held_out_sums_asked_by_64_clients_at_once(client, script, status):
    pairs = random.Random(0).sample(list(script("arithmetic").held_out_pairs()), 2 * NUM_CONCURRENT)

    def ask(pair):
        content = f"What is {pair[0]} + {pair[1]}?"
        messages = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=24)
        return answer.choices[0].message.content == f"{pair[0]} + {pair[1]} = {sum(pair)}."

    with ThreadPoolExecutor(NUM_CONCURRENT) as pool:
        right = list(pool.map(ask, pairs))
    assert sum(right) / len(right) >= 0.95
    wait_until_idle(status)


def test_64_streams_at_once_say_what_each_says_alone(generation):
    questions = [f"What is {a} + {b}?" for a in range(10, 18) for b in range(20, 28)]
    assert len(questions) == NUM_CONCURRENT

    def ask(question):
        return "".join(output.text for r in generation.Generate(chat_request(question)) for output in r.outputs)

    with ThreadPoolExecutor(NUM_CONCURRENT) as pool:
        together = list(pool.map(ask, questions))
    assert together[::8] == [ask(question) for question in questions[::8]]


def test_a_cancelled_grpc_stream_frees_its_blocks(generation, status):
    before = status().counters.num_cancelled
    call = generation.Generate(endless_request())
    next(call)
    assert status().groups[0].num_running == 1
    call.cancel()
    wait_until_idle(status)
    assert status().counters.num_cancelled == before + 1


def test_a_client_that_hangs_up_frees_its_blocks(client, status):
    before = status().counters.num_cancelled
    prompt = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 1800, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**prompt, stream=True) as streamed:
        next(iter(streamed))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5, max_retries=0).completions.create(**prompt)
    wait_until_idle(status)
    assert status().counters.num_cancelled == before + 2


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 2}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
    ],
)
def test_bad_input_is_refused_by_name_and_the_server_goes_on(generation, sampling, named):
    with pytest.raises(grpc.RpcError) as caught:
        list(generation.Generate(chat_request("Hello", **sampling)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = error_details_pb2.BadRequest()
    assert rpc_status.from_call(caught.value).details[0].Unpack(details)
    assert details.field_violations[0].field.split(".")[-1] == named
    assert list(generation.Generate(chat_request("What is 1 + 1?", max_tokens=1)))


def test_interrupt_leaves_nothing_behind(server):
    """The last of the module: it stops the server."""
    assert stop_server(server) == 0


def test_a_server_that_cannot_start_says_why_in_one_line_and_leaves_nothing_running(tmp_path):
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options, cause in {
            ("--port", str(port)): f"{port}",
            (str(tmp_path / "nowhere"),): "nowhere",
            ("--tensor-parallel-size", "3"): "sizes that do: 1, 2, 4, 8",
            ("--num-gpu-blocks-override", "900000000"): "--num-gpu-blocks-override",
        }.items():
            command = [sys.executable, "-m", "octavo", "serve", "--device", "cpu", *options]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
            assert ended.returncode not in (0, -signal.SIGKILL), options
            last = ended.stderr.strip().splitlines()[-1]
            assert cause in last, ended.stderr
            assert "Traceback" not in ended.stderr
    after = {process.pid for process in psutil.Process().children(recursive=True)}
    assert after <= before
