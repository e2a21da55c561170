"""Several GPUs that train one model: every rank sees the whole batch, so the bank and Eq. 9-13 are those of one process.

    torchrun --nproc-per-node 4 train.py --data coco --root /data/coco --ratio 0.3

Rank r of W encodes rows r, r + W, ... of a batch; what the losses need is gathered on all of them, with gradients, and each rank
computes the loss of the whole batch. In one process all of this does nothing. B images of a batch over all ranks, n of a split.
"""
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn


def gather(x, B):
    """Equal shares x (b, ...) of every rank -> the B rows of the batch in its own order; gradients flow back."""
    if not dist.is_initialized():
        return x
    if x.requires_grad:
        parts = dist_nn.all_gather(x.contiguous())
    else:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
    return torch.stack(tuple(parts), 1).flatten(0, 1)[:B]                          # behind row B: padding


def average_gradients(parameters):
    """Every rank computed the loss of the whole batch from gathered parts, so the mean over the ranks is its exact gradient."""
    if dist.is_initialized():
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g) / dist.get_world_size())


def in_order(scores, n, batch):
    """{name: (b, C) scores of this rank's images} -> {name: (n, C)}: every image of the split once, in its own order."""
    if not dist.is_initialized():
        return scores
    world = dist.get_world_size()
    parts = [None] * world
    dist.all_gather_object(parts, scores)
    place = [np.concatenate([rows[r::world] for rows in np.split(np.arange(n), range(batch, n, batch))]) for r in range(world)]
    names = parts[0]                                                               # a late rank has none where images are few
    return {name: np.concatenate([part[name] for part in parts if part])[np.argsort(np.concatenate(place))] for name in names}
