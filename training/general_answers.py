"""Has the base answer the general questions of `general.toml`, so that training can keep it from forgetting how.

    python general_answers.py --gateway PROGRAM --base FOLDER > general.jsonl
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tomllib

import torch
from domain import FOLDER
from transformers import AutoModelForCausalLM, AutoTokenizer

# Answers are cut at so many tokens; those that are cut are left out.
LONGEST = 220
BATCH = 28


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--base", required=True, type=pathlib.Path)
    parser.add_argument("--each", type=int, default=2, help="answers to each question")
    options = parser.parse_args()
    torch.manual_seed(1)
    questions = tomllib.loads((FOLDER / "general.toml").read_text())["questions"]
    talks = [[{"role": "user", "content": question}] for question in questions for _ in range(options.each)]
    command = [options.gateway, "model", "render", "--model", str(options.base)]
    given = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
    rendered = subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout
    prompts = [json.loads(line)["tokens"] for line in rendered.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    order = sorted(range(len(talks)), key=lambda at: len(prompts[at]))
    answers = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        longest = max(len(prompts[at]) for at in batch)
        inputs = torch.tensor([[end] * (longest - len(prompts[at])) + prompts[at] for at in batch])
        mask = torch.tensor([[0] * (longest - len(prompts[at])) + [1] * len(prompts[at]) for at in batch])
        with torch.no_grad():
            made = model.generate(
                input_ids=inputs, attention_mask=mask, max_new_tokens=LONGEST, do_sample=True, temperature=0.7,
                top_p=0.95, eos_token_id=end, pad_token_id=end,
            )  # fmt: skip
        for at, tokens in zip(batch, made[:, longest:].tolist(), strict=True):
            if end in tokens:
                answers[at] = tokenizer.decode(tokens[: tokens.index(end)]).strip()
        print(f"{start + len(batch)} of {len(order)}", file=sys.stderr, flush=True)
    for at in sorted(answers):
        if answers[at]:
            messages = [*talks[at], {"role": "assistant", "content": answers[at]}]
            print(json.dumps({"messages": messages}, ensure_ascii=False))


if __name__ == "__main__":
    main()
