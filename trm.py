r"""Text-region matching: prompts, category-aware regions, their matching (Sec. 3.1-3.3, Eq. 1-5).

    image -> frozen CLIP -> f --CARL--> energy --sigmoid, pool f--> F^r --\
                                  \-------------------------------> F^q --match--> logits r, q
    learned prompts -> frozen CLIP -> g_pos, g_neg -----------------------/

B images, C categories, N = h*w locations, D joint dimension of CLIP, W width of CLIP's text
transformer, M context tokens (the paper's L). This file knows nothing of files, arguments or
devices; train.py trains it.
"""
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from support import UserError
from support.recompute import checkpointed


def match(x, g_pos, g_neg, scale):
    """Eq. 1 with dual prompts: (cosine to the positive text - cosine to the negative text) / tau.

    x       (..., C, D)  visual feature of each category, of any norm; (..., 1, D) one for all
    g_pos   (C, D)       text features of "category present";  g_neg (C, D) of "category absent"
    scale   scalar       1 / tau
    returns (..., C)     logits; the probability is sigmoid(logit), the two-way softmax over
                         (present, absent)
    """
    # cos(x, g+) - cos(x, g-) = x.(g+ - g-) / |x| for unit g
    difference = F.normalize(g_pos, dim=-1) - F.normalize(g_neg, dim=-1)  # (C, D)
    return kernels.match(x, difference, scale)  # (..., C)   Eq. 1


class Prompts(nn.Module):
    """Learned context of each category, for "present" and "absent": [SOT] w_1 ... w_M [name] [EOT].

    encoder  a frozen clip.CLIP, used here for the embeddings of the names only
    texts    C category names
    M        context tokens of a prompt
    context  (2, C, M, W) is all that is learned, N(0, 0.02) as in the paper's Sec. 4.1
    """
    at_once = 512  # most prompts whose activations are kept for backward, some 10 MB each in CLIP

    def __init__(self, encoder, texts, M=16):
        super().__init__()
        self.context = nn.Parameter(0.02 * torch.randn(2, len(texts), M, encoder.W))
        tokens = encoder.tokenize(texts)  # (C, context_length) SOT, name, EOT, zeros
        eot = tokens.argmax(-1)  # EOT has the largest id
        longest = int(eot.max()) + 1
        if M + longest > encoder.context_length:
            raise UserError(f"{M} context tokens and the longest name "
                             f"({texts[int(eot.argmax())]!r}) need {M + longest} tokens, CLIP "
                             f"reads {encoder.context_length}: use fewer or a shorter name")
        # Nothing after EOT can reach it under the causal mask: the longest name gives the length.
        embedded = encoder.token_embedding(tokens[:, :longest]).detach()  # (C, S, W)  S = longest
        self.register_buffer("sot", embedded[:, :1].clone(), persistent=False)
        self.register_buffer("name_eot", embedded[:, 1:].clone(), persistent=False)
        self.register_buffer("eot", eot + M, persistent=False)

    def forward(self, encoder):
        """Returns g_pos, g_neg, each (C, D) of unit length. Gradients reach the context."""
        sot = self.sot.expand(2, -1, -1, -1)  # (2, C, 1, W)
        name = self.name_eot.expand(2, -1, -1, -1)  # (2, C, S-1, W)
        prompts = torch.cat([sot, self.context, name], dim=2).flatten(0, 1)  # (2C, M+S, W)
        eot = self.eot.repeat(2)  # (2C,)
        parts = list(zip(prompts.split(self.at_once), eot.split(self.at_once)))
        g = torch.cat(checkpointed(encoder.encode_prompts, parts))  # (2C, D)
        return F.normalize(g.float(), dim=-1).chunk(2)


class CARL(nn.Module):
    """Category-aware region learning: one post-norm decoder layer with one head (Eq. 2-4).

    The cross-attention's scaled scores before its softmax are the energies e_c; their sigmoid is
    the soft region (Eq. 2), which pools the *raw* CLIP features (Eq. 4), so that the regions stay
    in CLIP's joint space. The layer's output is F^q (Eq. 3).

    queries  (C, D) start of the category queries Q, or None: random
    dropout  of the cross-attention's weights, the three residuals and the feed-forward
    """
    at_once = 2**25  # largest B*C*D whose activations are kept for backward, 50 to 90 bytes each

    def __init__(self, C, D, queries: Optional[Tensor] = None, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.Q = nn.Parameter(torch.randn(C, D) if queries is None else queries.clone())
        self.self_att = nn.MultiheadAttention(D, 1, batch_first=True)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Dropout(dropout),
                                 nn.Linear(4 * D, D))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(D) for _ in range(3))
        # Ours: with queries from the text encoder the energies start close to CLIP's similarities.
        nn.init.eye_(self.q.weight)
        nn.init.eye_(self.k.weight)
        nn.init.xavier_uniform_(self.v.weight)
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.zeros_(linear.bias)

    def forward(self, f):
        """f (B, N, D) -> energy (B, C, N) before the sigmoid, F^r (B, C, D) and F^q (B, C, D)."""
        # Self-attention sees no image: it is computed once for the whole batch.
        Q = self.Q[None]
        attended = self.self_att(Q, Q, Q, need_weights=False)[0]
        Q = self.norm1(Q + self.dropout(attended))[0]  # (C, D)

        parts = [(Q, part) for part in f.split(max(1, self.at_once // Q.numel()))]
        energy, queries = (torch.cat(whole) for whole in zip(*checkpointed(self.decode, parts)))
        regions = kernels.region_pool(energy, f)  # (B, C, D)   F^r of Eq. 4
        return energy, regions, queries

    def decode(self, Q, f):
        """Cross-attention and feed-forward.

        Q (C, D) after its self-attention, f (B, N, D) -> energy (B, C, N), F^q (B, C, D).
        """
        D = f.shape[-1]
        # Not in the paper: keys and values see LayerNorm(f), without weights (docs/readings.md).
        x = F.layer_norm(f, (D,))  # (B, N, D)
        # q.k = q.(W_k x + b_k) = (W_k^T q).x + q.b_k: project C queries instead of B*N keys.
        q = self.q(Q)  # (C, D)
        energy = (x @ (q @ self.k.weight).T + q @ self.k.bias).mT / D**0.5  # (B, C, N)   R of Eq. 3
        # W_v may follow the sum over the locations, since the weights sum to one. (Under dropout
        # they do not: the bias of W_v would be scaled with them, here it is not.)
        mixed = self.dropout(energy.softmax(-1)) @ x  # (B, C, D)
        attended = self.out(self.v(mixed))  # (B, C, D)   Cross_Att(Q, f)
        h = self.norm2(Q + self.dropout(attended))
        return energy, self.norm3(h + self.dropout(self.mlp(h)))  # (B, C, D)   F^q of Eq. 3


def spatial_aggregation(f, g_pos, g_neg, scale, spatial_scale):
    """DualCoOp's matching: each location is matched, weighted by a softmax of its similarity.

    f (B, N, D), g_pos and g_neg (C, D) unit, scale = 1 / tau, spatial_scale = 1 / its temperature
    returns logits (B, C) and the positive similarities (B, C, N), the map that this method shows
    """
    f = F.normalize(f, dim=-1)
    pos = (f @ g_pos.T).mT  # (B, C, N)
    neg = (f @ g_neg.T).mT  # (B, C, N)
    weights = (spatial_scale * pos).softmax(-1)
    return scale * (weights * (pos - neg)).sum(-1), pos


class Output(NamedTuple):
    logits_r: Tensor  # (B, C)  text-region matching, the prediction; of a baseline its only score
    logits_q: Optional[Tensor] = None  # (B, C)  text-query matching; None for the baselines
    energy: Optional[Tensor] = None  # (B, C, N)  before the sigmoid; of a baseline a map or None
    regions: Optional[Tensor] = None  # (B, C, D)  F^r


class TRM(nn.Module):
    """All that is trained: prompts, regions, temperature, contrastive heads.

    matching  "carl"            text-region matching, the paper's method
              "dualcoop"        DualCoOp's spatial aggregation, its temperature learned
              "dualcoop-fixed"  the same with the temperature fixed at 1/20
              "average"         the mean dense feature ("omitting the attention module", Table 3)
              "global"          CLIP's global image feature
    """

    def __init__(self, C, D, prompts: Optional[Prompts] = None, matching="carl", queries=None,
                 contrastive=True, dropout=0.0):
        super().__init__()
        self.prompts = prompts
        self.matching = matching
        self.log_scale = nn.Parameter(torch.tensor(3.91))  # 1 / tau = exp(3.91) = 50
        if matching == "carl":
            self.carl = CARL(C, D, queries, dropout)
            if contrastive:  # the "additional MLP" of Sec. 3.5
                self.heads = nn.ModuleDict({
                    name: nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
                    for name in ("text", "region", "pixel")})
        elif matching.startswith("dualcoop"):
            learned = matching == "dualcoop"
            self.log_spatial_scale = nn.Parameter(torch.tensor(20.0).log(), requires_grad=learned)

    def forward(self, f, x, g_pos, g_neg) -> Output:
        """f (B, N, D) dense, x (B, D) global features (may be None unless matching is "global"),
        g_pos, g_neg (C, D) unit text features."""
        scale = self.log_scale.exp()
        if self.matching == "carl":
            energy, regions, queries = self.carl(f)
            return Output(match(regions, g_pos, g_neg, scale),  # p^r of Eq. 5
                          match(queries, g_pos, g_neg, scale),  # p^q of Eq. 5
                          energy, regions)
        if self.matching.startswith("dualcoop"):
            logits, similarity = spatial_aggregation(f, g_pos, g_neg, scale,
                                                     self.log_spatial_scale.exp())
            return Output(logits, energy=similarity)
        whole = x if self.matching == "global" else f.mean(1)  # (B, D)
        similarity = None
        if not self.training:  # only for pictures
            similarity = (F.normalize(f, dim=-1) @ g_pos.T).mT  # (B, C, N)
        return Output(match(whole[:, None], g_pos, g_neg, scale), energy=similarity)

    def contrastive_samples(self, regions, present, memory):
        """What Eq. 13 compares the texts with, each through its MLP: the regions (B, C, D) of the
        categories that are present (B, C) bool, and all prototypes of a memory.MemoryBank.
        Returns samples (S, D) and the category of each (S,)."""
        filled = memory.filled()  # (C, L)
        samples = torch.cat([self.heads["region"](regions[present]),
                             self.heads["pixel"](memory.bank[filled])])  # (S, D)
        return samples, torch.cat([present.nonzero()[:, 1], filled.nonzero()[:, 0]])
