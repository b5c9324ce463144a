"""The mean of the weights of several runs.

    python average.py --out FILE FILE…
"""

import argparse
import pathlib

import torch
from safetensors.torch import load_file, save_file


class Mean:
    """The mean of all weights that were added, by name. Those of the first that is added are meant."""

    def __init__(self):
        self.weights, self.added = {}, 0

    def add(self, weights: dict):
        self.added += 1
        if self.added == 1:
            self.weights = {name: weight.clone() for name, weight in weights.items()}
        else:
            torch._foreach_lerp_(list(self.weights.values()), [weights[name] for name in self.weights], 1 / self.added)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("trained", nargs="+", type=pathlib.Path, metavar="FILE", help="weights of a run")
    options = parser.parse_args()
    mean = Mean()
    for path in options.trained:
        print(f"reading {path}", flush=True)
        mean.add(load_file(path))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(mean.weights, options.out)


if __name__ == "__main__":
    main()
