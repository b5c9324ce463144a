"""Makes the delta that the gateway merges: what training changed, in 1.6 bits for each weight.

    python export.py --base FOLDER --trained FILE --out FOLDER

Of a matrix it keeps which weights grew, which shrank and which hardly changed, and for each row by how much those that did
changed in the mean; of a vector all. `src/engine/mistral/delta.rs` tells how that is laid out.
"""

import argparse
import hashlib
import pathlib

import torch
from safetensors.torch import load_file, save_file

# A weight that changed by less than so much of its row's mean is left as it was.
LEAST = 0.6
# Files, of about one size each.
PARTS = 2


def packed(changes):
    """Five directions (0 shrank, 1 stayed, 2 grew) in a byte, and scales, of the changes of a matrix."""
    size = changes.abs()
    moved = size > LEAST * size.mean(1, keepdim=True)
    scales = (size * moved).sum(1) / moved.sum(1).clamp(min=1)
    directions = 1 + (changes.sign() * moved).to(torch.uint8)
    directions = torch.nn.functional.pad(directions, (0, -changes.shape[1] % 5), value=1)
    places = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
    return (directions.view(len(changes), -1, 5) * places).sum(2, dtype=torch.uint8), scales


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, type=pathlib.Path)
    parser.add_argument("--trained", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    options = parser.parse_args()
    base, delta = load_file(options.base / "model.safetensors"), {}
    for name, trained in sorted(load_file(options.trained).items()):
        changes = trained - base[name]
        if changes.ndim == 2:
            delta[f"{name}.directions"], delta[f"{name}.scales"] = packed(changes)
        else:
            delta[f"{name}.change"] = changes
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
