"""`hf-posext serve`: tokens of several clients at once are those of `generate` for each prompt alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_posext import load_patched, patch_model

from ..conftest import EXAMPLES

pytestmark = pytest.mark.serve

MODEL = EXAMPLES / "tiny" / "tiny-rope"
NOVELS = EXAMPLES / "data" / "heldout.jsonl"
NEW = 12


@contextmanager
def server(model: Path, *flags: str) -> Iterator[str]:
    """Run the server on a free port of the loopback address; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "hf_posext", "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*words, "--cb-num-blocks", "64", *flags])
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def complete(url: str, prompt: str, tokens: int = NEW) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
    text: str = answer["choices"][0]["text"]
    return text


def alone(model: PreTrainedModel, tokenizer: Any, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text: str = tokenizer.decode(out, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("method", ["rerope+fade", "dynamic-ntk"])
def test_clients_get_the_tokens_that_their_prompts_get_alone(method: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64)
    text = json.loads(NOVELS.read_text(encoding="utf-8").splitlines()[0])["text"][3000:9000]
    prompts = [text[:6000], text[:5000], text[1000:1400], text[:6000][:-40] + "and then", text[:300]]
    assert len(tokenizer(prompts[0])["input_ids"]) > 2 * 512  # past the trained length
    plain = [alone(model, tokenizer, prompt) for prompt in prompts]
    patch_model(model, method, factor=4, tokenizer=tokenizer).save_pretrained(tmp_path / "model")
    model = load_patched(tmp_path / "model")
    expected = [alone(model, tokenizer, prompt) for prompt in prompts]
    assert expected != plain
    with server(tmp_path / "model") as url, ThreadPoolExecutor(len(prompts)) as clients:
        assert list(clients.map(lambda prompt: complete(url, prompt), prompts)) == expected
