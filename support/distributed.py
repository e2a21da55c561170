"""Several GPUs that train one model; the bank and Eq. 9-13 are those of one process.

    torchrun --nproc-per-node 4 train.py --data coco --root /data/coco --ratio 0.3

Rank r of W encodes rows r, r + W, ... of a batch; what the losses need is gathered on all of them,
with gradients, and each rank computes the loss of the whole batch. In one process all of this does
nothing. B images of a batch over all ranks, b of this rank's.
"""
import atexit
import os

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def start():
    """Joins the processes that torchrun started, if it did -> (rank, number of processes)."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def gather(x, B):
    """Equal shares x (b, ...) of all ranks -> the batch's B rows in order. Gradients reach this
    rank's rows, times W: each rank has the loss of the whole batch, and the mean is taken."""
    if not dist.is_initialized():
        return x
    W = dist.get_world_size()
    parts = [torch.empty_like(x) for _ in range(W)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x + (W - 1) * (x - x.detach())  # the value x, its gradient times W
    return torch.stack(parts, 1).flatten(0, 1)[:B]  # behind row B: padding


def average_gradients(parameters):
    """Each rank has the loss of the whole batch, so the mean over ranks is its exact gradient."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = parameters_to_vector(grads)  # one message, not one a parameter
    dist.all_reduce(flat)
    vector_to_parameters(flat / dist.get_world_size(), grads)
