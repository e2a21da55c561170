"""The fused operations of TRM-ML, Triton kernels beside their torch references.

Read in this order: dispatch.py (which path runs), match.py (Eq. 1), region_pool.py (Eq. 2, 4),
topk_prototypes.py (Eq. 7). Each file goes reference, kernel, operator, public function, and says
what it costs. tests/test_kernels.py checks them, tests/bench_kernels.py times them.
"""
from kernels.dispatch import chosen, interpreted, runs_triton, use
from kernels.match import match
from kernels.region_pool import region_pool
from kernels.topk_prototypes import topk_prototypes
