"""Fewer launches: what a GPU does in the same way in each step is recorded once."""
import torch


def replayed(prompts, encoder, amp):
    """prompts.forward, trm.Prompts', as a CUDA graph: the same numbers, two launches in the place
    of some 600, which take longer than their work (docs/speed.md). amp: autocast's dtype or None.
    Without a gradient, or with too many prompts to keep, forward stays what it was."""
    plain, context = prompts.forward, prompts.context
    if not context.is_cuda or 2 * context.shape[1] > prompts.at_once:
        return plain

    def texts(context):
        return torch.func.functional_call(prompts, {"context": context}, (encoder,))

    same = context.detach().requires_grad_()  # its memory; recorded on another stream than training
    with torch.autocast("cuda", amp or torch.bfloat16, amp is not None, cache_enabled=False):
        graph = torch.cuda.make_graphed_callables(texts, (same,))

    def forward(encoder):
        if not torch.is_grad_enabled():
            return plain(encoder)
        return tuple(g.clone() for g in graph(context))  # the next replay overwrites its results

    return forward
