"""The presets have the shapes they claim, and the roof is the one that the measured anchors are printed beside."""

import pytest
from octavo.benchmarks.presets import ModelSize, preset_directory, preset_names
from octavo.benchmarks.roof import H100, H200, Hardware, Roof, hardware_of
from octavo.errors import InvalidArgumentError
from octavo.workers.model_config import ModelConfig


def size_of(preset: str) -> ModelSize:
    return ModelSize.of(ModelConfig.from_directory(preset_directory(preset)))


@pytest.mark.parametrize(
    ("preset", "num_parameters"),
    [("llama-8b", 8_030_261_248), ("llama-70b", 70_553_706_496), ("llama-1b", 1_235_814_400), ("cpu-6m", 6_524_160)],
)
def test_parameter_counts(preset, num_parameters):
    assert size_of(preset).num_parameters == num_parameters


def test_a_tied_head_is_read_and_an_embedding_is_not():
    tied, untied = size_of("llama-1b"), size_of("llama-8b")
    assert tied.num_parameters_read == tied.num_parameters
    assert untied.num_parameters - untied.num_parameters_read == 128_256 * 4096


def test_every_preset_splits_over_two_ranks():
    for preset in preset_names():
        ModelConfig.from_directory(preset_directory(preset)).validate_tensor_parallel(2)


def test_unknown_preset_is_refused_with_those_there_are():
    with pytest.raises(InvalidArgumentError, match="no preset 'llama-9b'; there are cpu-6m, llama-1b"):
        preset_directory("llama-9b")


# Milliseconds as printed with the anchors, context 1024. Those of large batches over several GPUs are left out: they
# were printed with the bytes of the all-reduce, which the formula does not have.
@pytest.mark.parametrize(
    ("preset", "num_gpus", "batch_size", "roof_ms"),
    [
        ("llama-8b", 1, 1, 3.52),
        ("llama-8b", 1, 8, 3.74),
        ("llama-8b", 1, 32, 4.49),
        ("llama-8b", 1, 128, 7.49),
        ("llama-8b", 1, 256, 12.85),
        ("llama-8b", 2, 1, 2.08),
        ("llama-8b", 4, 1, 1.20),
        ("llama-70b", 4, 1, 8.90),
    ],
)
def test_roof_equals_the_printed_one(preset, num_gpus, batch_size, roof_ms):
    computed_ms = Roof(size_of(preset), H200, num_gpus).decode_s(batch_size, 1024) * 1e3
    assert computed_ms == pytest.approx(roof_ms, abs=0.01)


def test_a_prompt_is_bound_by_arithmetic_or_by_one_reading_of_the_weights():
    roof = Roof(size_of("llama-8b"), H200, 1)
    assert roof.prefill_s(2048) == pytest.approx(0.0362, rel=0.01)  # the head is the last token's alone
    assert roof.prefill_s(1) == roof.prefill_s(100) == pytest.approx(roof.decode_s(1, 0))


def test_many_requests_are_bound_by_what_is_computed_and_what_is_attended_to():
    size = ModelSize(70, num_parameters_read=50, num_head_parameters=20, num_layers=2, kv_elements_per_token=10)
    roof = Roof(size, Hardware("one", bytes_per_s=20.0, flops_per_s=100.0, all_reduce_s=1.0), 2)
    # Of 8 prompt tokens 3 are cached, of 4 generated ones 2 are computed, and 4 sampled: 7 * 60 + 4 * 40 operations at
    # 200 a second. The two decodes read 6 and 7 keys of 20 bytes, at 40 a second.
    assert roof.requests_s([5, 3], 3, [3, 1]) == pytest.approx(2.9 + 6.5)


def test_roof_is_known_for_measured_hardware_only():
    assert hardware_of(["NVIDIA H200", "NVIDIA H200"]) is H200
    assert hardware_of(["NVIDIA H100 80GB HBM3"]) is H100
    assert hardware_of(["NVIDIA H100 PCIe"]) is None
    assert hardware_of(["NVIDIA H200", "NVIDIA A100"]) is None
    assert hardware_of([]) is None
