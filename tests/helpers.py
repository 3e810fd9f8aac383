"""What several test files need."""

import torch


def sharper(model, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float32):
    "Random weights large enough that distributions are not flat and greedy choices are not near-ties; frozen."
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * scale / p.shape[-1] ** 0.5
    return model.to(dtype).eval().requires_grad_(False)
