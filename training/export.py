"""Makes the delta that the gateway merges: what training changed, in one bit for each weight.

    python export.py --base FOLDER --trained FILE --out FILE

Of a matrix it keeps whether each weight grew, and for each row by how much its weights changed in the mean; of a vector
all. `src/engine/mistral/delta.rs` tells how that is laid out.
"""

import argparse
import hashlib
import pathlib

import numpy
import torch
from safetensors.torch import load_file, save_file


def packed(changes):
    """Signs, packed, and scales of the changes of a matrix."""
    signs = numpy.packbits((changes > 0).numpy(), axis=1, bitorder="little")
    return torch.from_numpy(signs), changes.abs().mean(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, type=pathlib.Path)
    parser.add_argument("--trained", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    options = parser.parse_args()
    base, delta = load_file(options.base / "model.safetensors"), {}
    for name, trained in load_file(options.trained).items():
        changes = trained - base[name]
        if changes.ndim == 2:
            delta[f"{name}.signs"], delta[f"{name}.scales"] = packed(changes)
        else:
            delta[f"{name}.change"] = changes
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(delta, options.out)
    print(f"{options.out}: {options.out.stat().st_size} bytes, {hashlib.sha256(options.out.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
