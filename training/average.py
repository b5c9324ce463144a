"""The mean of the weights of several runs.

    python average.py --out FILE FILE…
"""

import argparse
import pathlib

from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("trained", nargs="+", type=pathlib.Path, metavar="FILE", help="weights of a run")
    options = parser.parse_args()
    mean = {}
    for path in options.trained:
        print(f"reading {path}", flush=True)
        for name, weight in load_file(path).items():
            mean[name] = mean.get(name, 0.0) + weight / len(options.trained)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(mean, options.out)


if __name__ == "__main__":
    main()
