"""How a FLUX transformer computes: what PyTorch may choose by itself."""

import pytest
import torch

from egrpo_fast.config import load_config
from egrpo_fast.models.attention import use_arithmetic


@pytest.mark.parametrize(("attention", "cudnn"), [("native", False), ("efficient", False), ("cudnn", True)])
def test_attention_is_cudnns_only_where_it_is_asked_for(attention, cudnn):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        use_arithmetic(load_config("shapes", ["model.dtype=bfloat16", f"model.attention={attention}"]).model)
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
