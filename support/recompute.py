"""Less memory for more time: what is too much to keep for the backward pass is computed again in
it."""
from torch.utils.checkpoint import checkpoint


def checkpointed(fn, parts):
    """[fn(*part) for part in parts]. Of several parts the activations are not kept, but computed
    again."""
    if len(parts) == 1:
        return [fn(*parts[0])]
    return [checkpoint(fn, *part, use_reentrant=False) for part in parts]
