"""Makes the adapter that the gateway merges out of one that was trained.

    python export.py --trained FOLDER --out FOLDER

The result is an adapter as PEFT reads it, with the scale already in its second matrices, in bfloat16.
"""

import argparse
import hashlib
import json
import pathlib

import torch
from safetensors.torch import load_file, save_file

NAME = "adapter_model.safetensors"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    options = parser.parse_args()
    trained = json.loads((options.trained / "adapter_config.json").read_text())
    scale = trained["lora_alpha"] / trained["r"]
    tensors = {}
    for name, tensor in load_file(options.trained / NAME).items():
        tensors[name] = (tensor * scale if ".lora_B." in name else tensor).to(torch.bfloat16).contiguous()
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.out / NAME, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": trained["r"], "lora_alpha": trained["r"],
        "target_modules": sorted(trained["target_modules"]), "bias": "none",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }  # fmt: skip
    (options.out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    made = options.out / NAME
    print(f"{made}: {made.stat().st_size} bytes, sha256 {hashlib.sha256(made.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
