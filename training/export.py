"""Makes the delta that the gateway merges: what training changed, in 1.6 bits for each weight.

    python export.py --gateway PROGRAM --base FOLDER --trained FILE --out FOLDER

Of a matrix it keeps which weights grow, which shrink and which stay, and for each row by how much those that move do; of a
vector all. `src/engine/mistral/delta.rs` tells how that is laid out.

What counts is what a matrix does to the inputs that it gets. They are looked at in conversations and in general answers, and
the change that is kept is the one that comes nearest to the trained matrix on the former and to the base on the latter (RegMean,
Jin et al. 2023). What 1.6 bits get wrong in a column, the columns behind it make up for (GPTQ, Frantar et al. 2023).
"""

import argparse
import hashlib
import pathlib
import random

import torch
from domain import folder
from generate import conversations
from safetensors.torch import load_file, save_file
from train import general, render
from transformers import AutoModelForCausalLM

# How much an input of general answers counts beside one of conversations.
BASE = 0.1
# How many of both are looked at.
CONVERSATIONS, ANSWERS = 80, 160
# Added to the mean of the inputs' products, in parts of it, so that it can be inverted where no input goes.
DAMPING = 0.01
# The least that a row's weights move, so that none is divided by zero.
LEAST = 1e-12
# Columns whose errors are handed on together.
BLOCK = 128
# Matrices that get the same inputs are looked at once.
INPUTS = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"}
INPUTS |= {"gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}
# Files, of about one size each.
PARTS = 2


def moments(model, examples):
    """The mean product of the inputs of each matrix that is looked at, by its name."""
    sums, hooks = {}, []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in INPUTS.values():

            def add(_module, inputs, name=name):
                rows = inputs[0].flatten(0, -2)
                sums[name] = sums.get(name, 0) + rows.T @ rows

            hooks.append(module.register_forward_pre_hook(add))
    with torch.no_grad():
        for example in examples:
            model.model(torch.tensor([example["tokens"]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    tokens = sum(len(example["tokens"]) for example in examples)
    return {name: (total / tokens).double() for name, total in sums.items()}


def nearest(change, talk, rest):
    """The change nearest to `change` on the inputs of `talk` and to none on those of `rest`, and by what its errors count."""
    counts = talk + BASE * rest
    counts.diagonal().add_(DAMPING * counts.diagonal().mean())
    return torch.linalg.solve(counts, talk @ change.T).T, counts


def packed(change, counts):
    """Five directions (0 shrank, 1 stayed, 2 grew) in a byte, scales, and the share of the change that is lost."""
    upper = torch.linalg.cholesky(torch.linalg.inv(counts), upper=True)
    scales = (1.4 * change.abs().mean(1)).clamp(min=LEAST)
    for _ in range(3):
        moves = directions(change, scales, upper)
        weighed = moves @ counts
        scales = ((weighed * change).sum(1) / (weighed * moves).sum(1)).nan_to_num().clamp(min=LEAST)
    error = moves * scales[:, None] - change
    lost = ((error @ counts) * error).sum() / ((change @ counts) * change).sum()
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
    domains = folder("domains")
    talks = list(conversations(domains, domains, CONVERSATIONS, options.seed))
    others = [{"voice": False, **other} for other in random.Random(options.seed).sample(general(), ANSWERS)]
    print(f"looking at {len(talks)} conversations and {len(others)} general answers", flush=True)
    talk, rest = (moments(model, render(options.gateway, options.base, records)) for records in (talks, others))
    delta = {}
    for number, (name, weights) in enumerate(sorted(trained.items()), 1):
        change = weights - base[name]
        if change.ndim == 1:
            delta[f"{name}.change"] = change
            continue
        path, matrix = name.removesuffix(".weight").rsplit(".", 1)
        inputs = f"{path}.{INPUTS[matrix]}"
        wanted, counts = nearest(change.double(), talk[inputs], rest[inputs])
        delta[f"{name}.directions"], delta[f"{name}.scales"], lost = packed(wanted, counts)
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
