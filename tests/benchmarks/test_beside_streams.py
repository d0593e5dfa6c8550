"""Benchmarks of what streams feel: which gaps count, what a system must hold, and a run against a canned gateway."""

import asyncio

import grpc
import pytest
from octavo.benchmarks import long_context, swap
from octavo.benchmarks.long_context import LongContextSettings
from octavo.benchmarks.presets import ModelSize, preset_directory
from octavo.benchmarks.report import Report
from octavo.benchmarks.streams import Window, gaps_within, itl_columns, open_watcher
from octavo.benchmarks.swap import SwapSettings, swap_config
from octavo.errors import InternalError, InvalidArgumentError
from octavo.launch.cli import run as run_octavo
from octavo.launch.config import ServeConfig
from octavo.proto import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from octavo.workers.model_config import ModelConfig

SIZE = ModelSize.of(ModelConfig.from_directory(preset_directory("cpu-6m")))


def test_gaps_that_reach_into_a_window_count_once():
    streams = [[0.0, 1.0, 2.0, 5.0, 6.0], [0.5, 2.5]]
    assert gaps_within(streams, [Window(2.1, 3.0)]) == [3.0, 2.0]
    assert gaps_within(streams, [Window(2.1, 3.0), Window(3.5, 4.0)]) == [3.0, 2.0]
    assert gaps_within(streams, [Window(7.0, 8.0)]) == []


def test_the_longest_gap_is_shown_beside_percentiles():
    assert itl_columns([0.001, 0.003]) == pytest.approx(
        {"itl_p50_ms": 2.0, "itl_p95_ms": 2.9, "itl_p99_ms": 2.98, "itl_max_ms": 3.0}
    )
    assert itl_columns([])["itl_max_ms"] is None


SETTINGS = SwapSettings(prompt_len=512, num_streams=4, stream_len=64, output_len=448, num_repeats=2, seed=0)


def test_prompts_of_a_swap_do_not_fit_the_device_together_and_do_fit_the_host():
    config = swap_config(ServeConfig(max_model_len=2048), SETTINGS, SIZE)
    assert config.enable_prefix_caching
    assert config.num_gpu_blocks_override == 4 * 32 + 2 * 32 + 16
    num_prompts = SETTINGS.num_prompts(config.block_size)
    assert num_prompts * 32 > config.num_gpu_blocks_override
    block_bytes = 2 * 6 * 4 * 32 * 16 * 4  # float32
    assert config.swap_space * 2**30 >= num_prompts * 32 * block_bytes


def test_swap_space_and_blocks_that_are_asked_for_stay():
    asked = ServeConfig(max_model_len=2048, swap_space=3.0, num_gpu_blocks_override=300)
    config = swap_config(asked, SETTINGS, SIZE)
    assert (config.swap_space, config.num_gpu_blocks_override) == (3.0, 300)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("long-context --preset cpu-6m --prompt-len 2048", "a prompt of 2048 tokens is over max_model_len (2048)"),
        ("long-context --preset cpu-6m --streams 256", "streams must be under max_num_seqs (256)"),
        ("long-context --preset cpu-6m --streams 0", "num_streams must be at least 1"),
        ("long-context --preset cpu-6m --stream-len 2000", "stream_len leaves streams no"),
        ("swap --preset cpu-6m --prompt-len 8192", "8193 tokens are over max_model_len (2048)"),
        ("swap --preset cpu-6m --prompt-len 16", "prompt_len must be two blocks or more, got 16"),
        ("swap --preset cpu-6m --prompt-len 512 --output-len 20", "output_len must be at least 128"),
        ("memory --preset cpu-6m --model x", "give --preset or --model, and not both"),
        ("memory --width 1", "width must be at least 2"),
    ],
)
def test_bad_options_are_one_line(command, message, capsys):
    assert run_octavo(["bench", *command.split()]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_the_long_prompt_is_as_long_as_the_model_takes(monkeypatch):
    asked = []
    monkeypatch.setattr("octavo.benchmarks.block_commands.run_long_context", lambda *run: asked.append(run))
    for preset in ("llama-8b", "cpu-6m"):
        assert run_octavo(["bench", "long-context", "--preset", preset]) == 0
    assert [settings.prompt_len for _, settings, _ in asked] == [128_000, 2047]
    assert [config.max_model_len for config, _, _ in asked] == [131_072, 2048]
    assert [config.itl_target_ms for config, _, _ in asked] == [ServeConfig().itl_target_ms] * 2


class Gateway(generation_pb2_grpc.GenerationServicer, admin_pb2_grpc.AdminServicer):
    """A token every 2 ms for each request. A prompt that is new is saved block by block, one for each time that the
    status is asked for; one that came before the last two is loaded."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.prompts: list[tuple[int, ...]] = []
        self.status = admin_pb2.GroupStatus()

    async def Generate(self, request, context):
        prompt, num_tokens = tuple(request.token_ids.ids), request.sampling_params.max_tokens
        if num_tokens == 1:
            self.status.block_counters.num_loaded_blocks += 4 * (prompt in self.prompts[:-2])
            self.status.blocks.num_in_transfer = 0 if prompt in self.prompts else 4
            self.prompts.append(prompt)
        for _ in range(1 if num_tokens == 1 else self.most_tokens):
            await asyncio.sleep(0.002)
            yield generation_pb2.GenerateResponse(outputs=[generation_pb2.SequenceOutput(token_ids=[1])])

    async def GetStatus(self, request, context):
        if self.status.blocks.num_in_transfer:
            self.status.blocks.num_in_transfer -= 1
            self.status.block_counters.num_saved_blocks += 1
        self.status.steps.num_steps += 1
        return admin_pb2.GetStatusResponse(groups=[self.status])


async def with_gateway(tmp_path, use, most_tokens=100_000):
    server, gateway = grpc.aio.server(), Gateway(most_tokens)
    generation_pb2_grpc.add_GenerationServicer_to_server(gateway, server)
    admin_pb2_grpc.add_AdminServicer_to_server(gateway, server)
    address = f"unix:{tmp_path}/gateway.sock"
    server.add_insecure_port(address)
    await server.start()
    try:
        return await use(address)
    finally:
        await server.stop(0)


def test_long_context_has_a_row_beside_the_prompt_and_one_alone_before_and_behind_it(tmp_path, monkeypatch):
    monkeypatch.setattr(long_context, "_ALONE_TOKENS", 8)
    report = Report("long-context", {})
    settings = LongContextSettings(prompt_len=64, num_streams=3, stream_len=4, num_repeats=2, seed=0)
    asyncio.run(with_gateway(tmp_path, lambda address: long_context._measure(address, 100, 5000, settings, report)))
    assert [row["prompt_tokens"] for row in report.tables["Prompt"]] == [64, 64]
    rows = report.tables["Streams"]
    assert [row["streams"] for row in rows] == ["alone, before", "beside the prompt", "alone, behind"]
    assert rows[-1]["p99_times_alone_p99"] == 1.0
    for row in rows:
        assert row["itl_p50_ms"] >= 2.0
        assert row["gaps"] >= 3


def test_swap_has_a_row_for_each_way_that_blocks_move(tmp_path):
    settings = SwapSettings(prompt_len=64, num_streams=2, stream_len=4, output_len=128, num_repeats=2, seed=0)
    report = Report("swap", {})
    asyncio.run(with_gateway(tmp_path, lambda address: swap._measure(address, 100, 16, settings, report)))
    num_prompts = settings.num_prompts(16)
    assert [(row["meanwhile"], row["times"], row["moved_blocks"]) for row in report.tables["Decodes"]] == [
        ("alone", 1, 0),
        ("blocks are saved", num_prompts, 4 * num_prompts),
        ("a prompt is found on the device", 2, 0),
        ("a prompt is loaded from the host", 2, 8),
    ]


def test_a_stream_that_ends_too_early_is_an_error(tmp_path):
    async def use(address):
        async with open_watcher(address) as watcher:
            watcher.streams.start([[1, 2]], output_len=5)
            await watcher.streams.advance(2)
            await watcher.streams.advance(50)

    with pytest.raises(InternalError, match="a stream ended before the measurement did"):
        asyncio.run(with_gateway(tmp_path, use, most_tokens=5))


def test_long_context_settings_refuse_what_makes_no_sense():
    with pytest.raises(InvalidArgumentError, match="num_repeats must be at least 1, got 0"):
        LongContextSettings(1, 1, 1, 0, seed=0)
