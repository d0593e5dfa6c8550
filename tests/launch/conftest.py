"""A gRPC server in this process that answers as a test tells it, on a Unix socket: clients need no engine."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import pytest
from octavo.gateway.errors import to_grpc_status
from octavo.proto import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc


@dataclass
class FakeServer(generation_pb2_grpc.GenerationServicer, admin_pb2_grpc.AdminServicer):
    """Answers each Generate with `answer(request)`: responses, or an exception to raise as the gateway would."""

    answer: object = None
    status: admin_pb2.GetStatusResponse = field(default_factory=admin_pb2.GetStatusResponse)
    scaling: list = field(default_factory=list)  # messages; an error ends them
    requests: list = field(default_factory=list)
    address: str = ""

    def Generate(self, request, context):
        self.requests.append(request)
        try:
            yield from self.answer(request)
        except Exception as error:
            context.abort_with_status(to_grpc_status(error))

    def ListModels(self, request, context):
        return generation_pb2.ListModelsResponse(models=[generation_pb2.Model(name="fake", max_model_len=64)])

    def Tokenize(self, request, context):
        text = request.text or "".join(message.content for message in request.chat.messages)
        return generation_pb2.TokenizeResponse(token_ids=[ord(character) for character in text])

    def Detokenize(self, request, context):
        return generation_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    def GetStatus(self, request, context):
        return self.status

    def Scale(self, request, context):
        self.requests.append(request)
        for word in self.scaling:
            if isinstance(word, Exception):
                context.abort_with_status(to_grpc_status(word))
            yield admin_pb2.ScaleProgress(message=word)


@pytest.fixture
def fake_server(tmp_path):
    fake = FakeServer(address=f"unix:{tmp_path}/fake.sock")
    server = grpc.server(ThreadPoolExecutor(8))
    generation_pb2_grpc.add_GenerationServicer_to_server(fake, server)
    admin_pb2_grpc.add_AdminServicer_to_server(fake, server)
    server.add_insecure_port(fake.address)
    server.start()
    yield fake
    server.stop(None).wait()


def make_deltas(text, size=2, finish_reason=generation_pb2.FINISH_REASON_LENGTH):
    """`text` in pieces, a token for each character; the last piece ends the sample."""
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for index, piece in enumerate(pieces):
        response = generation_pb2.GenerateResponse(request_id="r")
        output = response.outputs.add(text=piece, token_ids=[ord(character) for character in piece])
        if index == len(pieces) - 1:
            output.finish_reason = finish_reason
            response.usage.completion_tokens = len(text)
        yield response


def make_samples(*texts, scores=()):
    """Several whole samples in one response, as OUTPUT_MODE_FINAL gives them."""
    response = generation_pb2.GenerateResponse(request_id="r", prompt_token_ids=[72, 105])
    for index, text in enumerate(texts):
        output = response.outputs.add(index=index, text=text, token_ids=map(ord, text))
        output.finish_reason = generation_pb2.FINISH_REASON_STOP
        if scores:
            output.beam_score = scores[index]
    response.usage.completion_tokens = sum(map(len, texts))
    response.usage.cached_tokens = 1
    yield response


@pytest.fixture
def samples():
    return make_samples


@pytest.fixture
def deltas():
    return make_deltas


@pytest.fixture
def write_model(tmp_path):
    """write_model(**overrides of config.json) -> a directory with a configuration and a tokenizer file, no weights."""
    import json

    def write(**overrides):
        config = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "vocab_size": 128,
            "dtype": "bfloat16",
        }
        directory = tmp_path / "tiny-llama"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config | overrides))
        (directory / "tokenizer.json").write_text("{}")
        return directory

    return write
