"""Has the base make up questions about anything and answer them, so that training can keep it as it was.

    python general_answers.py --gateway PROGRAM --base FOLDER > general.jsonl

Both are drawn from all of its distribution, which is what is to be kept.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# Questions and answers are cut at so many tokens. A question that is cut is left out; an answer is kept, for what follows each of
# its words is asked of the base again.
QUESTION, ANSWER = 60, 200
BATCH = 64
# bfloat16 is faster only where the processor has instructions for it.
FAST = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def drawn(model, prompts, most, end):
    """What the model says behind each prompt, and whether it came to an end."""
    longest = max(map(len, prompts))
    inputs = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        made = model.generate(
            input_ids=inputs, attention_mask=mask, max_new_tokens=most, do_sample=True, top_k=0, eos_token_id=end,
            pad_token_id=end,
        )  # fmt: skip
    said = made[:, longest:].tolist()
    return [(tokens[: tokens.index(end)], True) if end in tokens else (tokens, False) for tokens in said]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--base", required=True, type=pathlib.Path)
    parser.add_argument("--batches", type=int, default=14, help=f"of {BATCH} questions")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=FAST)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    command = [options.gateway, "model", "render", "--model", str(options.base)]
    talk = json.dumps({"messages": [{"role": "user", "content": "?"}]})
    done = subprocess.run(command, input=talk, capture_output=True, text=True, check=True)
    prompt = json.loads(done.stdout)["tokens"]
    at = len(prompt) - 1 - prompt[::-1].index(tokenizer.convert_tokens_to_ids("?"))
    before, after = prompt[:at], prompt[at + 1 :]
    for batch in range(options.batches):
        questions = [tokens for tokens, whole in drawn(model, [before] * BATCH, QUESTION, end) if whole]
        answers = drawn(model, [before + tokens + after for tokens in questions], ANSWER, end)
        for question, (answer, _) in zip(questions, answers, strict=True):
            texts = [tokenizer.decode(tokens).strip() for tokens in (question, answer)]
            messages = [{"role": role, "content": t} for role, t in zip(("user", "assistant"), texts, strict=True)]
            if all(texts):
                print(json.dumps({"messages": messages}, ensure_ascii=False), flush=True)
        print(f"{batch + 1} of {options.batches}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
