"""Category-aware regions F^r_c = sum_n sigmoid(energy_cn) f_n (Eq. 2, 4).

B images, C categories, N locations, D dims. Read in order: reference, kernels, operators and
autograd, public function.

The cost at the paper's size (B 128, C 80, N 196, D 512) in bf16:
  forward   reads f 25.7 MB + energy 4.0 MB, writes F^r 10.5 MB = 40 MB; 2 B C N D = 2.06 GFLOP
  backward  reads f 25.7 + energy 4.0 + dF^r 10.5, writes d energy 4.0 = 44 MB; 2.06 GFLOP
Three limits of a tile of 128 dims on an H100, from the compiled instructions: 13.1 us to issue
them, 8.0 us of the special-function unit (a sigmoid of an energy for every block of dims), 13.4 us
of memory. Plain torch also writes the mask, in training its gradient, and reads each back.
"""
import torch

from kernels.dispatch import interpreted, jit, operator, runs_triton, tl, triton


# ---- reference

def region_pool_reference(energy, f):
    mask = energy.sigmoid().to(f.dtype)  # Eq. 2   (B, C, N)
    return torch.bmm(mask, f)  # Eq. 4   (B, C, D)


# ---- kernels

INTERPRETED = tl.constexpr(interpreted())


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    # the interpreter would multiply bfloat16's bits as integers; its products fit float32
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def pool_kernel(energy, f, out, C, N, D, stride_c, stride_n,
                BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                PRECISION: tl.constexpr):
    """Programs: image x category block x dim block. The dim block runs fastest, so the energies of
    an image are read from memory once and from L2 by its other programs; with C <= BLOCK_C every
    row of f is read exactly once."""
    blocks_c, blocks_d = tl.cdiv(C, BLOCK_C), tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    b = (pid // (blocks_c * blocks_d)).to(tl.int64)
    c = (pid // blocks_d) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        e = tl.load(energy + b * C * N + c[:, None] * stride_c + n[None, :] * stride_n,
                    # sigmoid(-inf) = 0: no share
                    mask=(c < C)[:, None] & (n < N)[None, :], other=float("-inf"))
        mask = tl.sigmoid(e.to(tl.float32)).to(f.dtype.element_ty)  # Eq. 2, rounded as torch does
        x = tl.load(f + b * N * D + n[:, None] * D + d[None, :],
                    mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        acc = dot(mask, x, acc, PRECISION)  # Eq. 4 on the tensor cores
    tl.store(out + b * C * D + c[:, None] * D + d[None, :], acc.to(out.dtype.element_ty),
             mask=(c < C)[:, None] & (d < D)[None, :])


@jit
def grad_kernel(grad, energy, f, out, C, N, D, stride_c, stride_n,
                BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                PRECISION: tl.constexpr):
    """d energy_cn = s (1 - s) <dF^r_c, f_n> with s = sigmoid(energy_cn) recomputed. Programs: image
    x category block x location block, the category block fastest so that it finds f in L2."""
    blocks_c, blocks_n = tl.cdiv(C, BLOCK_C), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // (blocks_c * blocks_n)).to(tl.int64)
    n = (pid // blocks_c) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = tl.load(grad + b * C * D + c[:, None] * D + d[None, :],
                    mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        x = tl.load(f + b * N * D + n[:, None] * D + d[None, :],
                    mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        acc = dot(g, tl.trans(x), acc, PRECISION)
    where = b * C * N + c[:, None] * stride_c + n[None, :] * stride_n
    inside = (c < C)[:, None] & (n < N)[None, :]
    s = tl.sigmoid(tl.load(energy + where, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + where, (acc * s * (1 - s)).to(out.dtype.element_ty), mask=inside)


# ---- operators and autograd

def blocks(C, dtype):
    """Tile sizes: the largest that spill on no GPU from sm_80 on (kernels/compiled.csv). float32
    products are IEEE, on the ordinary units, unless torch.set_float32_matmul_precision asks for
    TF32 tensor cores: the same switch and default as torch.matmul. bfloat16 and float16 products
    are exact either way."""
    single = dtype == torch.float32
    tf32 = single and torch.get_float32_matmul_precision() != "highest"
    rows = min(64 if single and not tf32 else 128, max(16, 1 << (int(C) - 1).bit_length()))
    return dict(BLOCK_C=rows, BLOCK_N=32, BLOCK_D=64 if single else 128,
                PRECISION="tf32" if tf32 else "ieee", num_warps=8 if rows >= 64 else 4,
                num_stages=3)


def in_kernel_layout(energy):
    """Energies as the kernels read them: contiguous, or the transpose of that, as CARL gives them
    and as the gradient of f pools with them."""
    return energy if energy.mT.is_contiguous() else energy.contiguous()


# Operators of torch.library: torch.compile knows them.

@operator("trm_ml::region_pool", mutates_args=())
def pool_op(energy: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    (B, C, N), D, energy = energy.shape, f.shape[2], in_kernel_layout(energy)
    out, how = f.new_empty(B, C, D), blocks(C, f.dtype)
    grid = (B * triton.cdiv(C, how["BLOCK_C"]) * triton.cdiv(D, how["BLOCK_D"]),)
    pool_kernel[grid](energy, f.contiguous(), out, C, N, D, *energy.stride()[1:], **how)
    return out


@operator("trm_ml::region_pool_grad", mutates_args=())
def grad_op(grad: torch.Tensor, energy: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    (B, C, N), D, energy = energy.shape, f.shape[2], in_kernel_layout(energy)
    out, how = torch.empty_like(energy), blocks(C, f.dtype)
    grid = (B * triton.cdiv(C, how["BLOCK_C"]) * triton.cdiv(N, how["BLOCK_N"]),)
    grad_kernel[grid](grad.contiguous(), energy, f.contiguous(), out, C, N, D,
                      *energy.stride()[1:], **how)
    return out


pool_op.register_fake(lambda energy, f: f.new_empty(*energy.shape[:2], f.shape[2]))
grad_op.register_fake(lambda grad, energy, f: torch.empty_like(in_kernel_layout(energy)))


def backward(ctx, grad):
    energy, f = ctx.saved_tensors  # the inputs alone: the mask is recomputed
    d_energy = grad_op(grad, energy, f) if ctx.needs_input_grad[0] else None
    # d f_n = sum_c sigmoid(energy_cn) dF^r_c
    d_f = pool_op(energy.mT, grad) if ctx.needs_input_grad[1] else None
    return d_energy, d_f


pool_op.register_autograd(backward, setup_context=lambda ctx, inputs, output:
                          ctx.save_for_backward(*inputs))


# ---- public function

def region_pool(energy, f):
    """F^r_c = sum_n sigmoid(energy_cn) f_n (Eq. 2, 4).

    energy  (B, C, N) float32, bfloat16 or float16, before the sigmoid; differentiable
    f       (B, N, D) any of these types; its gradient is computed only if it is asked for
    returns (B, C, D) in f's type; sums are float32
    """
    if energy.ndim != 3 or f.ndim != 3 or energy.shape[::2] != f.shape[:2]:
        raise ValueError(f"expected energy (B, C, N) and f (B, N, D), got {tuple(energy.shape)} "
                         f"and {tuple(f.shape)}")
    return pool_op(energy, f) if runs_triton(energy) else region_pool_reference(energy, f)
