"""Less memory for more time: what is too much to keep for backward is computed again."""
from torch.utils.checkpoint import checkpoint


def checkpointed(fn, parts):
    """[fn(*part) for part in parts]; with several parts the activations are computed again."""
    if len(parts) == 1:
        return [fn(*parts[0])]
    return [checkpoint(fn, *part, use_reentrant=False) for part in parts]
