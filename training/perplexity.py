"""How far the trained model has moved from its base on questions about anything.

    python perplexity.py --gateway PROGRAM --base FOLDER --trained FOLDER

The base answers the held-out questions, drawing from all of its distribution, and both models say how likely each of
those tokens is. The ratio of the perplexities is 1 where nothing was forgotten.
"""

import argparse
import json
import math
import pathlib
import subprocess
import tomllib

import torch
from domain import FOLDER
from general_answers import drawn
from transformers import AutoModelForCausalLM, AutoTokenizer

LONGEST = 200


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--base", required=True, type=pathlib.Path)
    parser.add_argument("--trained", required=True, type=pathlib.Path)
    parser.add_argument("--show", type=int, default=0, help="print so many answers of both")
    options = parser.parse_args()
    torch.manual_seed(5)
    questions = tomllib.loads((FOLDER / "general.toml").read_text())["held_out"]
    command = [options.gateway, "model", "render", "--model", str(options.base)]
    given = "".join(json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n" for question in questions)
    rendered = subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout
    prompts = [json.loads(line)["tokens"] for line in rendered.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(options.trained, dtype=torch.float32)
    answers = [tokens + [end] * whole for tokens, whole in drawn(base, prompts, LONGEST, end)]
    surprise, tokens = {"base": 0.0, "trained": 0.0}, sum(map(len, answers))
    with torch.no_grad():
        for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            for name, model in (("base", base), ("trained", trained)):
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                surprise[name] += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
            if at < options.show:
                print(f"\n{questions[at]}")
                for name, model in (("base", base), ("trained", trained)):
                    most = {"max_new_tokens": LONGEST, "eos_token_id": end, "pad_token_id": end}
                    answer = model.generate(torch.tensor([prompt]), do_sample=False, **most)[0, len(prompt) :]
                    print(f"{name}: {tokenizer.decode(answer, skip_special_tokens=True)}")
    perplexity = {name: math.exp(value / tokens) for name, value in surprise.items()}
    ratio = perplexity["trained"] / perplexity["base"]
    both = f"{perplexity['base']:.3f} base, {perplexity['trained']:.3f} trained"
    print(f"{len(prompts)} questions, {tokens} tokens: {both}, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
