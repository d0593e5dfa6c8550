"""The two demo models: what training builds is small enough; what is checked in loads and adds."""

import dataclasses
import json
import tarfile

import pytest
from octavo.workers.checkpoint import verify_checkpoint
from octavo.workers.model_config import ModelConfig

NAMES = {"main": "demo", "draft": "demo-draft"}


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_model_is_one_that_the_workers_read(script, tmp_path, name):
    model = script("model")
    spec = model.SPECS[name]
    model.save_model(model.build_model(spec, seed=0), tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    verify_checkpoint(tmp_path, config)
    assert (tmp_path / "model.safetensors").stat().st_size <= spec.max_bytes
    assert (config.hidden_size, config.num_heads, config.num_kv_heads) == (spec.hidden_size, 8, 4)
    assert config.tie_word_embeddings
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (script("documents").SPECIAL_TOKENS.index("<|end|>"),)
    for size in (1, 2, 4):
        config.validate_tensor_parallel(size)


def test_a_model_too_large_to_check_in_is_refused(script):
    model = script("model")
    spec = dataclasses.replace(model.SPECS["draft"], max_bytes=1_000_000)
    with pytest.raises(ValueError, match="at most 1000000"):
        model.build_model(spec, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_checked_in_model_is_what_its_report_says(script, demo_model_directory, name):
    directory = demo_model_directory / NAMES[name]
    config = ModelConfig.from_directory(directory)
    verify_checkpoint(directory, config)
    report = json.loads((directory / "report.json").read_text())
    size = (directory / "model.safetensors").stat().st_size
    assert size == report["model_bytes"] <= script("model").SPECS[name].max_bytes
    assert config.vocab_size == script("tokenizer").VOCAB_SIZE


def test_the_main_model_adds(demo_model_directory):
    report = json.loads((demo_model_directory / "demo" / "report.json").read_text())
    assert min(report["held_out_sums_accuracy"].values()) >= 0.95


def test_both_checked_in_models_have_one_tokenizer(demo_model_directory):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        main, draft = (demo_model_directory / name / file for name in NAMES.values())
        assert main.read_bytes() == draft.read_bytes()


def test_an_archive_holds_the_model_directory(script, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    script("train").archive(tmp_path / "demo")
    with tarfile.open(tmp_path / "demo.tar") as archive:
        assert archive.getnames() == ["demo", "demo/config.json"]
