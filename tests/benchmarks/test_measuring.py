"""What is made of counters and observations, and what is refused before anything starts."""

import pytest
from octavo.benchmarks.load_client import LoadSpec
from octavo.benchmarks.observation import Observation
from octavo.benchmarks.probe import DecodeCase, StepMeans, total_steps
from octavo.benchmarks.serving import ServeSettings, load_specs, summarize
from octavo.benchmarks.synthetic_tokenizer import write_tokenizer
from octavo.benchmarks.throughput import Run, checked
from octavo.benchmarks.workload import LengthRange, Workload
from octavo.errors import InternalError, InvalidArgumentError
from octavo.gateway.text import load_text_model
from octavo.launch.cli import run as run_octavo
from octavo.launch.config import ServeConfig
from octavo.proto import admin_pb2


def test_means_are_of_the_steps_between_two_snapshots():
    before = admin_pb2.StepCounters(num_steps=10, num_tokens=50, step_time_s=1.0, model_time_s=0.9, plan_bytes=1000)
    after = admin_pb2.StepCounters(num_steps=14, num_tokens=82, step_time_s=1.4, model_time_s=1.2, plan_bytes=1100)
    means = StepMeans.between(before, after)
    assert (means.num_steps, means.plan_bytes, means.num_tokens) == (4, 25.0, 8.0)
    assert (means.step_s, means.model_s) == pytest.approx((0.1, 0.075))
    assert means.share_outside_model == pytest.approx(0.25)
    with pytest.raises(InternalError):
        StepMeans.between(after, after)


def test_counters_of_groups_add_up():
    steps = admin_pb2.StepCounters(num_steps=2, num_tokens=5, step_time_s=0.5, model_time_s=0.25, plan_bytes=7)
    status = admin_pb2.GetStatusResponse(groups=[admin_pb2.GroupStatus(steps=steps)] * 2)
    assert total_steps(status) == admin_pb2.StepCounters(
        num_steps=4, num_tokens=10, step_time_s=1.0, model_time_s=0.5, plan_bytes=14
    )


def test_a_decode_case_has_its_context_in_the_middle_of_its_steps():
    case = DecodeCase(8, context_len=1024, num_steps=64, vocab_size=100, max_model_len=4096, seed=0)
    assert case.prompt_len + 16 + 64 // 2 == 1024  # prompt, warm-up, half of the measured steps
    assert [len(prompt) for prompt in case.prompts()] == [case.prompt_len] * 8


def test_a_decode_case_that_does_not_fit_is_refused():
    with pytest.raises(InvalidArgumentError, match="context must be at least 49 for 64 steps"):
        DecodeCase(1, context_len=48, num_steps=64, vocab_size=100, max_model_len=4096, seed=0)
    with pytest.raises(InvalidArgumentError, match="need a max_model_len of 1136, not 1100"):
        DecodeCase(1, context_len=1024, num_steps=64, vocab_size=100, max_model_len=1100, seed=0)


def spec(**fields) -> LoadSpec:
    defaults = {"door": "http", "target": "", "model": "", "vocab_size": 10, "num_prompts": 2, "input_len": "4"}
    return LoadSpec(**(defaults | {"output_len": 2, "requests_per_s": None, "seed": 0} | fields))


def test_a_served_row_is_of_the_requests_that_ended_well():
    done = [
        Observation(0.0, [0.1, 0.15, 0.2], num_tokens=3, finished_at_s=0.2),
        Observation(1.0, [1.3, 1.4], num_tokens=2, finished_at_s=2.0),
    ]
    row = summarize(spec(), [*done, Observation(0.5, error="HTTP 500")])
    assert (row["requests"], row["failed"], row["asked_requests_per_s"]) == (3, 1, "all at once")
    assert row["generated_tokens_per_s"] == pytest.approx(5 / 2.0)
    assert row["ttft_p50_ms"] == pytest.approx(200.0)
    assert row["itl_p50_ms"] == pytest.approx(50.0)


def test_an_answer_in_one_piece_says_nothing_of_the_first_token():
    row = summarize(spec(), [Observation(0.0, [0.9], num_tokens=16, finished_at_s=0.9)])
    assert (row["ttft_p50_ms"], row["itl_p50_ms"]) == (None, None)
    row = summarize(spec(), [Observation(0.0, [0.9], num_tokens=1, finished_at_s=0.9)])
    assert row["ttft_p50_ms"] == pytest.approx(900.0)


def test_each_rate_gets_twenty_seconds_of_arrivals():
    settings = ServeSettings((4.0, float("inf")), None, "512", 128, seed=0)
    assert [one.num_prompts for one in load_specs(settings, "http", "", "", 100)] == [80, 1000]


def test_no_rate_asks_what_another_asked():
    settings = ServeSettings((4.0, 16.0, float("inf")), None, "512", 128, seed=7)
    assert [one.seed for one in load_specs(settings, "http", "", "", 100)] == [7, 8, 9]


def test_bad_loads_are_refused():
    with pytest.raises(InvalidArgumentError, match="request_rate"):
        ServeSettings((4.0, -1.0), None, "512", 128, seed=0)
    with pytest.raises(InvalidArgumentError, match="door takes http or grpc"):
        spec(door="smtp")
    with pytest.raises(InvalidArgumentError, match="input_len"):
        load_specs(ServeSettings((1.0,), None, "x", 128, seed=0), "http", "", "", 100)


def test_a_run_that_did_less_counts_for_nothing():
    workload = Workload(2, LengthRange(1, 1), output_len=4)
    assert checked(Run("a", 2, [4, 4], 2.0), workload).generated_tokens_per_s == 4.0
    with pytest.raises(InternalError, match="a generated 7 tokens"):
        checked(Run("a", 2, [4, 3], 2.0), workload)


def test_every_token_of_the_synthetic_tokenizer_is_text(tmp_path):
    write_tokenizer(tmp_path, vocab_size=300)
    text = load_text_model(tmp_path)
    assert [text.decode([token_id]) for token_id in (0, 10, 299)] == [" 0", " a", " 12b"]
    detokenizer = text.new_detokenizer(skip_special_tokens=True)
    assert detokenizer.push([1, 2]) == " 1 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("latency", "give --preset or --model, and not both"),
        ("latency --preset cpu-6m --prefill 4000", "a prefill of 4000 tokens is over max_model_len (2048)"),
        ("latency --preset cpu-6m --batch-size 64 --max-num-seqs 8", "batch size 64 is over max_num_seqs (8)"),
        ("throughput --preset cpu-6m", "give --workload, or both of --input-len and --output-len"),
        ("throughput --preset cpu-6m --workload 1/1", "--workload takes 1024/128 or 128/512 or prefix-0 or"),
        ("throughput --preset cpu-6m --input-len 9 --output-len 9 --shared-len 10", "shared_len must be in [0, 9]"),
        ("throughput --preset cpu-6m --workload 5-shot --shared-len 10", "a --workload has its own"),
        ("latency --preset cpu-6m --repeated-prompt 512", "add --enable-prefix-caching"),
        (
            "latency --preset cpu-6m --repeated-prompt 4000 --enable-prefix-caching",
            "of 4000 tokens is over max_model_len",
        ),
        ("throughput --preset cpu-6m --input-len 9 --output-len 9 --compare x", "--compare takes transformers, got"),
        ("throughput --preset cpu-6m --input-len 3000 --output-len 9", "over max_model_len (2048)"),
        ("throughput --preset cpu-6m --workload 128/512 --tensor-parallel-size 0", "tensor_parallel_size must be"),
        ("serve --preset cpu-6m --door smtp", "--door takes http or grpc, got 'smtp'"),
        ("serve --preset cpu-6m --base-url http://localhost:1", "drop the options of a new one"),
        ("startup --preset nothing", "no preset 'nothing'"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    assert run_octavo(["bench", *arguments.split()]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "name", "expected"),
    [
        (["throughput", "--workload", "128/512"], "run_throughput", 0.0),
        (["throughput", "--workload", "128/512", "--itl-target-ms", "20"], "run_throughput", 20.0),
        (["latency", "--context", "100"], "run_latency", 0.0),
        (["startup"], "run_startup", ServeConfig().itl_target_ms),
    ],
)
def test_offline_benchmarks_do_not_cut_prompts_for_streams(monkeypatch, command, name, expected):
    configs = []
    monkeypatch.setattr(f"octavo.benchmarks.cli.{name}", lambda config, *_: configs.append(config))
    assert run_octavo(["bench", *command, "--preset", "cpu-6m"]) == 0
    assert [config.itl_target_ms for config in configs] == [expected]


@pytest.fixture
def started(monkeypatch):
    """Commands start nothing; (configuration, report) of each that would have."""
    calls = []
    for name in ("latency", "throughput"):
        monkeypatch.setattr(f"octavo.benchmarks.cli.run_{name}", lambda config, *rest: calls.append((config, rest[-1])))
    monkeypatch.setattr(
        "octavo.benchmarks.serve_command._load_own_server", lambda config, *rest: calls.append((config, rest[-1]))
    )
    return calls


@pytest.mark.parametrize("command", ["latency --context 100", "throughput --workload 128/512", "serve"])
@pytest.mark.parametrize("is_asked", [False, True])
def test_prefix_caching_is_off_unless_asked_for_and_the_report_says_which(started, command, is_asked):
    asked = ["--enable-prefix-caching"] if is_asked else []
    assert run_octavo(["bench", *command.split(), "--preset", "cpu-6m", *asked]) == 0
    ((config, report),) = started
    assert config.enable_prefix_caching is is_asked
    assert report.settings["enable_prefix_caching"] is is_asked


def test_a_comparison_with_transformers_caches_no_prefix_either(monkeypatch):
    configs = []
    monkeypatch.setattr("octavo.benchmarks.comparison.run_comparison", lambda config, *_: configs.append(config))
    command = "bench throughput --preset cpu-6m --workload 128/512 --compare transformers"
    assert run_octavo(command.split()) == 0
    assert [config.enable_prefix_caching for config in configs] == [False]


@pytest.mark.parametrize(
    ("workload", "expected"),
    [
        ("1024/128", (1000, 0, 128, 1024)),
        ("prefix-0", (500, 0, 64, 1024)),
        ("prefix-50", (500, 512, 64, 1024)),
        ("prefix-90", (500, 922, 64, 1024)),
        ("5-shot", (500, 1536, 32, 1600)),
    ],
)
def test_named_workloads_are_those_of_the_anchors(started, workload, expected):
    assert run_octavo(["bench", "throughput", "--preset", "cpu-6m", "--workload", workload]) == 0
    settings = started[0][1].settings
    lengths = (settings["output_len"], int(settings["input_len"]))
    assert (settings["num_prompts"], settings["shared_len"], *lengths) == expected


def test_with_repeated_prompts_nothing_else_is_measured_unless_asked(monkeypatch):
    asked = []
    monkeypatch.setattr("octavo.benchmarks.cli.run_latency", lambda _, settings, *rest: asked.append(settings))
    command = ["bench", "latency", "--preset", "cpu-6m", "--enable-prefix-caching", "--repeated-prompt", "512"]
    assert run_octavo(command) == 0
    assert (asked[0].repeated_lens, asked[0].batch_sizes, asked[0].prefill_lens) == ((512,), (), ())
