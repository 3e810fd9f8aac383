"""A small HTTP server that speaks vLLM's and llama.cpp's form of token log-probabilities, with a real model behind it."""

import threading
import time

import torch
from json_server import JsonServer


class TokenServer(JsonServer):
    "Serves a causal model; `calls` are the bodies of the requests to /v1/completions."

    def __init__(self, model, tokenizer, form="vllm", most=64, temperature=True, tokenize=True):
        self.model = model
        self.tokenizer = tokenizer
        self.form = form
        self.most = most  # --max-logprobs
        self.temperature = temperature  # whether llama.cpp's sampling is applied
        self.tokenize = tokenize  # whether there is a /tokenize
        self.calls = []
        self.refuses = lambda ids: False  # rows that are refused
        self.crashes = lambda ids: False  # rows at which it fails
        self.alters = lambda ids: ids  # what a gateway makes of the ids
        self.slow = 0.0
        self.lock = threading.Lock()
        super().__init__()
        self.spec = f"openai:{self.url}#tiny"

    def respond(self, path, asked):
        status, out = self.answer(path, asked)
        return status, {}, out

    def answer(self, path, asked):
        if path == "/tokenize" and self.tokenize:
            text = asked["prompt"] if self.form == "vllm" else asked["content"]
            return 200, {"tokens": self.tokenizer.encode(text, add_special_tokens=False)}
        if path != "/v1/completions":
            return 404, {"error": {"message": "not found"}}
        self.calls.append(asked)
        time.sleep(self.slow)
        if not isinstance(asked["prompt"], list):
            return 400, {"error": {"message": "this server takes token ids"}}
        if self.crashes(asked["prompt"]):
            return 500, {"error": {"message": "out of memory"}}
        if self.refuses(asked["prompt"]):
            return 400, {"error": {"message": "too long", "code": "context_length_exceeded"}}
        k = asked.get("prompt_logprobs", 0) if self.form == "vllm" else 0
        if k > self.most:
            message = f"Requested prompt logprobs of {k}, which is greater than {self.most}"
            return 400, {"error": {"message": message}}
        choice = {"index": 0, "text": "?", "finish_reason": "length"}
        ids = self.alters(asked["prompt"])
        if k:
            choice["prompt_logprobs"] = self.vllm(ids, k)
        elif self.form == "llama" and asked.get("n_probs"):
            choice["logprobs"] = {"content": [self.llama(ids, asked)]}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        return 200, {"id": "1", "object": "text_completion", "choices": [choice], "usage": usage}

    @torch.no_grad()
    def logits(self, ids):
        with self.lock:
            return self.model(input_ids=torch.tensor([ids])).logits[0].float()

    def vllm(self, ids, k):
        entries = [None]
        for token, logits in zip(ids[1:], self.logits(ids)):
            logs = logits.log_softmax(-1)
            rank = {i: n for n, i in enumerate(logs.argsort(descending=True).tolist(), 1)}
            chosen = dict.fromkeys(
                [token, *sorted(rank, key=rank.get)[:k]]
            )  # the token comes first
            entries.append(
                {
                    str(i): {
                        "logprob": max(logs[i].item(), -9999.0),
                        "rank": rank[i],
                        "decoded_token": self.tokenizer.decode([i]),
                    }
                    for i in chosen
                }
            )
        return entries

    def llama(self, ids, asked):
        logits = self.logits(ids)[-1]
        after = asked.get("post_sampling_probs", False)
        if after and self.temperature and asked["samplers"] == ["temperature"]:
            logits = logits / asked["temperature"]
        logs = logits.log_softmax(-1)
        top = logs.topk(asked["n_probs"]).indices.tolist()
        value = (
            (lambda i: {"prob": logs[i].exp().item()})
            if after
            else (lambda i: {"logprob": logs[i].item()})
        )
        named = [{"id": i, "token": self.tokenizer.decode([i])} | value(i) for i in top]
        return named[0] | {"top_probs" if after else "top_logprobs": named}
