"""Eq. 7: the features at the K largest energies of each known positive enter its category's queue.

B images, C categories, N locations, D dims, L queue length, K rows per image. The rules of both
paths:
- a category's queue is fed in the order of the images, within an image by falling energy, equal
  energies by location;
- row r of a category (counted since the start, `cursor`) lies in slot r % L: the last L stay;
- min(K, N) rows per image; a NaN energy ranks as -inf, i.e. last (raising would wait for the GPU);
- rows are unit length in float32, then rounded to the bank's type; a zero row stays zero.

The cost at the paper's size (B 128, C 80, N 196, D 512, K 3, 10 % of labels known: some 37
positives) in bf16: labels 10 KB and, per positive, energies 392 B, K rows of f 3.1 KB, the same
rows out in float32 6.1 KB: 0.4 MB. Both paths move so little that launches decide: eager runs 35
operations and `nonzero` makes the host wait, 1.4 ms beside an H200; the kernel is one launch
without a wait, 0.17 ms of the host and 15.6 us of the GPU.
"""
import torch

from kernels.dispatch import in_kernel_layout, jit, operator, runs_triton, tl, triton

POSITIVE = 1  # data.POSITIVE; the kernels import nothing of the project above them
TICKET = 1 << 40  # the cursor's upper bits count arrivals during the launch, its lower 40 the rows


# ---- reference

def topk_prototypes_reference(energy, f, labels, bank, cursor, k):
    L, k = bank.shape[1], min(k, energy.shape[2])
    c, b = (labels == POSITIVE).t().nonzero(as_tuple=True)  # (P,) by category, then by image
    count = (labels == POSITIVE).sum(0)  # (C,)
    # (P,) which of its category's positives the image is
    rank = torch.arange(len(c), device=c.device) - (count.cumsum(0) - count)[c]
    e = energy[b, c]
    e = torch.where(e.isnan(), -torch.inf, e)  # (P, N)
    n = e.sort(dim=1, descending=True, stable=True).indices[:, :k]  # (P, k) equal: by location
    rows = f[b[:, None], n].to(torch.promote_types(f.dtype, torch.float32))  # (P, k, D)
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    order = rank[:, None] * k + torch.arange(k, device=c.device)  # (P, k) among this call's rows
    stays = order >= (count * k)[c][:, None] - L  # the last L; earlier ones would be overwritten
    slot = (cursor[c][:, None] + order) % L  # (P, k)
    bank[c[:, None].expand_as(slot)[stays], slot[stays]] = rows[stays].to(bank.dtype)  # Eq. 7
    cursor += count * k


# ---- kernel

@jit
def topk_kernel(energy, f, labels, bank, cursor, B, C, N, D, L, K, stride_c, stride_n,
                TICKET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D: tl.constexpr):
    """One program for each image and category; all but the known positives leave at once. The
    others agree on slots without a second launch. Each counts the positives of earlier images, so
    its place does not depend on timing. Only the cursor is shared: every program takes a ticket by
    adding 2^40 to it and reads the cursor's old value from the lower bits; the one that draws the
    last ticket, after all have read, swaps the tickets for the rows written."""
    b = (tl.program_id(0) // C).to(tl.int64)
    c = tl.program_id(0) % C
    if tl.load(labels + b * C + c) != 1:
        return
    images = tl.arange(0, BLOCK_B)
    positive = (tl.load(labels + images * C + c, mask=images < B, other=0) == 1).to(tl.int64)
    count = tl.sum(positive)
    rank = tl.sum(tl.where(images < b, positive, 0))
    ticket = tl.atomic_add(cursor + c, TICKET, sem="relaxed")
    first = ticket % TICKET
    if ticket // TICKET == count - 1:
        tl.atomic_add(cursor + c, count * K - count * TICKET, sem="relaxed")

    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.load(energy + b * C * N + c * stride_c + n * stride_n, mask=n < N, other=0.0)
    e = e.to(tl.float32)
    e = tl.where(e != e, float("-inf"), e)
    left = n < N
    for j in range(K):
        peak = tl.max(tl.where(left, e, float("-inf")))
        # equal energies: the lowest location
        best = tl.min(tl.where(left & (e == peak), n, BLOCK_N))
        left = left & (n != best)
        order = rank * K + j
        if order >= count * K - L:  # the last L: two programs never share a slot
            x = tl.load(f + (b * N + best) * D + d, mask=d < D, other=0.0).to(tl.float32)
            x = tl.div_rn(x, tl.maximum(tl.sqrt_rn(tl.sum(x * x)), 1e-12))
            slot = (first + order) % L
            tl.store(bank + (c.to(tl.int64) * L + slot) * D + d, x.to(bank.dtype.element_ty),
                     mask=d < D)  # Eq. 7


# ---- operator

def launch_topk(energy, f, labels, bank, cursor, k):
    (B, C, N), D, energy = energy.shape, f.shape[2], in_kernel_layout(energy)
    power = triton.next_power_of_2
    topk_kernel[(B * C,)](energy, f.contiguous(), labels.contiguous(), bank, cursor, B, C, N, D,
                          bank.shape[1], min(k, N), *energy.stride()[1:], TICKET,
                          BLOCK_B=power(B), BLOCK_N=power(N), BLOCK_D=power(D), num_warps=4)


@operator("trm_ml::topk_prototypes", mutates_args=("bank", "cursor"))
def topk_op(energy: torch.Tensor, f: torch.Tensor, labels: torch.Tensor, bank: torch.Tensor,
            cursor: torch.Tensor, k: int) -> None:
    # decided in here: the reference's shapes depend on the labels, torch.compile must not see them
    use_kernel = f.numel() and runs_triton(energy)  # the kernel takes no empty f
    run = launch_topk if use_kernel else topk_prototypes_reference
    run(energy, f, labels, bank, cursor, k)


topk_op.register_fake(lambda energy, f, labels, bank, cursor, k: None)


# ---- public function

@torch.no_grad()
def topk_prototypes(energy, f, labels, bank, cursor, k):
    """Writes the features at the k largest energies of every known positive into its queue.

    energy  (B, C, N) float; NaN ranks last       f       (B, N, D) float
    labels  (B, C) int8, 1 = known positive       k       rows for each positive, at most N
    bank    (C, L, D) float, contiguous           cursor  (C,) int64: rows ever written
    """
    (B, C, N), D = energy.shape, bank.shape[2]
    shapes = [tuple(t.shape) for t in (f, labels, cursor, bank)]
    in_place = bank.is_contiguous() and cursor.is_contiguous() and cursor.dtype == torch.int64
    if shapes != [(B, N, D), (B, C), (C,), (C, bank.shape[1], D)] or k < 1 or not in_place:
        raise ValueError(f"expected f {(B, N, D)}, labels {(B, C)}, int64 cursor ({C},), bank "
                         f"({C}, L, {D}), both contiguous, k >= 1; got {shapes}, k {k}")
    topk_op(energy.detach(), f.detach(), labels, bank, cursor, k)
