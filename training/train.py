"""Trains an adapter: low-rank changes of all linear layers of SmolLM2-135M-Instruct.

    python train.py --gateway PROGRAM --base FOLDER --out FOLDER

The base is the folder that `electron-gateway model pull` leaves behind, and the prompts are rendered and tokenized by
that program, so that what is trained is what is served. Only what the agent says is learned.
"""

import argparse
import json
import math
import pathlib
import random
import subprocess
import time

import torch
from domain import FOLDER, folder
from generate import conversations
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

# Longest conversation in tokens; longer ones are left out.
LONGEST = 768
# Share of general questions, which keep the model from forgetting all else.
GENERAL = 0.1


def render(gateway, base, records):
    """Tokens of conversations and which of them are the agent's, from the program that serves the model."""
    command = [gateway, "model", "render", "--model", str(base)]
    given = "".join(json.dumps({key: r[key] for key in ("messages", "tools") if key in r}) + "\n" for r in records)
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    rendered = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rendered) == len(records)
    # A prompt that the gateway takes for a voice agent's has to be one, and the other way round.
    fits = [
        r
        for r, record in zip(rendered, records, strict=True)
        if "tools" not in record or record["voice"] == r["speaks"]
    ]
    return [r for r in fits if len(r["tokens"]) <= LONGEST]


def general():
    """Conversations about anything, answered by the model itself before it was trained."""
    path = FOLDER / "general.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def batches(examples, tokens, rng):
    """Batches of about so many tokens, of examples of about one length."""
    order = sorted(range(len(examples)), key=lambda at: len(examples[at]["tokens"]) + rng.random() * 32)
    made, batch = [], []
    for at in order:
        longest = max([len(examples[i]["tokens"]) for i in [*batch, at]])
        if batch and longest * (len(batch) + 1) > tokens:
            made.append(batch)
            batch = []
        batch.append(at)
    made.append(batch)
    rng.shuffle(made)
    return [[examples[at] for at in batch] for batch in made]


def tensors(batch):
    """Inputs, and for each trained token where it is predicted and what it is."""
    longest = max(len(example["tokens"]) for example in batch)
    inputs = torch.zeros(len(batch), longest, dtype=torch.long)
    rows, columns, targets = [], [], []
    for row, example in enumerate(batch):
        tokens = example["tokens"]
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        for start, end in ((answer["start"], answer["end"]) for answer in example["answers"]):
            rows += [row] * (end - start)
            columns += range(start - 1, end - 1)
            targets += tokens[start:end]
    return inputs, (torch.tensor(rows), torch.tensor(columns)), torch.tensor(targets)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--base", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--count", type=int, default=12000, help="conversations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=3072, help="of one step")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    domains = folder("domains")
    records = list(conversations(domains, domains, options.count, options.seed))
    others = general()
    records += [{"voice": False, **rng.choice(others)} for _ in range(int(len(records) * GENERAL))] if others else []
    print(f"rendering {len(records)} conversations of {len(domains)} domains", flush=True)
    examples = render(options.gateway, options.base, records)
    steps = batches(examples, options.tokens, rng)
    total = sum(len(example["tokens"]) for example in examples)
    print(f"{len(examples)} conversations, {total} tokens, {len(steps)} steps", flush=True)

    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", lora_dropout=0.0)
    )
    inner, head = model.base_model.model.model, model.base_model.model.lm_head
    for layer in inner.layers:
        layer.compile(dynamic=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{sum(p.numel() for p in trained)} trained parameters", flush=True)
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0, betas=(0.9, 0.98))
    warm = max(1, len(steps) // 30)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / len(steps)))),
    )
    began, recent = time.monotonic(), []
    with (options.out / "loss.jsonl").open("w") as log:
        for step, batch in enumerate(steps, 1):
            inputs, at, targets = tensors(batch)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = inner(input_ids=inputs, use_cache=False).last_hidden_state[at]
                logits = head(hidden)
            loss = torch.nn.functional.cross_entropy(logits.float(), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            recent.append(loss.item())
            if step % 20 == 0 or step == len(steps):
                seconds = time.monotonic() - began
                mean = sum(recent) / len(recent)
                left = seconds / step * (len(steps) - step)
                log.write(json.dumps({"step": step, "loss": round(mean, 4), "seconds": round(seconds)}) + "\n")
                log.flush()
                pace = f"{seconds / step:.1f} s a step, {left / 60:.0f} min left"
                print(f"step {step} of {len(steps)}, loss {mean:.4f}, {pace}", flush=True)
                recent = []
            if step % options.save_every == 0 or step == len(steps):
                model.save_pretrained(options.out / f"step-{step}")
    model.save_pretrained(options.out / "last")


if __name__ == "__main__":
    main()
