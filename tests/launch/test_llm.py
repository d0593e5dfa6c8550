"""What LLM refuses before it starts anything."""

import pytest
from octavo import LLM
from octavo.errors import InvalidArgumentError, NotFoundError


@pytest.mark.parametrize(
    "option", ["port", "grpc_port", "host", "first_request", "served_model_name", "no_such_option"]
)
def test_an_option_that_is_not_for_offline_use_is_refused(option):
    with pytest.raises(InvalidArgumentError, match=option) as refusal:
        LLM("model", **{option: 1})
    assert refusal.value.field == option


@pytest.mark.parametrize(("option", "value"), [("block_size", "8"), ("device", "tpu"), ("max_num_seqs", True)])
def test_a_value_of_a_wrong_type_is_refused(option, value):
    with pytest.raises(InvalidArgumentError, match=option):
        LLM("model", **{option: value})


def test_a_missing_model_is_said_so():
    with pytest.raises(NotFoundError, match="/no/such/model"):
        LLM("/no/such/model")
