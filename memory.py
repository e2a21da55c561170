"""Multimodal category prototypes: memory bank, thresholds, pseudo-labels (Sec. 3.4, Eq. 7-12).

B images, C categories, N locations, D dims, L queue length (the paper's l), K top-k.
Labels: 1 present, -1 absent, 0 unknown. Similarities and thresholds carry the modality in front:
[0] visual, [1] text.
"""
import torch
import torch.nn.functional as F
from torch import nn

from kernels import topk_prototypes


class MemoryBank(nn.Module):
    """A queue of unit pixel features for each category, moving thresholds, and the text prototypes.

    bank    (C, L, D) first in, first out
    cursor  (C,) int64 rows ever written: row r lies in slot r % L
    theta   (2, 2, C) thresholds [visual, text] x [positive, negative], NaN before a first label
    text_prototypes (C, D) the positive text features at the end of stage one, NaN before
    """

    def __init__(self, C, L, D, eta=0.99):
        super().__init__()
        self.eta = eta
        self.register_buffer("bank", torch.zeros(C, L, D))
        self.register_buffer("cursor", torch.zeros(C, dtype=torch.int64))
        self.register_buffer("theta", torch.full((2, 2, C), torch.nan))
        self.register_buffer("text_prototypes", torch.full((C, D), torch.nan))

    @torch.no_grad()
    def enqueue(self, energy, f, labels, k):
        """Eq. 7: the features f (B, N, D) at the k largest energies (B, C, N) of each known
        positive enter the queue of their category."""
        topk_prototypes(energy, f, labels, self.bank, self.cursor, k)

    @torch.no_grad()
    def set_text_prototypes(self, g_pos):
        """g_pos (C, D) text features, "the text representation trained in the first stage"."""
        self.text_prototypes.copy_(F.normalize(g_pos.to(self.bank.dtype), dim=-1))

    def filled(self):
        """(C, L) bool: slots that hold a prototype."""
        return torch.arange(self.bank.shape[1], device=self.bank.device) < self.cursor[:, None]

    def mean_prototypes(self):
        """(C, D) mean of the stored unit prototypes, zeros for a category without any."""
        count = self.cursor.clamp(1, self.bank.shape[1])[:, None]
        weight = self.filled().to(self.bank.dtype) / count  # (C, L)
        return (weight[:, None] @ self.bank)[:, 0]

    @torch.no_grad()
    def similarities(self, regions):
        """Eq. 8 averaged over the prototypes of a category: regions (B, C, D) -> s (2, B, C), the
        inner mean of Eq. 9 and the s^u of Eq. 10.

        mean_j cos(f^r, v_j) = f^r/|f^r| . mean_j v_j for unit v_j: a dot product per image,
        category and modality. NaN where nothing is stored.
        """
        r = regions.to(self.bank.dtype)
        visual = self.mean_prototypes().masked_fill(self.cursor[:, None] == 0, torch.nan)
        prototypes = torch.stack([visual, self.text_prototypes], 1)  # (C, 2, D)
        dots = r.transpose(0, 1) @ prototypes.mT  # (C, B, 2)
        return dots.permute(2, 1, 0) / r.norm(dim=-1).clamp(min=1e-12)  # (2, B, C)   Eq. 8

    @torch.no_grad()
    def update_thresholds(self, s, labels):
        """Eq. 9: mean similarity of the batch's positives and negatives. Eq. 11: their moving mean.

        s (2, B, C) from `similarities`, labels (B, C). A category without such a label keeps its
        threshold. The paper updates theta_positive twice; the second line is theta_negative.
        """
        for i, label in enumerate((1, -1)):
            use = (labels == label) & ~s.isnan()  # (2, B, C)   D^p_c or D^n_c
            s_bar = torch.where(use, s, 0.0).sum(1) / use.sum(1)  # (2, C)   Eq. 9; NaN where none
            theta = self.theta[:, i]
            moved = self.eta * theta + (1 - self.eta) * s_bar  # Eq. 11
            moved = torch.where(theta.isnan(), s_bar, moved)  # the first mean starts the average
            self.theta[:, i] = torch.where(s_bar.isnan(), theta, moved)

    @torch.no_grad()
    def verdicts(self, s):
        """Eq. 10: what each modality says. s (2, B, C) -> (2, B, C) int8, 0 where it says nothing.

        As printed, +1 asks theta_pos <= s <= theta_neg; read as: +1 from theta_pos up, -1 from
        theta_neg down. A category whose thresholds are missing, or not in order, gets no verdict.
        """
        theta_pos, theta_neg = self.theta[:, :, None].unbind(1)  # (2, 1, C)
        in_order = theta_pos > theta_neg
        present = (s >= theta_pos) & in_order
        absent = (s <= theta_neg) & in_order
        return present.to(torch.int8) - absent.to(torch.int8)  # Eq. 10

    @torch.no_grad()
    def pseudo_labels(self, s, labels, modalities=(0, 1)):
        """Eq. 12: an unknown label is estimated where all modalities agree.

        s (2, B, C), labels (B, C) -> (B, C) int8, 0 where the label is known or they disagree.
        """
        verdict = self.verdicts(s)
        # not verdict[modalities]: a list as an index goes to the GPU, and the host waits for it
        verdict = torch.stack([verdict[i] for i in modalities])
        agree = (verdict == verdict[0]).all(0)  # (B, C) bool
        return torch.where(agree & (labels == 0), verdict[0], 0)  # Eq. 12
