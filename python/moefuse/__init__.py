"""Fused Mixture-of-Experts decode for MLX, and the lab that proves what it gains."""

from __future__ import annotations

import importlib.metadata

from ._core import (
    gather_qmm_swiglu,
    moe_combine_weighted_sum_fp32_no_fma,
    moe_gather_qmm_swiglu_downproj_combine,
    moe_prefill,
    moe_router_argpartition_logits_topk,
    prefill_linear,
    sample_greedy,
)
from .capabilities import capabilities
from .flags import ACCUMULATE, VARIANTS
from .patch import PatchReport, patch, unpatch
from .zmlx import install_zmlx_primitive, uninstall_zmlx_primitive

try:
    __version__ = importlib.metadata.version("moefuse")
except importlib.metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0.1.0"

__all__ = [
    "ACCUMULATE",
    "VARIANTS",
    "PatchReport",
    "capabilities",
    "gather_qmm_swiglu",
    "install_zmlx_primitive",
    "moe_combine_weighted_sum_fp32_no_fma",
    "moe_gather_qmm_swiglu_downproj_combine",
    "moe_prefill",
    "moe_router_argpartition_logits_topk",
    "patch",
    "prefill_linear",
    "sample_greedy",
    "uninstall_zmlx_primitive",
    "unpatch",
]
