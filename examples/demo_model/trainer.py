"""The training loop: AdamW, linear warmup, cosine decay, bounded in steps and in seconds."""

import math
import time
from dataclasses import dataclass

import torch
from dataset import IGNORED, Rows
from torch.nn import functional
from transformers import LlamaForCausalLM

_WARMUP_STEPS = 150
_FINAL_LEARNING_RATE = 0.02  # of the peak
_WEIGHT_DECAY = 0.1
_MAX_GRAD_NORM = 1.0
_REPORT_EVERY = 100  # steps


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What ends training is whichever comes first, `steps` or `max_seconds`; the learning rate follows it."""

    steps: int
    max_seconds: float
    rows_per_step: int
    peak_learning_rate: float
    seed: int

    def progress(self, step: int, seconds: float) -> float:
        return max(step / self.steps, seconds / self.max_seconds)

    def learning_rate(self, step: int, progress: float) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
        return self.peak_learning_rate * warmup * (_FINAL_LEARNING_RATE + (1 - _FINAL_LEARNING_RATE) * cosine)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    steps: int
    seconds: float
    loss: float  # of the last step, nats per learned token


def train(model: LlamaForCausalLM, rows: Rows, plan: TrainingPlan, device: torch.device) -> TrainingResult:
    model.to(device).train()
    optimizer = _optimizer(model, plan, device)
    tokens = torch.from_numpy(rows.tokens).to(device)
    labels = torch.from_numpy(rows.labels).to(device)
    generator = torch.Generator().manual_seed(plan.seed)
    start, step, loss = time.monotonic(), 0, torch.zeros(())
    while (progress := plan.progress(step, time.monotonic() - start)) < 1:
        chosen = torch.randint(len(tokens), (plan.rows_per_step,), generator=generator).to(device)
        learning_rate = plan.learning_rate(step, progress)
        loss = _step(model, optimizer, tokens[chosen].long(), labels[chosen].long(), learning_rate)
        step += 1
        if step % _REPORT_EVERY == 0 or step == 1:
            _report(step, plan, loss.item(), time.monotonic() - start)
    final_loss = loss.item()  # waits for the device
    return TrainingResult(step, time.monotonic() - start, final_loss)


def _optimizer(model: LlamaForCausalLM, plan: TrainingPlan, device: torch.device) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.peak_learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")


def _step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    tokens: torch.Tensor,  # [rows, ROW_LENGTH]
    labels: torch.Tensor,
    learning_rate: float,
) -> torch.Tensor:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.device.type == "cuda"):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        learned = labels != IGNORED
        logits = model.lm_head(hidden[learned])
    loss = functional.cross_entropy(logits.float(), labels[learned])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
    optimizer.step()
    return loss.detach()


def _report(step: int, plan: TrainingPlan, loss: float, seconds: float) -> None:
    print(f"  step {step}/{plan.steps}  loss {loss:.4f}  {seconds:.0f} s  {step / seconds:.1f} steps/s", flush=True)
