"""Attention of 2,000 tokens of a tiny model in the compact form: bytes a weight, peak memory, and how fast it opens.

    python benchmarks/long_attention.py

Peak memory is that of a process of its own, above that of the same run that watches patterns and keeps none of them, in
layers (float32, `[n_heads, n_tokens, n_tokens]`); at most 2 are allowed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

N_LAYERS, N_HEADS, N_TOKENS = 3, 4, 2000
LAYER = 4 * N_HEADS * N_TOKENS**2  # bytes
WEIGHTS = N_LAYERS * N_HEADS * N_TOKENS * (N_TOKENS + 1) // 2
KEEPS_NOTHING = "watch"


def make_model(folder: Path) -> None:
    """Random weights of a Llama with a context of 4,096 tokens, and a tokenizer of one token per byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    alphabet = ["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=32, num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS,
        intermediate_size=64, max_position_embeddings=4096, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def capture(root: Path, mode: str, n_prompt: int) -> None:
    """Run one capture in this process, and print its peak memory in bytes."""
    from click.testing import CliRunner

    from tlcapture.cli.main import main

    if mode == KEEPS_NOTHING:
        keep_nothing()
    words = ["capture", "--root", str(root), "--experiment", f"{mode}{n_prompt}", "--format", "compact", "--no-project"]
    words += ["--model", str(root / "model"), "--prompt", "x" * (n_prompt - 1), "--no-chat-template", "--no-check"]
    words += ["--temperature", "5", "--max-new-tokens", str(N_TOKENS - n_prompt)]
    for more in [[], ["--replay", "--attention"]] if mode == "replay" else [["--attention"]]:
        done = CliRunner().invoke(main, [*words, *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak": 1024 * int(peak.split()[1])}))


def keep_nothing() -> None:
    """Let patterns be computed and handed to the recorder, which drops them."""
    import tlcapture.commands.prompt_files.outputs as outputs
    from tlcapture.generation.recording import pattern_spools
    from tlcapture.generation.recording import recorder as recording
    from tlcapture.storage.files import write_json

    class Nothing(pattern_spools.SpooledPatterns):
        def write(self, *of: object) -> None:
            pass

        def take(self, index: int, n_tokens: int) -> pattern_spools.PatternSpool:
            return self._spools[index]

    patch.object(recording, "SpooledPatterns", Nothing).start()
    patch.object(outputs, "write_attention_file", lambda layout, path, *of: write_json(path, {})).start()


def peak_of(root: Path, mode: str, n_prompt: int) -> int:
    """The peak memory of a capture in a process of its own."""
    words = [sys.executable, __file__, str(root), mode, str(n_prompt)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def main() -> None:
    """Print the figures."""
    from tlcapture.page.contents import Contents

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model(root / "model")
        for n_prompt in (200, 1990):
            watched = peak_of(root, KEEPS_NOTHING, n_prompt)
            # A replay reads all tokens in one pass, as a capture does with nearly all of them in the prompt.
            for mode in ("compact", "replay") if n_prompt > N_TOKENS / 2 else ("compact",):
                layers = (peak_of(root, mode, n_prompt) - watched) / LAYER
                print(f"{n_prompt} of {N_TOKENS} tokens in the prompt, {mode}: {layers:+.2f} layers over watching")
                path = next((root / "experiments" / f"{mode}{n_prompt}").rglob("*_attention.safetensors"))
                print(f"    {path.stat().st_size / WEIGHTS:.3f} bytes a weight")
                began = time.perf_counter()
                contents, where = Contents(root), (f"{mode}{n_prompt}", "adhoc", "1")
                contents.attention(*where)
                contents.attention_token(*where, str(N_TOKENS - 1))
                print(f"    opened in {time.perf_counter() - began:.3f} s")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        capture(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    else:
        main()
