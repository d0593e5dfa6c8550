"""The gateway as a process: python -m octavo.gateway CONFIG.json."""

import json
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest


@contextmanager
def gateway_process(directory, config, stdin=subprocess.DEVNULL):
    """The process; killed if it is still there at the end."""
    path = directory / "gateway.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "octavo.gateway", str(path)]
    with subprocess.Popen(command, stdin=stdin, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture
def config(shared_gateway, tmp_path):
    """A configuration beside the shared gateway: same engine, same ports."""
    settings = shared_gateway.settings
    return {
        "engineAddress": settings.engine_address,
        "host": settings.host,
        "httpPort": settings.http_port,
        "grpcPort": settings.grpc_port,
        "modelPath": str(settings.model_path),
        "servedModelNames": ["tiny-of-the-second"],
        "maxModelLen": settings.max_model_len,
        "vocabSize": settings.vocab_size,
        "eosTokenIds": [1],
        "localAddress": f"unix:{tmp_path}/second.sock",
    }


def models_served(gateway):
    """What a new connection is answered."""
    answer = httpx.get(f"{gateway.http.base_url}/v1/models")
    return answer.json()["data"][0]["id"]


def test_two_gateways_share_ports_and_sigterm_ends_one(gateway, config, tmp_path, eventually):
    with gateway_process(tmp_path, config) as process:
        seen = set()

        def both_answer():
            seen.add(models_served(gateway))
            return seen == {"tiny", "tiny-of-the-second"}

        eventually(both_answer, timeout_s=60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0
        assert "Traceback" not in process.stderr.read()
    assert {models_served(gateway) for _ in range(8)} == {"tiny"}


def test_the_end_of_stdin_ends_the_process(config, tmp_path, eventually):
    with gateway_process(tmp_path, config, stdin=subprocess.PIPE) as process:
        eventually((tmp_path / "second.sock").exists, timeout_s=60)
        process.stdin.close()
        assert process.wait(timeout=15) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(("field", "option"), [("httpPort", "--port"), ("grpcPort", "--grpc-port")])
def test_a_port_of_another_program(config, tmp_path, field, option):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with gateway_process(tmp_path, {**config, field: port}) as process:
            assert process.wait(timeout=60) == 1
            [line] = process.stderr.read().splitlines()
    assert f"127.0.0.1:{port}" in line
    assert option in line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"modelPath": "/nowhere"}, "/nowhere/tokenizer.json"),
        ({"servedModelNames": []}, "served_model_names"),
        ({"noSuchField": 1}, "noSuchField"),
        ({"eosTokenIds": [384]}, "eos_token_ids"),
        ({"httpPort": 70000}, "http_port"),
    ],
)
def test_a_wrong_configuration_is_one_line(config, tmp_path, change, named):
    with gateway_process(tmp_path, {**config, **change}) as process:
        assert process.wait(timeout=60) == 1
        [line] = process.stderr.read().splitlines()
    assert named in line
