"""What the matrices of the model are given, and which change of one matters to whom.

A matrix that is trained changes for all its inputs, those of general answers too. Where conversations need the change and
general answers do not, it stays; where it is the other way round, it goes; in between it shrinks. That is the least-squares
mean of the trained matrix on the former and the base's on the latter (RegMean, Jin et al. 2023).
"""

import torch

# Added to the mean of the inputs' products, in parts of it, so that it can be inverted where no input goes.
DAMPING = 0.01
# Matrices that get the same inputs are looked at once.
INPUTS = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"}
INPUTS |= {"gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}


def seen_by(name):
    """Under which name the inputs of a matrix are looked at."""
    path, matrix = name.removesuffix(".weight").rsplit(".", 1)
    return f"{path}.{INPUTS[matrix]}"


def moments(model, examples):
    """The mean product of the inputs of each matrix that is looked at, by its name."""
    sums, hooks = {}, []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in INPUTS.values():

            def add(_module, inputs, name=name):
                rows = inputs[0].flatten(0, -2)
                sums[name] = sums.get(name, 0) + rows.T @ rows

            hooks.append(module.register_forward_pre_hook(add))
    with torch.no_grad():
        for example in examples:
            model.model(torch.tensor([example["tokens"]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    tokens = sum(len(example["tokens"]) for example in examples)
    return {name: (total / tokens).double() for name, total in sums.items()}


def damped(products):
    """What an error on inputs of these products costs; those that never come cost a little too."""
    made = products.clone()
    made.diagonal().add_(DAMPING * made.diagonal().mean())
    return made


def narrowing(talk, rest, share):
    """By which a change is multiplied from the right so that general answers, which count so much, have less of it."""
    made = damped(talk)
    return torch.linalg.solve(made + share * rest, made).T
