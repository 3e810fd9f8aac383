"""What several test files need."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch


# a task file, with two solved examples
TOML = """
name = "colours"
labels = ["red", "green"]
template = "Thing: {thing}"
label_field = "colour"
metric = "accuracy"
instruction = "Which colour has the thing?"

[[examples]]
thing = "a ripe cherry"
colour = "red"
rationale = "Ripe cherries are red."

[[examples]]
thing = "a blade of grass"
colour = "green"
rationale = "Grass is green."
"""


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


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class TransformersServer:
    "`transformers serve` on a local folder, in a process of its own."

    def __init__(self, folder, port=None):
        self.folder, self.port = str(folder), port or free_port()
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(Path(folder).parent / "hf"),
        }
        command = [
            str(Path(sys.executable).with_name("transformers")),
            "serve",
            self.folder,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--device",
            "cpu",
            "--log-level",
            "error",
        ]
        self.log = open(Path(folder).parent / f"server-{self.port}.log", "w+")
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=subprocess.STDOUT)
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def ready(self, seconds=180):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, Path(self.log.name).read_text()[-2000:]
            try:
                if (
                    urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).status
                    == 200
                ):
                    return self
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the server did not start: " + Path(self.log.name).read_text()[-2000:])

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()


def tiny_llava():
    "A vision-language model in the shape of the hub's, with random weights, and its processor."
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from kd_notes.models.mini import load_mini_tokenizer

    tokenizer = load_mini_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=32, patch_size=8),
        text_config=LlamaConfig(**shape, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config), processor
