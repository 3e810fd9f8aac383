"""What several test files need."""

import os
import subprocess
import sys

import torch


def sharper(model, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float32):
    "Random weights large enough that distributions are not flat and greedy choices are not near-ties; frozen."
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * scale / p.shape[-1] ** 0.5
    return model.to(dtype).eval().requires_grad_(False)


def start_script(code: str) -> subprocess.Popen:
    "Start Python code in a session of its own, without progress lines, on one thread."
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"KD_NOTES_PROGRESS": "off", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
