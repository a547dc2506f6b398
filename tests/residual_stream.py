"""What blocks do to the residual stream, measured plainly on a whole model: the yardstick for influence and angular distance."""

from __future__ import annotations

import math

import torch

from secateur.checkpoint.skeleton import Skeleton


def around_blocks(model, ids_NT):
    """What enters each block and what leaves it, by hooks on the whole model: ``[(x_NTD, out_NTD), ...]``."""
    found = []

    def hook(module, args, kwargs, out):
        x = args[0] if args else kwargs["hidden_states"]
        found.append((x.detach(), (out[0] if isinstance(out, tuple) else out).detach()))

    handles = [block.register_forward_hook(hook, with_kwargs=True) for block in Skeleton(model).blocks]
    with torch.no_grad():
        model(input_ids=ids_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def plain_cosine(x_D, y_D):
    x, y = ([float(value) for value in vector] for vector in (x_D, y_D))
    lengths = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / lengths


def plain_influence(x_NTD, out_NTD):
    """One minus the mean of the cosines, token by token."""
    pairs = zip(x_NTD.flatten(0, 1), out_NTD.flatten(0, 1), strict=True)
    return 1 - sum(plain_cosine(x_D, out_D) for x_D, out_D in pairs) / (x_NTD.shape[0] * x_NTD.shape[1])


def angles(model, ids_NT):
    """The distance of every run by its first and last block, from the whole model's hidden states."""
    around = around_blocks(model, ids_NT)
    found = {}
    for first, (x_NTD, _) in enumerate(around):
        for last in range(first, len(around)):
            pairs = zip(x_NTD[:, -1], around[last][1][:, -1], strict=True)
            turned = [math.acos(plain_cosine(x_D, out_D)) / math.pi for x_D, out_D in pairs]
            found[first, last] = sum(turned) / len(turned)
    return found
