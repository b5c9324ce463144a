"""How many calls of held-out conversations a model makes token for token, the right words before them given.

    python calls.py --gateway PROGRAM --base FOLDER --trained FILE

A look at weights that no gateway serves yet, of minutes; `evaluate.py` asks a gateway.
"""

import argparse
import pathlib

import torch
from domain import folder
from generate import conversations
from safetensors.torch import load_file
from train import render
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--base", required=True, type=pathlib.Path)
    parser.add_argument("--trained", required=True, type=pathlib.Path, help="weights of a run, or of a merged model")
    parser.add_argument("--held-out", metavar="FOLDER", default="eval", help="whose domains, as in generate.py")
    parser.add_argument("--count", type=int, default=60, help="conversations")
    parser.add_argument("--seed", type=int, default=7, help="of the conversations")
    parser.add_argument("--filler", metavar="TEXT", help="said before all calls, so that nothing but the call tells the tool")
    options = parser.parse_args()
    domains = folder(options.held_out)
    records = list(conversations(domains, domains, options.count, options.seed, held_out=True))
    if options.filler:
        for message in (message for record in records for message in record["messages"]):
            if message.get("content") and "tool_calls" in message:
                message["content"] = options.filler
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    opening = tokenizer.convert_tokens_to_ids("<")
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    model.load_state_dict(load_file(options.trained), strict=False)
    calls, tools, whole, surprise = 0, 0, 0, {"tool": 0.0, "arguments": 0.0}
    for example in render(options.gateway, options.base, records):
        tokens = example["tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        likeliest = logits.argmax(-1).tolist()
        for answer in example["answers"]:
            if opening not in tokens[answer["start"] : answer["end"]]:
                continue
            start = tokens.index(opening, answer["start"])
            right = [likeliest[at - 1] == tokens[at] for at in range(start, answer["end"])]
            named = next(
                at for at in range(len(right)) if "arguments" in tokenizer.decode(tokens[start : start + at + 1])
            )
            wanted = torch.tensor(tokens[start : answer["end"]])
            each = torch.nn.functional.cross_entropy(logits[start - 1 : answer["end"] - 1], wanted, reduction="none")
            surprise["tool"] += each[:named].sum().item()
            surprise["arguments"] += each[named:].sum().item()
            calls += 1
            tools += all(right[:named])
            whole += all(right)
    print(f"{calls} calls: the right tool in {tools}, all of it right in {whole}")
    print("loss of a call:", ", ".join(f"{part} {loss / calls:.3f}" for part, loss in surprise.items()))


if __name__ == "__main__":
    main()
