"""What one batch teaches: missing labels are estimated, then the terms of the loss are computed (paper, Sec. 3.3-3.6, Eq. 6-15).

trm.py, memory.py and losses.py hold the parts; here they meet, as the settings (config.Config) say. `train.Run.step` sums the terms.
B images, C categories, N locations, D dims, L queue length. Labels: 1 present, -1 absent, 0 unknown.
"""
import torch

import losses


def estimate(memory, cfg, out, f, labels, stage_two):
    """The batch's prototypes enter the bank, its similarities move the thresholds, and what is unknown is estimated (Eq. 7-12).

    out: trm.Output, f (B, N, D), labels (B, C) int8 -> pseudo-labels (B, C) int8, 0 where there is none; None in the first stage.
    The batch comes before its own estimates, so an image meets its own prototypes among those of its categories.
    """
    if cfg.uses("mmcp") or cfg.uses("mmcl"):
        memory.enqueue(out.energy, f, labels, cfg.topk)                                                       # Eq. 7
    if not (cfg.uses("mmcp") and stage_two):
        return None
    s = memory.similarities(out.regions)                                                                      # Eq. 8
    for_theta = torch.where(labels == 0, -1, labels) if cfg.assume_negative else labels
    memory.update_thresholds(s, for_theta)                                                                    # Eq. 9, 11
    modalities = [i for i, name in enumerate(("visual", "text")) if cfg.uses(name)]
    return memory.pseudo_labels(s, labels, modalities)                                                        # Eq. 10, 12


def step_terms(model, memory, cfg, out, f, g_pos, labels, stage_two):
    """The terms of Eq. 15 for one batch. labels (B, C) int8, out: trm.Output. Returns (terms, pseudo-labels (B, C) or None)."""
    pseudo = estimate(memory, cfg, out, f, labels, stage_two)
    completed = labels if pseudo is None else torch.where(labels == 0, pseudo, labels)

    def asl(logits):
        return losses.asymmetric(logits, completed, cfg.gamma_pos, cfg.gamma_neg, cfg.shift, cfg.assume_negative)    # Eq. 14

    terms = {"L_r": asl(out.logits_r)}
    if out.logits_q is not None:
        terms["L_q"] = asl(out.logits_q)
        if cfg.uses("kd"):
            terms["L_KD"] = losses.distillation(out.logits_r, out.logits_q, cfg.kd, cfg.kd_temperature, cfg.kd_teacher)    # Eq. 6
    if cfg.uses("mmcl") and stage_two:
        present = (completed if cfg.pseudo_in_contrastive else labels) == 1                                   # (B, C)
        terms["L_NCE"] = contrastive_term(model, memory, out.regions, g_pos, present, cfg.tau)                # Eq. 13
    return terms, pseudo


def contrastive_term(model, memory, regions, g_pos, present, tau):
    """Eq. 13 over the batch's regions of known positives and the bank's prototypes, each through its own MLP."""
    B, C = present.shape
    ids = torch.arange(C, device=present.device)
    filled = memory.filled()                                                       # (C, L)
    if present.device.type == "cpu":                                               # take what is there
        region, region_ids = regions[present], ids.expand(B, C)[present]
        pixel, pixel_ids = memory.bank[filled], ids[:, None].expand_as(filled)[filled]
    else:                                                                          # fixed shapes: no waiting for the GPU to count
        region, region_ids = regions.flatten(0, 1), torch.where(present, ids, -1).flatten()
        pixel, pixel_ids = memory.bank.flatten(0, 1), torch.where(filled, ids[:, None], -1).flatten()
    samples = torch.cat([model.heads["region"](region), model.heads["pixel"](pixel)])
    return losses.contrastive(model.heads["text"](g_pos), samples, torch.cat([region_ids, pixel_ids]), tau)


class PseudoCount:
    """Pseudo-labels of an epoch against the truth that training may not see, in percent.

    pseudo_pos, pseudo_neg   how many were given;  ..._precision: how many of them are right;  ..._coverage: the share of the
    hidden positives (negatives) that got the right one.  pseudo_coverage: the share of all unknown cells that got any
    """

    def __init__(self, device):
        self.count = torch.zeros(6, dtype=torch.int64, device=device)

    def add(self, pseudo, labels, truth):
        unknown = (labels == 0) & (truth != 0)
        self.count += torch.stack([(unknown & cell).sum() for sign in (1, -1)
                                   for cell in (truth == sign, pseudo == sign, (pseudo == sign) & (truth == sign))])

    def report(self):
        share = lambda a, b: round(100 * a / b, 2) if b else None
        pos, neg = self.count.view(2, 3).tolist()                                  # hidden, given, right
        line = {}
        for name, (hidden, given, right) in (("pos", pos), ("neg", neg)):
            line |= {f"pseudo_{name}": given, f"pseudo_{name}_precision": share(right, given), f"pseudo_{name}_coverage": share(right, hidden)}
        return line | dict(pseudo_coverage=share(pos[1] + neg[1], pos[0] + neg[0])) if pos[0] + neg[0] else {}
