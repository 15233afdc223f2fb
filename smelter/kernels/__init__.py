"""Every fused operation, with one signature whatever carries it out.

`reference` is the specification in plain PyTorch; everything else equals it, forward and backward.
"""

from smelter.kernels import reference
from smelter.kernels.capability import capability as capability_of
from smelter.kernels.capability import int8_product, uses_triton
from smelter.kernels.decoder import Decoder, LayerWeights, Scratch
from smelter.kernels.head import ScreenedHead
from smelter.kernels.linear import Stacked, ternary_linears
from smelter.kernels.operations import Documents, attention, decodes_natively, documents, quantize_together
from smelter.kernels.soft_cap import COMPILER_OPTIONS, capped, capped_exp, is_bounded
