"""Bad model directories: each is refused in one line that names the cause and the remedy, before any weight is read."""

import json
import shutil

import pytest
import torch
from octavo.errors import CheckpointError, NotFoundError
from octavo.workers.checkpoint import INDEX_FILE, SINGLE_FILE, read_headers, verify_checkpoint
from octavo.workers.model_config import ModelConfig
from safetensors.torch import load_file, save_file


@pytest.fixture
def model_path(make_llama, tmp_path):
    """A good single-file checkpoint of our own, to be spoilt."""
    return shutil.copytree(make_llama(), tmp_path / "model")


def verify(path) -> None:
    verify_checkpoint(path, ModelConfig.from_directory(path))


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as error:
        verify(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def rewrite(path, edit) -> None:
    tensors = load_file(path / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, path / SINGLE_FILE)


def split(path, num_files: int = 2) -> None:
    """The same checkpoint as several files and an index."""
    tensors = load_file(path / SINGLE_FILE)
    (path / SINGLE_FILE).unlink()
    weight_map = {name: f"part-{i % num_files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, path / file)
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_good_checkpoints_pass(model_path):
    verify(model_path)
    split(model_path, 3)
    verify(model_path)
    assert {header.file.name for header in read_headers(model_path).values()} == {
        f"part-{i}.safetensors" for i in range(3)
    }


def test_a_tied_model_needs_no_head_and_may_have_one(make_llama, tmp_path):
    path = shutil.copytree(make_llama(tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in read_headers(path)
    verify(path)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    verify(path)


def test_buffers_of_old_exports_are_let_be(model_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(model_path, lambda tensors: tensors.update({name: torch.ones(4)}))
    verify(model_path)


REMEDY = "; download it again, or correct config.json"
TENSOR_EDITS = {
    "missing": (
        lambda tensors: tensors.pop("model.norm.weight"),
        "1 tensor(s) missing: model.norm.weight",
    ),
    "many missing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name],
        "9 tensor(s) missing: model.layers.1.input_layernorm.weight, model.layers.1.post_attention_layernorm.weight, "
        "model.layers.1.self_attn.q_proj.weight and 6 more",
    ),
    "extra": (
        lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
        "1 tensor(s) not of this model: model.layers.2.mlp.up_proj.weight",
    ),
    "bias that config.json lacks": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        "1 tensor(s) not of this model: model.layers.0.self_attn.q_proj.bias",
    ),
    "wrong shape": (
        lambda tensors: tensors.update({"lm_head.weight": torch.ones(127, 64)}),
        "1 tensor(s) wrongly shaped: lm_head.weight is [127, 64], not [128, 64]",
    ),
    "transposed": (
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(64, 128)}),
        "1 tensor(s) wrongly shaped: model.layers.0.mlp.up_proj.weight is [64, 128], not [128, 64]",
    ),
    "quantized": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        "1 tensor(s) of a type that is not served: model.norm.weight is I8",
    ),
}


@pytest.mark.parametrize("name", TENSOR_EDITS)
def test_tensors_that_do_not_fit(name, model_path):
    edit, cause = TENSOR_EDITS[name]
    rewrite(model_path, edit)
    assert refusal(model_path) == f"checkpoint {model_path} does not fit its config.json: {cause}{REMEDY}"


def test_all_that_does_not_fit_is_said_at_once(model_path):
    def edit(tensors):
        tensors["model.other.weight"] = tensors.pop("model.norm.weight")

    rewrite(model_path, edit)
    assert "1 tensor(s) missing: model.norm.weight; 1 tensor(s) not of this model: model.other" in refusal(model_path)


def test_missing_files(model_path, tmp_path):
    with pytest.raises(NotFoundError, match=r"/nowhere does not exist; give a Hugging Face model directory"):
        verify(tmp_path / "nowhere")
    (model_path / SINGLE_FILE).unlink()
    assert refusal(model_path).endswith(
        f"has neither {SINGLE_FILE} nor {INDEX_FILE}; download its weights, or use --load-format dummy"
    )
    (model_path / "pytorch_model.bin").touch()
    assert refusal(model_path) == (
        f"{model_path} holds only .bin weights, which can run code when loaded; convert them to safetensors "
        "(transformers: from_pretrained(...).save_pretrained(...))"
    )


def test_an_index_that_names_files_that_are_not_there(model_path):
    split(model_path, 3)
    (model_path / "part-1.safetensors").unlink()
    assert refusal(model_path) == f"{model_path} lacks 1 of 3 weight files: part-1.safetensors; download them"


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}'])
def test_a_malformed_index(index, model_path):
    (model_path / SINGLE_FILE).unlink()
    (model_path / INDEX_FILE).write_text(index)
    expected = f"{model_path / INDEX_FILE} is malformed: it needs a weight_map of tensor to file"
    assert refusal(model_path) == expected


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/part.safetensors"])
def test_an_index_that_points_outside_of_its_directory(name, model_path):
    (model_path / SINGLE_FILE).unlink()
    (model_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    assert refusal(model_path).endswith(f"names {name!r}, which is no file name of its own directory")


def test_a_tensor_in_two_files(model_path):
    split(model_path)
    tensors = load_file(model_path / "part-0.safetensors") | load_file(model_path / "part-1.safetensors")
    save_file(tensors, model_path / "part-1.safetensors")
    assert "is in both" in refusal(model_path)


def cut(data: bytes) -> bytes:
    return data[:-1]


DAMAGES = {
    "empty": (lambda data: b"", "its header is cut off"),
    "only a length": (lambda data: data[:8], "its header is cut off"),
    "not safetensors": (lambda data: b"PK\x03\x04" * 100, "its header is cut off"),
    "header not JSON": (lambda data: data[:8] + b"x" + data[9:], "its header is malformed"),
    "header of another kind": (lambda data: (2).to_bytes(8, "little") + b"[]", "its header is malformed"),
    "no offsets": (lambda data: (14).to_bytes(8, "little") + b'{"a":{"dt":1}}', "its header is malformed"),
    "truncated": (cut, "bytes, and its header describes"),
    "longer than it says": (lambda data: data + b"\0", "bytes, and its header describes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(name, model_path):
    damage, cause = DAMAGES[name]
    file = model_path / SINGLE_FILE
    file.write_bytes(damage(file.read_bytes()))
    message = refusal(model_path)
    assert message.startswith(f"{file} is corrupt or truncated (")
    assert cause in message
    assert message.endswith("; download or convert it again")


def test_a_file_that_cannot_be_read(model_path):
    (model_path / SINGLE_FILE).unlink()
    (model_path / SINGLE_FILE).symlink_to(SINGLE_FILE)
    with pytest.raises(CheckpointError):
        verify(model_path)
