"""Prototype extraction, Eq. 7: for each known positive the features at the K largest energies, into its queue."""
import torch


@torch.no_grad()
def topk_prototypes_reference(energy, f, labels, bank, cursor, k):
    C, L, D = bank.shape
    k = min(k, energy.shape[2])
    c, b = (labels == 1).t().nonzero(as_tuple=True)         # by category, within it by image   (P,), (P,)
    count = (labels == 1).sum(0)                                                            # (C,)
    rank = torch.arange(len(c), device=c.device) - (count.cumsum(0) - count)[c]             # earlier images  (P,)
    e = energy[b, c].float()
    e = torch.where(e.isnan(), -torch.inf, e)               # a NaN energy ranks with -inf, without a host sync
    n = e.sort(dim=1, descending=True, stable=True).indices[:, :k]      # stable: ties lowest index first   (P, k)
    rows = f[b[:, None], n].float()                                                         # (P, k, D)
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    order = rank[:, None] * k + torch.arange(k, device=c.device)            # place in this batch's stream  (P, k)
    stays = order >= (count * k)[c][:, None] - L            # the last L; the others would be overwritten anyway
    slot = (cursor[c][:, None] + order) % L
    bank[c[:, None].expand_as(slot)[stays], slot[stays]] = rows[stays].to(bank.dtype)
    cursor += count * k


def topk_prototypes(energy, f, labels, bank, cursor, k):
    topk_prototypes_reference(energy.detach(), f.detach(), labels, bank, cursor, k)
