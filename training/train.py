"""Teaches SmolLM2-135M-Instruct the turns of a phone agent.

    python train.py --gateway PROGRAM --base FOLDER --out FOLDER

The base is the folder that `electron-gateway model pull` leaves behind, and the prompts are rendered and tokenized by
that program, so that what is trained is what is served. Only what the agent says is learned, by all weights but those of
the embeddings. Many requests to one business are learned from at once, the prompt that they share being read once. Beside
it, each step asks questions about anything, where the model learns to be as sure of each word as the base is, which keeps
it from forgetting all else; and every few steps the weights go back a little to the base's where conversations need that
least and general answers most (`inputs.py`).
"""

import argparse
import ctypes
import json
import math
import pathlib
import random
import subprocess
import time

import torch
from average import Mean
from domain import FOLDER, folder
from general_answers import FAST
from generate import conversations, requests
from inputs import moments, narrowing, seen_by
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Longest conversation in tokens; longer ones are left out.
LONGEST = 896
# Tokens of questions about anything, and their answers, in a step.
GENERAL = 384
# A token of a call, and the first of each answer, with which it is decided what it will be, counts as much as so many of what
# is said: there is one right call, and many right words.
CALL = 4.0
# A token of what is said of a result counts as much as so many: it has to state what is in there.
RESULT = 3.0
# A token of a tool's name counts as much as so many: the rest of a call follows from it.
NAME = 12.0
# Single requests that are made for one prompt; as many of them are learned from as fit into the longest conversation.
EACH = 14
# How much an input of general answers counts beside one of conversations when the weights go back, and after how many steps
# at which rate they do; where the rate is lower, after more.
BACK, BACK_EVERY, BACK_RATE = 0.007, 10, 2.5e-4
# Share of the steps whose weights are in the mean that is saved beside the last ones.
TAIL = 0.4
# Conversations and general answers whose inputs are looked at.
CONVERSATIONS, ANSWERS = 80, 160


def render(gateway, base, records):
    """Tokens of conversations and which of them are the agent's, from the program that serves the model."""
    command = [gateway, "model", "render", "--model", str(base)]
    given = "".join(json.dumps({key: r[key] for key in ("messages", "tools") if key in r}) + "\n" for r in records)
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    rendered = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rendered) == len(records)
    for r, record in zip(rendered, records, strict=True):
        r["group"] = record.get("group")
        turns = {turn["at"]: turn for turn in record.get("turns", [])}
        said = [at for at, message in enumerate(record["messages"]) if message["role"] == "assistant"]
        for answer, at in zip(r["answers"], said, strict=True):
            answer["turn"] = turns.get(at, {})
    # A prompt that the gateway takes for a voice agent's has to be one, and the other way round.
    fits = [
        r
        for r, record in zip(rendered, records, strict=True)
        if "tools" not in record or record["voice"] == r["speaks"]
    ]
    return [r for r in fits if len(r["tokens"]) <= LONGEST]


def packed(group):
    """One example out of several conversations that begin alike: how they begin stands there once.

    `branches` tells for each token whose it is: 0 is everybody's, and no conversation sees what is of another.
    """
    whole = [example["tokens"] for example in group]
    most = min(example["answers"][0]["start"] for example in group) - 1
    shared = next((at for at in range(most) if len({tokens[at] for tokens in whole}) > 1), most)
    made = {"tokens": whole[0][:shared], "places": list(range(shared)), "branches": [0] * shared, "answers": []}
    for branch, example in enumerate(group, 1):
        own, moved = len(example["tokens"]) - shared, len(made["tokens"]) - shared
        if len(made["tokens"]) + own > LONGEST:
            break
        made["tokens"] += example["tokens"][shared:]
        made["places"] += range(shared, shared + own)
        made["branches"] += [branch] * own
        made["answers"] += [{**a, "start": a["start"] + moved, "end": a["end"] + moved} for a in example["answers"]]
    return made


def grouped(gateway, base, groups):
    """Groups of single requests, each packed into one example."""
    records = [{**record, "group": number} for number, group in enumerate(groups) for record in group]
    found = {}
    for example in render(gateway, base, records):
        found.setdefault(example["group"], []).append(example)
    return [packed(group) for group in found.values()]


def general():
    """Questions about anything and answers, made up by the model itself before it was trained."""
    return [json.loads(line) for line in (FOLDER / "general.jsonl").read_text().splitlines()]


def talks(seed):
    """Conversations whose inputs are looked at."""
    domains = folder("domains")
    return list(conversations(domains, domains, CONVERSATIONS, seed))


def narrowings(model, talked, answered):
    """By which the change of each matrix is multiplied when it goes back, under the name of its inputs."""
    talk, rest = moments(model, talked), moments(model, answered)
    return {name: narrowing(talk[name], rest[name], BACK).float() for name in talk}


def batches(examples, tokens, rng):
    """Batches of about so many tokens, of examples of about one length."""
    order = sorted(range(len(examples)), key=lambda at: len(examples[at]["tokens"]) + rng.random() * 32)
    made, batch = [], []
    for at in order:
        longest = max([len(examples[i]["tokens"]) for i in [*batch, at]])
        if batch and longest * (len(batch) + 1) > tokens:
            made.append(batch)
            batch = []
        batch.append(at)
    made.append(batch)
    rng.shuffle(made)
    return [[examples[at] for at in batch] for batch in made]


def forever(examples, tokens, rng):
    """Batches without an end, each time in another order."""
    while True:
        yield from batches(examples, tokens, rng)


class Marks:
    """The tokens by which the parts of an answer are told apart."""

    def __init__(self, tokenizer):
        self.call = tokenizer.convert_tokens_to_ids("<")
        self.name = tokenizer.encode('{"name": "', add_special_tokens=False)
        self.behind = tokenizer.convert_tokens_to_ids('",')

    def counts(self, answer, turn):
        """How much each token of an answer counts, by what kind of turn it is and whose words are said before a call."""
        said = turn.get("words")
        words = answer.index(self.call) if self.call in answer else len(answer)
        decided = min(words, 1)
        spoken = RESULT if turn.get("kind") == "answer" else 1.0
        counts = [CALL] * decided + [spoken] * (words - decided) + [CALL] * (len(answer) - words)
        for at in range(words, len(answer)):
            begins = at + len(self.name)
            if answer[at:begins] == self.name:
                ends = answer.index(self.behind, begins)
                counts[begins:ends] = [0.0 if said == "fitting" else NAME] * (ends - begins)
        if said == "drawn":
            counts[:words] = [0.0] * words
        return counts


def tensors(batch, marks):
    """What the model is given, and for each trained token where it is predicted, what it is, and how much it counts."""
    # Kernels are faster at multiples of 32.
    longest = -(-max(len(example["tokens"]) for example in batch) // 32) * 32
    inputs, places, branches = torch.zeros(3, len(batch), longest, dtype=torch.long)
    places += torch.arange(longest)
    rows, columns, targets, counts = [], [], [], []
    for row, example in enumerate(batch):
        tokens = example["tokens"]
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        if "branches" in example:
            places[row, : len(tokens)] = torch.tensor(example["places"])
            branches[row, : len(tokens)] = torch.tensor(example["branches"])
        for told in example["answers"]:
            start, end = told["start"], told["end"]
            answer = tokens[start:end]
            rows += [row] * (end - start)
            columns += range(start - 1, end - 1)
            targets += answer
            counts += marks.counts(answer, told["turn"])
    given = {"input_ids": inputs, "position_ids": places, "use_cache": False}
    if branches.any():
        seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
        seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
        given["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None]
    return given, (torch.tensor(rows), torch.tensor(columns)), torch.tensor(targets), torch.tensor(counts)


class Attention(torch.autograd.Function):
    """Attention whose backward pass is made of whole products: faster than PyTorch's own, in bfloat16.

    It is causal where no mask is given.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        times = q.shape[1] // k.shape[1]
        wide = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = flash(q, *wide, 0.0, mask is None, attn_mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, mask, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask, out, sums = ctx.saved_tensors
        batch, heads, length, size = q.shape
        groups = batch * k.shape[1]
        times = heads // k.shape[1]
        square = (groups, times, length, length)
        flat = (groups, times * length, length)
        q, out, grad = (t.reshape(groups, times * length, size) for t in (q, out, grad))
        k, v = (t.reshape(groups, length, size) for t in (k, v))
        at = torch.arange(length)
        # Of a mask each row of the batch has one, which is that of all its heads.
        seen = (at <= at[:, None])[None] if mask is None else (mask[:, 0] == 0).repeat_interleave(groups // batch, 0)
        scores = torch.bmm(q, k.transpose(1, 2)).view(square).float() * ctx.scale
        shares = torch.where(seen[:, None], torch.exp(scores - sums.reshape(groups, times, length, 1)), 0.0)
        mean = (grad.float() * out.float()).sum(-1).view(groups, times, length, 1)
        change = torch.bmm(grad, v.transpose(1, 2)).view(square).float() - mean
        change = (shares * change * ctx.scale).to(q.dtype).view(flat)
        shares = shares.to(q.dtype).view(flat)
        of_v = torch.bmm(shares.transpose(1, 2), grad).view(batch, -1, length, size)
        of_q = torch.bmm(change, k).view(batch, heads, length, size)
        of_k = torch.bmm(change.transpose(1, 2), q).view(batch, -1, length, size)
        return of_q, of_k, of_v, None, None


def attention(_module, q, k, v, mask, scaling, **_others):
    mask = None if mask is None else mask.bfloat16()
    out = Attention.apply(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def keep_memory():
    """Has the C library hand freed memory to the next step, instead of giving it back and asking again."""
    trim_threshold, mmap_max = -1, -4
    library = ctypes.CDLL(None)
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, -1)


def weights_of(model):
    """The trained weights, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save(weights, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--base", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--from", dest="start", type=pathlib.Path, metavar="FILE", help="weights to go on from")
    parser.add_argument("--count", type=int, default=9000, help="conversations, of which --steps may leave some out")
    parser.add_argument("--groups", type=int, default=5000, help="of single requests, the same")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--tokens", type=int, default=3072, help="of one step")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    options = parser.parse_args()
    keep_memory()
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    domains = folder("domains")
    records = list(conversations(domains, domains, options.count, options.seed))
    others = general()
    groups = list(requests(domains, options.groups, EACH, options.seed))
    all_of_it = f"{len(records)} conversations, {len(groups)} groups of requests, {len(others)} general questions"
    print(f"rendering {all_of_it}", flush=True)
    learned = render(options.gateway, options.base, records) + grouped(options.gateway, options.base, groups)
    steps = batches(learned, options.tokens, rng)[: options.steps]
    others = render(options.gateway, options.base, [{"voice": False, **other} for other in others])
    total = sum(len(example["tokens"]) for batch in steps for example in batch)
    answers = sum(len(example["answers"]) for batch in steps for example in batch)
    print(f"{answers} answers in {sum(map(len, steps))} texts of {total} tokens, {len(steps)} steps", flush=True)

    marks = Marks(AutoTokenizer.from_pretrained(options.base))
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    if options.start:
        model.load_state_dict(load_file(options.start), strict=False)
    model.requires_grad_(False)
    inner, head = model.model, model.lm_head
    print(f"looking at {CONVERSATIONS} conversations and {ANSWERS} general answers", flush=True)
    talked = render(options.gateway, options.base, talks(options.seed))
    narrow = narrowings(model, talked, random.Random(options.seed).sample(others, ANSWERS))
    ALL_ATTENTION_FUNCTIONS.register("whole", attention)
    model.set_attn_implementation("whole" if FAST is torch.bfloat16 else "sdpa")
    origin = load_file(options.base / "model.safetensors")
    matrices = {name: p for name, p in inner.named_parameters(prefix="model") if p.ndim == 2 and ".layers." in name}
    teacher = AutoModelForCausalLM.from_pretrained(options.base, dtype=FAST).requires_grad_(False)
    for layer in inner.layers:
        layer.requires_grad_(True)
        layer.compile(dynamic=True)
    trained = list(inner.layers.parameters())
    print(f"{sum(p.numel() for p in trained)} trained weights", flush=True)
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    warm = max(1, len(steps) // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / len(steps)))),
    )
    fast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=FAST is torch.bfloat16)
    others = forever(others, GENERAL, rng)
    began, recent, distances, due, tail = time.monotonic(), [], [], 0.0, Mean()
    with (options.out / "loss.jsonl").open("w") as log:
        for step, batch in enumerate(steps, 1):
            given, at, targets, counts = tensors(batch, marks)
            with fast:
                logits = head(inner(**given).last_hidden_state[at])
            losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none") * counts
            (losses.sum() / counts.sum()).backward()
            recent.append(losses.sum().item() / counts.sum().item())
            given, at, _, _ = tensors(next(others), marks)
            with fast:
                logits = head(inner(**given).last_hidden_state[at])
            with torch.no_grad():
                wanted = teacher.lm_head(teacher.model(**given).last_hidden_state[at])
            wanted, said = (torch.log_softmax(values.float(), -1) for values in (wanted, logits))
            away = torch.nn.functional.kl_div(said, wanted, reduction="batchmean", log_target=True)
            away.backward()
            distances.append(away.item())
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            due += scheduler.get_last_lr()[0] / BACK_RATE
            scheduler.step()
            if due >= BACK_EVERY:
                due -= BACK_EVERY
                with torch.no_grad():
                    for name, p in matrices.items():
                        p.copy_(origin[name] + (p - origin[name]) @ narrow[seen_by(name)])
            if step > (1 - TAIL) * len(steps):
                tail.add(weights_of(model))
            if step % 20 == 0 or step == len(steps):
                seconds = time.monotonic() - began
                mean, distance = sum(recent) / len(recent), sum(distances) / len(distances)
                left = seconds / step * (len(steps) - step)
                told = {"step": step, "loss": round(mean, 4), "distance": round(distance, 4), "seconds": round(seconds)}
                log.write(json.dumps(told) + "\n")
                log.flush()
                pace = f"{seconds / step:.1f} s a step, {left / 60:.0f} min left"
                print(f"step {step} of {len(steps)}, loss {mean:.4f}, distance {distance:.4f}, {pace}", flush=True)
                recent, distances = [], []
            if step % options.save_every == 0 or step == len(steps):
                save(weights_of(model), options.out / f"step-{step}" / "trained.safetensors")
        save(tail.weights, options.out / f"step-{step}" / "mean.safetensors")


if __name__ == "__main__":
    main()
