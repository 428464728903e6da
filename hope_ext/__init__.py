"""hope_ext: fused operators of memories that are trained while they are read.

Functions on tensors, each with native kernels and a definition in plain PyTorch
(`hope_ext.reference`). `HOPE_REFERENCE=1` in the environment runs everything on the definitions.
"""

from hope_ext._build import build_info, kernel_report
from hope_ext._flops import flop_formulas
from hope_ext._load import has_cuda_kernels
from hope_ext.cms import CmsState, cms_chain, cms_memory
from hope_ext.conv import causal_conv
from hope_ext.multifreq import multi_frequency_step_
from hope_ext.newton_schulz import newton_schulz
from hope_ext.selfmod import SelfModifyingState, SelfModifyingWeights, self_modifying_memory
from hope_ext.titans import TitansState, titans_memory

__version__ = "0.1.0"
__all__ = [
    "CmsState",
    "SelfModifyingState",
    "SelfModifyingWeights",
    "TitansState",
    "build_info",
    "causal_conv",
    "cms_chain",
    "cms_memory",
    "flop_formulas",
    "has_cuda_kernels",
    "kernel_report",
    "multi_frequency_step_",
    "newton_schulz",
    "self_modifying_memory",
    "titans_memory",
]
