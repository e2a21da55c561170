"""Category-aware regions: F^r_c = sum_n sigmoid(energy_cn) f_n (Eq. 2, 4), and their matching with the text (Eq. 1)."""
import torch


def region_pool_reference(energy, f):
    mask = energy.sigmoid().to(f.dtype)                                                     # Eq. 2   (B, C, N)
    return torch.bmm(mask, f)                                                               # Eq. 4   (B, C, D)


@torch.no_grad()
def region_match_reference(energy, f, g_pos, g_neg):
    regions = region_pool_reference(energy, f).float()                                      # (B, C, D)
    difference = g_pos.float() - g_neg.float()      # cos(F, g+) - cos(F, g-) = F.(g+ - g-) / |F| for unit g  (C, D)
    return torch.einsum("bcd,cd->bc", regions, difference) / regions.norm(dim=-1).clamp(min=1e-12)


def region_pool(energy, f):
    return region_pool_reference(energy, f)


def region_match(energy, f, g_pos, g_neg, scale):
    return scale * region_match_reference(energy, f, g_pos, g_neg)
