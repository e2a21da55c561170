"""Multimodal category prototypes: the memory bank, the thresholds and the pseudo-labels (paper, Sec. 3.4, Eq. 7-12).

B images, C categories, N locations, D dims, L queue length (the paper's l), K top-k. Labels: 1 present, -1 absent, 0 unknown.
Similarities and thresholds carry the modality in front: [0] visual, [1] text.
"""
import torch
import torch.nn.functional as F
from torch import nn

from kernels import topk_prototypes


class MemoryBank(nn.Module):
    """A queue of unit pixel features for each category, moving thresholds of both modalities, and the text prototypes.

    bank (C, L, D) first in, first out;  cursor (C,) int64 rows ever written to each queue: row r lies in slot r % L
    theta (2, 2, C) thresholds [visual, text] x [positive, negative], NaN until a first label was seen
    T (C, D) text prototypes: the positive text features at the end of stage one, NaN before
    """

    def __init__(self, C, L, D, eta=0.99):
        super().__init__()
        self.eta = eta
        self.register_buffer("bank", torch.zeros(C, L, D))
        self.register_buffer("cursor", torch.zeros(C, dtype=torch.int64))
        self.register_buffer("theta", torch.full((2, 2, C), torch.nan))
        self.register_buffer("T", torch.full((C, D), torch.nan))

    @torch.no_grad()
    def enqueue(self, energy, f, labels, k):
        """Eq. 7: the features at the k largest energies (B, C, N) of each known positive enter the queue of their category."""
        topk_prototypes(energy.detach(), f.detach(), labels, self.bank, self.cursor, k)

    def set_text_prototypes(self, g_pos):
        """T <- g_pos (C, D), of unit length."""
        self.T.copy_(F.normalize(g_pos.detach().to(self.T.dtype), dim=-1))

    def filled(self):
        """(C, L) bool: slots that hold a prototype."""
        return torch.arange(self.bank.shape[1], device=self.bank.device) < self.cursor[:, None]

    def mean_prototypes(self):
        """(C, D) mean of the stored unit prototypes, zeros for a category without any."""
        weight = self.filled().to(self.bank.dtype) / self.cursor.clamp(1, self.bank.shape[1])[:, None]   # (C, L)
        return (weight[:, None] @ self.bank)[:, 0]

    @torch.no_grad()
    def similarities(self, regions):
        """Eq. 8, averaged over the l prototypes of the category: regions (B, C, D) -> s (2, B, C), NaN where nothing is stored.

        mean_j cos(f^r, v_j) = f^r/|f^r| . mean_j v_j for unit v_j: one dot product a category, whatever the queue's length.
        """
        r = regions.to(self.bank.dtype)
        v = self.mean_prototypes().masked_fill(self.cursor[:, None] == 0, torch.nan)
        dots = r.transpose(0, 1) @ torch.stack([v, self.T], 1).mT                  # (C, B, 2)
        return dots.permute(2, 1, 0) / r.norm(dim=-1).clamp(min=1e-12)

    @torch.no_grad()
    def update_thresholds(self, s, labels):
        """Eq. 9: mean similarity of the batch's known positives and of its known negatives. Eq. 11: their moving averages.

        s (2, B, C) from `similarities`, labels (B, C). A category without such a label in the batch keeps its threshold.
        The print updates theta_positive twice; the second line is theta_negative.
        """
        for i, label in enumerate((1, -1)):
            use = (labels == label) & ~s.isnan()                                   # (2, B, C)   D^p_c or D^n_c
            s_bar = torch.where(use, s, 0.0).sum(1) / use.sum(1)                   # (2, C)      Eq. 9; NaN where none
            theta = self.theta[:, i]
            moved = torch.where(theta.isnan(), s_bar, self.eta * theta + (1 - self.eta) * s_bar)    # Eq. 11
            self.theta[:, i] = torch.where(s_bar.isnan(), theta, moved)

    @torch.no_grad()
    def pseudo_labels(self, s, labels, modalities=(0, 1)):
        """Eq. 10 and 12: an unknown label is estimated where all modalities agree. Returns (B, C) int8, zero wherever it is known.

        Eq. 10 as printed asks theta_pos <= s <= theta_neg for +1; read as: +1 above theta_positive, -1 below theta_negative.
        A category whose thresholds are missing, or not in order, gets no estimate.
        """
        theta_pos, theta_neg = self.theta[:, 0, None], self.theta[:, 1, None]      # (2, 1, C)
        in_order = theta_pos > theta_neg
        verdict = ((s >= theta_pos) & in_order).to(torch.int8) - ((s <= theta_neg) & in_order).to(torch.int8)   # Eq. 10
        verdict = torch.stack([verdict[i] for i in modalities])                    # a list as index would make the host wait for a GPU
        agree = torch.where((verdict == verdict[0]).all(0), verdict[0], 0)         # Eq. 12
        return torch.where(labels == 0, agree, 0).to(torch.int8)
