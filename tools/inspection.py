"""Everything that the method computes on one image, by the paper's names (Sec. 3, Eq. 1-15).

    from eval import Predictor
    mask = Predictor("runs/demo", "last").inspect("photo.jpg")["mask"]

C categories, N = h*w locations, D dims, L queue length, K top-k.
"""
import torch
import torch.nn.functional as F

import data
import losses
from clip.features import FeatureLoader
from memory import MemoryBank
from support import UserError
from support.checkpoint import read_checkpoint
from trm import match


def memory_of(predictor):
    """The memory bank of a run's last epoch; the predictor must be of that epoch, too."""
    state = read_checkpoint(predictor.run / "last.pt")
    if predictor.cfg.matching != "carl" or state["epoch"] != predictor.epoch:
        raise UserError(f"expected the last epoch of a run with --matching carl, got epoch "
                        f"{predictor.epoch} of {predictor.run}: open it as Predictor(run, 'last')")
    memory = MemoryBank(*state["memory"]["bank"].shape, predictor.cfg.eta).to(predictor.device)
    memory.load_state_dict(state["memory"])
    return memory


@torch.no_grad()
def inspect(predictor, image, labels=None):
    """One image through the method. The run's files, bank and thresholds stay as they are.

    predictor  a Predictor of the run's last epoch, with the paper's matching
    image      file, bytes, file object, PIL image or (H, W, 3) uint8 array
    labels     (C,) 1 present, -1 absent, 0 unknown; without them there are no losses

    Returns a dict of tensors on the predictor's device:
    f (N, D), x (D,)             dense and global features of CLIP
    g_pos, g_neg (C, D)          text features of "present" and "absent"
    text_pixel (C, N)            cosine of g_pos to each location, without any region
    energy, mask (C, N)          e_c, and its sigmoid                              Eq. 3, 2
    regions, queries (C, D)      F^r and F^q                                       Eq. 4, 3
    logits_r, logits_q (C,)      matching with the texts; sigmoid: probability     Eq. 1, 5
    topk (C, K)                  locations that would enter the bank               Eq. 7
    s (2, C)                     similarity to the prototypes, [visual, text]      Eq. 8
    theta (2, 2, C)              thresholds, modality x [positive, negative]       Eq. 9, 11
    verdicts (2, C), pseudo (C,) 1, -1 or 0, each modality alone; where all agree  Eq. 10, 12
    and where labels are given:
    truth (C,)                   the labels
    losses                       of these labels alone: L_r, L_q, L_KD, L_NCE, L   Eq. 6, 13-15
    """
    memory, model, cfg = predictor.memory, predictor.model, predictor.cfg
    g_pos, g_neg = predictor.g_pos, predictor.g_neg
    split = data.Split("image", [image], predictor.names, labels=None)
    loader = FeatureLoader(data.Images(split, cfg.size), predictor.encoder, device=predictor.device)
    _, f, x = next(loader.batches(0, shuffle=False))
    energy, regions, queries = model.carl(f)
    logits_r, logits_q = (match(part, g_pos, g_neg, model.log_scale.exp())
                          for part in (regions, queries))
    s = memory.similarities(regions)  # (2, 1, C)
    seen = dict(f=f[0], x=x[0], g_pos=g_pos, g_neg=g_neg,
                text_pixel=g_pos @ F.normalize(f[0], dim=-1).T,
                energy=energy[0], mask=energy[0].sigmoid(), regions=regions[0], queries=queries[0],
                logits_r=logits_r[0], logits_q=logits_q[0],
                topk=energy[0].topk(min(cfg.topk, f.shape[1]))[1], s=s[:, 0],
                theta=memory.theta.clone(), verdicts=memory.verdicts(s)[:, 0],
                pseudo=memory.pseudo_labels(s, torch.zeros_like(logits_r), cfg.modalities)[0])
    if labels is not None:
        labels = torch.as_tensor(labels, device=f.device)[None]  # (1, C)
        terms = {"L_q": losses.asymmetric(logits_q, labels, **cfg.asl),
                 "L_r": losses.asymmetric(logits_r, labels, **cfg.asl)}
        if cfg.uses("kd"):
            terms["L_KD"] = losses.distillation(logits_r, logits_q, cfg.kd, cfg.kd_temperature,
                                                cfg.kd_teacher)
        if cfg.uses("mmcl"):
            samples, classes = model.contrastive_samples(regions, labels == 1, memory)
            terms["L_NCE"] = losses.contrastive(model.heads["text"](g_pos), samples, classes,
                                                cfg.tau)
        terms["L"] = losses.total(terms, cfg.alpha, cfg.beta, cfg.gamma)
        seen |= {"truth": labels[0], "losses": terms}
    return seen


@torch.no_grad()
def origins(memory, loader):
    """Where the prototypes in the bank come from: (C, L, 3) image, location and view, -1 where the
    slot is empty. A prototype is the unit feature of one location of one training image: it is
    found again by its cosine of one. loader: a FeatureLoader of these images with a cache."""
    prototypes = memory.bank.flatten(0, 1)  # (CL, D)
    best = torch.full((len(prototypes),), -1.0)
    found = torch.full((len(prototypes), 3), -1)
    for view in range(len(loader.stored)):
        for index, f, _ in loader.batches(view, shuffle=False):
            N = f.shape[1]
            cosine = prototypes @ F.normalize(f, dim=-1).flatten(0, 1).T  # (CL, BN)
            value, at = cosine.cpu().max(1)
            here = torch.stack([index.cpu()[at // N], at % N, torch.full_like(at, view)], 1)
            found = torch.where((value > best)[:, None], here, found)
            best = torch.maximum(best, value)
    found[~memory.filled().flatten().cpu()] = -1
    return found.view(*memory.bank.shape[:2], 3)
