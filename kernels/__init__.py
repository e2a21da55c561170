"""The fused operations of TRM-ML, Triton kernels beside their torch references.

Read in this order: dispatch.py (which path runs), region_pool.py (Eq. 2, 4), topk_prototypes.py
(Eq. 7); each file goes reference, kernel, operator, public function, and says what it costs.
"""
from kernels.dispatch import chosen, interpreted, runs_triton, use
from kernels.region_pool import region_match, region_pool
from kernels.topk_prototypes import topk_prototypes
