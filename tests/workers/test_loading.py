"""Weights that come beside the rest of a start: to the places that graphs read from, from wherever they come."""

import pytest
import torch
from octavo.errors import UnavailableError
from octavo.kernels.ops import Operations
from octavo.proto import engine_pb2, worker_pb2
from octavo.workers.loading import Loading, begin_copying, load_now
from octavo.workers.models import llama
from octavo.workers.parallel import TensorParallel

ALONE = TensorParallel(0, 1, torch.device("cpu"))


@pytest.fixture
def request_for(make_llama, monkeypatch):
    """request_for(**shape) -> a request whose weights are to come from another rank."""
    monkeypatch.setattr(llama, "operations_for", lambda device: Operations())  # which, as on GPUs, pack no weights

    def make(**shape):
        config = engine_pb2.WorkerConfig(
            model_path=str(make_llama(**shape)), load_format="safetensors", dtype="float32", max_model_len=64
        )
        return worker_pb2.ConfigureRequest(
            epoch=1, rank=0, tensor_parallel_size=1, config=config, weight_source="elsewhere"
        )

    return make


def places(model):
    return [parameter.dense().data_ptr() for parameter in model.parameters()]


def expected_of(request):
    return [parameter.dense() for parameter in load_now(request, ALONE, 1, None, None).model.parameters()]


SHAPES = [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]


@pytest.mark.parametrize("shape", SHAPES)
def test_copied_weights_come_to_the_places_that_were_settled(shape, request_for):
    request = request_for(**shape)
    expected, begun = expected_of(request), []

    def fetch(request, model):
        begun.append(model)

        def arrive():
            for parameter, tensor in zip(model.parameters(), expected, strict=True):
                parameter.load(lambda place, tensor=tensor: place.copy_(tensor))

        return arrive

    loading = begin_copying(request, ALONE, fetch)
    assert begun == [loading.model], "before anybody waits"
    before = places(loading.model)
    loaded = loading.finish()
    assert loaded.copied
    assert loaded.is_of(request)
    assert places(loaded.model) == before
    for parameter, tensor in zip(loaded.model.parameters(), expected, strict=True):
        assert torch.equal(parameter.dense(), tensor)


@pytest.mark.parametrize("error", [UnavailableError, torch.OutOfMemoryError])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_that_do_not_come_are_read_to_the_same_places(shape, error, request_for):
    request = request_for(**shape)

    def fetch(request, model):
        def arrive():
            for parameter in model.parameters():
                parameter.load(lambda place: place.fill_(7))  # some had come
            raise error("it is gone\nand more")

        return arrive

    loading = begin_copying(request, ALONE, fetch)
    before = places(loading.model)
    loaded = loading.finish()
    assert not loaded.copied
    assert loaded.copy_failure == "it is gone"
    assert places(loaded.model) == before
    for parameter, tensor in zip(loaded.model.parameters(), expected_of(request), strict=True):
        assert torch.equal(parameter.dense(), tensor)


def test_an_error_of_another_kind_is_not_taken_for_a_missing_peer(request_for):
    def fetch(request, model):
        def arrive():
            raise ZeroDivisionError

        return arrive

    with pytest.raises(ZeroDivisionError):
        begin_copying(request_for(), ALONE, fetch).finish()


def test_what_is_loaded_is_done(request_for):
    request = request_for()
    loaded = load_now(request, ALONE, 1, None, None)
    assert Loading.of(loaded).is_done
    assert Loading.of(loaded).finish() is loaded
