"""Trains Octavo's demo model and its draft sibling from nothing but this folder, in minutes on one GPU.

    python examples/demo_model/train.py --out DIR

writes DIR/demo and DIR/demo-draft: Hugging Face model directories with a report.json each.
"""

import argparse
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

from corpus import FAMILIES, Corpus
from dataset import Rows, build_rows
from tokenizer import save_tokenizer, train_tokenizer
from tokenizers import Tokenizer

_MAX_PROCESSES = 16  # more gain nothing
_TOKENIZER_DOCUMENTS = 40_000
_TOKENIZER_SHARD = 1_000_000  # one that no training run reaches


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model directories")
    parser.add_argument("--model", choices=("main", "draft", "both"), default="both")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of training, for each model; default: its own budget")
    parser.add_argument("--max-seconds", type=float, help="of training, for each model; default: its own budget")
    parser.add_argument("--rows-per-step", type=int, default=128, help="rows of 512 tokens")
    parser.add_argument("--documents", type=int, default=1_000_000, help="training documents to generate")
    parser.add_argument("--families", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES))
    parser.add_argument("--archive", action="store_true", help="also write each model directory as DIR/NAME.tar")
    return parser.parse_args()


def _build_data(arguments: argparse.Namespace) -> tuple[Tokenizer, Rows]:
    start = time.monotonic()
    texts = (document.text for document in Corpus(arguments.seed).shard(_TOKENIZER_SHARD, _TOKENIZER_DOCUMENTS))
    tokenizer = train_tokenizer(texts)
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens, {time.monotonic() - start:.0f} s", flush=True)
    corpus = Corpus(arguments.seed, tuple(arguments.families))
    rows = build_rows(corpus, tokenizer, arguments.documents, num_processes=min(_MAX_PROCESSES, os.cpu_count() or 1))
    print(
        f"data: {arguments.documents} documents, {rows.tokens.size} tokens, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return tokenizer, rows


def _train_one(name: str, arguments: argparse.Namespace, tokenizer: Tokenizer, rows: Rows) -> Path:
    # Not imported at the top: the processes that make the data import this file, and they need no torch.
    import torch
    from evaluate import evaluate
    from model import SPECS, build_model, num_parameters, save_model
    from trainer import TrainingPlan, train

    spec, device = SPECS[name], torch.device(arguments.device)
    directory = arguments.out / spec.directory_name
    directory.mkdir(parents=True, exist_ok=True)
    model = build_model(spec, arguments.seed)
    print(f"{spec.directory_name}: {num_parameters(model)} parameters, on {_device_name(device)}", flush=True)
    plan = TrainingPlan(
        steps=arguments.steps or spec.steps,
        max_seconds=arguments.max_seconds or spec.max_seconds,
        rows_per_step=arguments.rows_per_step,
        peak_learning_rate=spec.peak_learning_rate,
        seed=arguments.seed,
    )
    result = train(model, rows, plan, device)
    save_model(model, directory)
    save_tokenizer(tokenizer, directory)
    report = {
        "seed": arguments.seed,
        "parameters": num_parameters(model),
        "model_bytes": (directory / "model.safetensors").stat().st_size,
        "documents": arguments.documents,
        "families": list(arguments.families),
        "steps": result.steps,
        "tokens_per_step": rows.tokens.shape[1] * plan.rows_per_step,
        "training_seconds": round(result.seconds, 1),
        "final_loss": round(result.loss, 4),
        "device": _device_name(device),
        **evaluate(directory, device),
    }
    _write_report(directory / "report.json", report)
    return directory


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _write_report(path: Path, report: dict[str, object]) -> None:
    text = json.dumps(report, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


def archive(directory: Path) -> None:
    with tarfile.open(directory.with_suffix(".tar"), "w") as tar:
        tar.add(directory, arcname=directory.name)


def main() -> None:
    arguments = _arguments()
    tokenizer, rows = _build_data(arguments)
    for name in ("main", "draft") if arguments.model == "both" else (arguments.model,):
        directory = _train_one(name, arguments, tokenizer, rows)
        if arguments.archive:
            archive(directory)


if __name__ == "__main__":
    main()
