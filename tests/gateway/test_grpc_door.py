"""The gRPC door: octavo.v1 from a real client through a real gateway."""

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from octavo.proto import admin_pb2, generation_pb2
from octavo.proto.generation_pb2 import ChatMessage, ChatPrompt, GenerateRequest, SamplingParams, TokenIds

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
EOS = 1
TEXT = "the quick brown fox – naïve 漢字 👩‍🚀 jumps"


def output_text(responses):
    return "".join(output.text for response in responses for output in response.outputs)


def output_ids(responses):
    return [token_id for response in responses for output in response.outputs for token_id in output.token_ids]


@pytest.mark.parametrize("tokens_per_message", [1, 3, 1000])
def test_deltas_make_the_text_whatever_the_cut(gateway, tokens_per_message):
    token_ids = gateway.engine.say(TEXT, tokens_per_message=tokens_per_message)
    responses = list(gateway.generation.Generate(GenerateRequest(text="hello")))
    assert output_text(responses) == TEXT
    assert output_ids(responses) == token_ids
    assert all("�" not in output.text for response in responses for output in response.outputs)
    assert [r.outputs[0].finish_reason for r in responses][-1] == STOP
    assert not any(r.outputs[0].finish_reason or r.HasField("usage") for r in responses[:-1])
    usage = responses[-1].usage
    assert usage.completion_tokens == len(token_ids)
    assert usage.prompt_tokens == len(np.frombuffer(gateway.engine.submits[0].prompt_token_ids, "<i4"))
    assert len({response.request_id for response in responses}) == 1
    assert responses[-1].outputs[0].WhichOneof("stop_reason") is None  # the end-of-sequence token is none


def test_final_mode_gives_one_response(gateway):
    token_ids = gateway.engine.say(TEXT)
    request = GenerateRequest(text="hello", output_mode=generation_pb2.OUTPUT_MODE_FINAL, request_id="mine")
    [response] = gateway.generation.Generate(request)
    assert response.outputs[0].text == TEXT
    assert response.outputs[0].token_ids == token_ids
    assert response.request_id == "mine"
    assert response.usage.completion_tokens == len(token_ids)


def test_prompts_reach_the_engine_as_the_tokenizer_makes_them(gateway, tokenizer):
    chat = ChatPrompt(messages=[ChatMessage(role="user", content="hi")])
    generate, sent = gateway.generation.Generate, []
    for request in (
        GenerateRequest(text="the fox", return_prompt_token_ids=True),
        GenerateRequest(token_ids=TokenIds(ids=[7, 8, 9]), return_prompt_token_ids=True),
        GenerateRequest(chat=chat, return_prompt_token_ids=True),
    ):
        responses = list(generate(request))
        sent.append(list(responses[0].prompt_token_ids))
        assert not any(response.prompt_token_ids for response in responses[1:])
    assert sent[0] == tokenizer.encode("the fox").ids
    assert sent[1] == [7, 8, 9]
    rendered = "<|bos|><|user|>hi<|eos|><|assistant|>"
    assert sent[2] == tokenizer.encode(rendered, add_special_tokens=False).ids
    assert [np.frombuffer(s.prompt_token_ids, "<i4").tolist() for s in gateway.engine.submits] == sent


def test_sampling_parameters_reach_the_engine_resolved(gateway, tokenizer):
    params = SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={9: 2.5, 10: -100},
        seed=-1,
        stop_token_ids=[5],
        max_tokens=9,
        min_tokens=2,
        bad_words=["fox"],
        logprobs=3,
        prompt_logprobs=0,
    )
    list(gateway.generation.Generate(GenerateRequest(text="a", sampling_params=params, priority=-4)))
    [submit] = gateway.engine.submits
    sent = submit.sampling_params
    assert submit.priority == -4
    assert (sent.temperature, sent.top_p, sent.top_k, sent.min_p) == (0.5, 0.25, 7, 0.125)
    assert (sent.presence_penalty, sent.frequency_penalty, sent.repetition_penalty) == (1, -1, 1.5)
    assert np.frombuffer(sent.logit_bias_token_ids, "<i4").tolist() == [9, 10]
    assert np.frombuffer(sent.logit_bias_values, "<f4").tolist() == [2.5, -100]
    assert sent.seed == 2**64 - 1
    assert np.frombuffer(sent.stop_token_ids, "<i4").tolist() == [EOS, 5]
    assert (sent.max_tokens, sent.min_tokens) == (9, 2)
    words = [np.frombuffer(word, "<i4").tolist() for word in sent.bad_words]
    assert words[0] == tokenizer.encode("fox", add_special_tokens=False).ids
    assert (sent.num_logprobs, sent.num_prompt_logprobs) == (3, 0)


def test_defaults(gateway):
    list(gateway.generation.Generate(GenerateRequest(token_ids=TokenIds(ids=[7, 8]))))
    list(gateway.generation.Generate(GenerateRequest(token_ids=TokenIds(ids=[7, 8]))))
    first, second = (submit.sampling_params for submit in gateway.engine.submits)
    assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (1, 1, 0, 1)
    assert first.max_tokens == gateway.settings.max_model_len - 2
    assert not first.HasField("num_logprobs")
    assert first.seed != second.seed


def test_ignore_eos_leaves_only_the_named_stops(gateway):
    params = SamplingParams(ignore_eos=True, stop_token_ids=[5])
    list(gateway.generation.Generate(GenerateRequest(text="a", sampling_params=params)))
    resolved = gateway.engine.submits[0].sampling_params
    assert np.frombuffer(resolved.stop_token_ids, "<i4").tolist() == [5]
    assert np.frombuffer(resolved.masked_token_ids, "<i4").tolist() == [EOS]  # before min_tokens


def test_a_seeded_server_draws_the_same_seeds_again(start_gateway):
    def seeds():
        with start_gateway(seed=5) as own:
            for _ in range(2):
                list(own.generation.Generate(GenerateRequest(text="a")))
            return [submit.sampling_params.seed for submit in own.engine.submits]

    first = seeds()
    assert first == seeds()
    assert first[0] != first[1]


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_over_several_tokens(gateway, eventually, include):
    gateway.engine.say("the lazy dog sleeps here", hold_after=20)
    params = SamplingParams(stop=["never", "g slee"], include_stop_str_in_output=include)
    responses = list(gateway.generation.Generate(GenerateRequest(text="a", sampling_params=params)))
    assert output_text(responses) == ("the lazy dog slee" if include else "the lazy do")
    last = responses[-1].outputs[0]
    assert (last.finish_reason, last.stop_string) == (STOP, "g slee")
    assert responses[-1].usage.completion_tokens == len(output_ids(responses))
    eventually(lambda: gateway.engine.stops == [gateway.engine.submits[0].handle])
    assert not gateway.engine.cancels  # it has ended as it should


def test_named_stop_token_is_the_reason_and_not_in_the_text(gateway, tokenizer):
    token_ids = tokenizer.encode("the fox", add_special_tokens=False).ids
    gateway.engine.say("the fox")
    gateway.engine.answer.token_ids = token_ids
    params = SamplingParams(stop_token_ids=[token_ids[-1]])
    responses = list(gateway.generation.Generate(GenerateRequest(text="a", sampling_params=params)))
    assert output_text(responses) == tokenizer.decode(token_ids[:-1])
    assert output_ids(responses) == token_ids
    assert responses[-1].outputs[0].stop_token_id == token_ids[-1]


def test_length(gateway):
    gateway.engine.say("the quick brown fox")
    params = SamplingParams(max_tokens=2)
    responses = list(gateway.generation.Generate(GenerateRequest(text="a", sampling_params=params)))
    assert responses[-1].outputs[0].finish_reason == LENGTH
    assert responses[-1].usage.completion_tokens == 2


def test_special_tokens_are_left_out_unless_asked_for(gateway):
    gateway.engine.say("a<|user|>b")
    for skip, expected in ((None, "ab"), (True, "ab"), (False, "a<|user|>b")):
        params = SamplingParams(skip_special_tokens=skip)
        responses = list(gateway.generation.Generate(GenerateRequest(text="a", sampling_params=params)))
        assert output_text(responses) == expected


def test_logprobs_stand_beside_the_tokens(gateway):
    token_ids = gateway.engine.say("the fox")
    params = SamplingParams(logprobs=2, prompt_logprobs=1)
    request = GenerateRequest(token_ids=TokenIds(ids=[7, 8, 9]), sampling_params=params)
    responses = list(gateway.generation.Generate(request))
    rows = [row for response in responses for row in response.outputs[0].logprobs]
    assert [row.token.token_id for row in rows] == token_ids
    assert [(row.token.logprob, row.token.rank) for row in rows] == [(-1.5, 2)] * len(rows)
    assert [[(top.token_id, top.logprob, top.rank) for top in row.top] for row in rows] == [
        [(37, -0.5, 1), (38, -1.5, 2)]
    ] * len(rows)
    prompt_rows = responses[0].prompt_logprobs
    assert not prompt_rows[0].HasField("token")
    assert [row.token.token_id for row in prompt_rows[1:]] == [8, 9]
    assert [len(row.top) for row in prompt_rows] == [0, 1, 1]
    assert not any(response.prompt_logprobs for response in responses[1:])


def test_list_models(gateway):
    models = gateway.generation.ListModels(generation_pb2.ListModelsRequest()).models
    assert [(m.name, m.max_model_len, m.vocab_size) for m in models] == [
        ("tiny", 256, 384),
        ("tiny-alias", 256, 384),
    ]


def test_tokenize_and_detokenize(gateway, tokenizer):
    tokenize, request = gateway.generation.Tokenize, generation_pb2.TokenizeRequest
    assert tokenize(request(text=TEXT)).token_ids == tokenizer.encode(TEXT).ids
    plain = tokenize(request(text=TEXT, add_special_tokens=False))
    assert plain.token_ids == tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert plain.max_model_len == 256
    chat = ChatPrompt(messages=[ChatMessage(role="user", content="hi")])
    assert tokenize(request(chat=chat)).token_ids[0] == 0
    back = gateway.generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=plain.token_ids))
    assert back.text == TEXT


def test_status_comes_from_the_coordinator(gateway):
    status = gateway.admin.GetStatus(admin_pb2.GetStatusRequest())
    assert (status.model, status.num_gateways) == ("tiny", 1)


def test_health_and_reflection(gateway):
    health = health_pb2_grpc.HealthStub(gateway.channel)
    for service in ("", "octavo.v1.Generation", "octavo.v1.Admin", "liveness"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(gateway.channel)
    [answer] = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in answer.list_services_response.service}
    assert {"octavo.v1.Generation", "octavo.v1.Admin", "grpc.health.v1.Health"} <= names


def test_the_engines_refusal_reaches_the_client_with_its_retry_info(gateway):
    gateway.engine.fail(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "the queue is full", retry_after_s=1.5)
    with pytest.raises(grpc.RpcError) as caught:
        list(gateway.generation.Generate(GenerateRequest(text="a")))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "the queue is full"
    [detail] = rpc_status.from_call(caught.value).details
    retry = error_details_pb2.RetryInfo()
    assert detail.Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500


def test_a_request_that_failed_by_itself_says_why(gateway):
    gateway.engine.fail(grpc.StatusCode.INTERNAL.value[0], "its scores are not finite")
    with pytest.raises(grpc.RpcError) as caught:
        list(gateway.generation.Generate(GenerateRequest(text="a")))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert caught.value.details() == "its scores are not finite"


def test_a_fault_of_ours_is_not_shown(gateway):
    gateway.engine.fail(grpc.StatusCode.DATA_LOSS.value[0], "secret state at 0x1234")
    with pytest.raises(grpc.RpcError) as caught:
        list(gateway.generation.Generate(GenerateRequest(text="a")))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
