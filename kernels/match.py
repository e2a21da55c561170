"""Matching, Eq. 1 with dual prompts: the cosine of each category's feature to its two texts.

B images, C categories, D dims.

The cost at the paper's size (B 128, C 80, D 512) in bf16: forward reads x 10.5 MB and writes the
logits, backward reads x again and writes its gradient: 31 MB for one of the two scores of a step.
Plain torch keeps products, norms and their gradients in float32: some 350 MB and 60 launches. An
H200's memory needs 2.5 us for the forward, 7.5 for both; measured: 13.3 and 24.5, in plain torch
47.9 and 183.
"""
import torch

from kernels.dispatch import jit, operator, runs_triton, tl, triton

SMALLEST = 1e-12  # norm of a feature that is no direction


# ---- reference

def match_reference(x, difference, scale):
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=difference.dtype)
    return scale * (x * difference).sum(-1) / norm.clamp(min=SMALLEST)  # Eq. 1   (..., C)


# ---- kernels

@jit
def match_kernel(x, difference, out, inverse, B, C, D, SMALLEST: tl.constexpr,
                 BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """<x_bc, difference_c> / |x_bc|, and 1 / |x_bc| for the gradient. Programs: image block x
    category, the category fastest: neighbours read neighbouring rows."""
    c = tl.program_id(0) % C
    b = (tl.program_id(0) // C * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    product = tl.zeros([BLOCK_B], tl.float32)
    square = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (b < B)[:, None] & (d < D)[None, :]
        row = tl.load(x + (b[:, None] * C + c) * D + d[None, :], mask=inside, other=0.0)
        row = row.to(tl.float32)
        toward = tl.load(difference + c * D + d, mask=d < D, other=0.0).to(tl.float32)
        product += tl.sum(row * toward[None, :], 1)
        square += tl.sum(row * row, 1)
    inverse_norm = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), SMALLEST))
    tl.store(out + b * C + c, product * inverse_norm, mask=b < B)
    tl.store(inverse + b * C + c, inverse_norm, mask=b < B)


@jit
def match_grad_kernel(grad, x, difference, matched, inverse, d_x, d_difference, B, C, D,
                      BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """With u = x / |x| and matched = <u, difference>, which the forward pass returned:
    d x = grad / |x| (difference - matched u), d difference = sum_b grad u.
    Programs: dim block x category; each walks through all images: nothing is added atomically."""
    c = tl.program_id(0) % C
    d = tl.program_id(0) // C * BLOCK_D + tl.arange(0, BLOCK_D)
    toward = tl.load(difference + c * D + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, B, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        g = tl.load(grad + b * C + c, mask=b < B, other=0.0)
        inverse_norm = tl.load(inverse + b * C + c, mask=b < B, other=0.0)
        m = tl.load(matched + b * C + c, mask=b < B, other=0.0)
        where = (b[:, None] * C + c) * D + d[None, :]
        inside = (b < B)[:, None] & (d < D)[None, :]
        unit = tl.load(x + where, mask=inside, other=0.0).to(tl.float32) * inverse_norm[:, None]
        gradient = (g * inverse_norm)[:, None] * (toward[None, :] - m[:, None] * unit)
        tl.store(d_x + where, gradient.to(d_x.dtype.element_ty), mask=inside)
        total += tl.sum(g[:, None] * unit, 0)
    tl.store(d_difference + c * D + d, total, mask=d < D)


# ---- operators and autograd

TILE = dict(BLOCK_B=32, BLOCK_D=128, num_warps=2)


@operator("trm_ml::match", mutates_args=())
def match_op(x: torch.Tensor, difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, C, D = x.shape
    out, inverse = (x.new_empty(B, C, dtype=torch.float32) for _ in range(2))
    match_kernel[(triton.cdiv(B, TILE["BLOCK_B"]) * C,)](x, difference, out, inverse, B, C, D,
                                                         SMALLEST, **TILE)
    return out, inverse


@operator("trm_ml::match_grad", mutates_args=())
def match_grad_op(grad: torch.Tensor, x: torch.Tensor, difference: torch.Tensor,
                  matched: torch.Tensor,
                  inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, C, D = x.shape
    d_x, d_difference = torch.empty_like(x), difference.new_empty(C, D)
    match_grad_kernel[(triton.cdiv(D, TILE["BLOCK_D"]) * C,)](grad, x, difference, matched, inverse,
                                                              d_x, d_difference, B, C, D, **TILE)
    return d_x, d_difference


match_op.register_fake(lambda x, difference: tuple(x.new_empty(x.shape[:2], dtype=torch.float32)
                                                   for _ in range(2)))  # two different tensors
match_grad_op.register_fake(lambda grad, x, difference, matched, inverse:
                            (torch.empty_like(x), torch.empty_like(difference)))
match_op.register_autograd(
    lambda ctx, grad, _: match_grad_op(grad.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


# ---- public function

def match(x, difference, scale):
    """scale * cos(x_c, g_pos_c) - scale * cos(x_c, g_neg_c), with difference = g_pos - g_neg.

    x           (..., C, D), or (..., 1, D) for all, float32, bf16 or fp16, norm above 1e-12
    difference  (C, D) float32, of unit text features
    scale       1 / tau, a number or a tensor of one element
    returns     (..., C) logits, float32 (float64 for such inputs); all three are differentiable
    """
    if runs_triton(x) and x.ndim == 3 and x.shape[1:] == difference.shape:
        return scale * match_op(x.contiguous(), difference.contiguous())[0]
    return match_reference(x, difference, scale)
