"""Makes the delta that the gateway merges: what training changed, in 1.6 bits for each weight.

    python export.py --gateway PROGRAM --base FOLDER --trained FILE --out FOLDER

Of a matrix it keeps which weights grow, which shrink and which stay, and for each row by how much those that move do; of a
vector all. `src/engine/mistral/delta.rs` tells how that is laid out.

What counts is what a matrix does to the inputs that it gets in conversations: what 1.6 bits get wrong in a column, the columns
behind it make up for (GPTQ, Frantar et al. 2023).
"""

import argparse
import hashlib
import pathlib

import torch
from inputs import damped, moments, seen_by
from safetensors.torch import load_file, save_file
from train import render, talks
from transformers import AutoModelForCausalLM

# The least that a row's weights move, so that none is divided by zero.
LEAST = 1e-12
# Columns whose errors are handed on together.
BLOCK = 128
# Files, of about one size each.
PARTS = 2


def packed(change, costs):
    """Five directions (0 shrank, 1 stayed, 2 grew) in a byte, scales, and the share of the change that is lost."""
    upper = torch.linalg.cholesky(torch.linalg.inv(costs), upper=True)
    scales = (1.4 * change.abs().mean(1)).clamp(min=LEAST)
    for _ in range(3):
        moves = directions(change, scales, upper)
        weighed = moves @ costs
        scales = ((weighed * change).sum(1) / (weighed * moves).sum(1)).nan_to_num().clamp(min=LEAST)
    error = moves * scales[:, None] - change
    lost = ((error @ costs) * error).sum() / ((change @ costs) * change).sum()
    kept = torch.nn.functional.pad((moves + 1).to(torch.uint8), (0, -change.shape[1] % 5), value=1)
    places = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
    return (kept.view(len(change), -1, 5) * places).sum(2, dtype=torch.uint8), scales.float(), lost.item()


def directions(change, scales, upper):
    """-1, 0 or 1 for each weight, column by column; the error of each is handed on to those behind it."""
    left, moves = change.clone(), torch.empty_like(change)
    for start in range(0, change.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, change.shape[1]))
        errors = torch.zeros_like(left[:, block])
        for at in range(block.start, block.stop):
            moves[:, at] = (left[:, at] / scales).round().clamp(-1, 1)
            error = (left[:, at] - moves[:, at] * scales) / upper[at, at]
            left[:, at : block.stop] -= error[:, None] * upper[at, at : block.stop]
            errors[:, at - start] = error
        left[:, block.stop :] -= errors @ upper[block, block.stop :]
    return moves


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--base", required=True, type=pathlib.Path)
    parser.add_argument("--trained", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=9, help="of the conversations that are looked at")
    options = parser.parse_args()
    base, trained = load_file(options.base / "model.safetensors"), load_file(options.trained)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    model.load_state_dict(trained, strict=False)
    print("looking at conversations", flush=True)
    inputs = moments(model, render(options.gateway, options.base, talks(options.seed)))
    delta = {}
    for number, (name, weights) in enumerate(sorted(trained.items()), 1):
        change = weights - base[name]
        if change.ndim == 1:
            delta[f"{name}.change"] = change
            continue
        costs = damped(inputs[seen_by(name)])
        delta[f"{name}.directions"], delta[f"{name}.scales"], lost = packed(change.double(), costs)
        print(f"{number} of {len(trained)}, {name}: {lost:.1%} lost", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    whole, parts, held = sum(tensor.nbytes for tensor in delta.values()), [{}], 0
    for name, tensor in delta.items():
        held += tensor.nbytes
        if held > whole * len(parts) / PARTS:
            parts.append({})
        parts[-1][name] = tensor
    for at, part in enumerate(parts[:PARTS], 1):
        path = options.out / f"delta-{at}.safetensors"
        save_file(part, path)
        print(f"{path}: {path.stat().st_size} bytes, {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
