"""Saves a tiny causal language model with random weights, its tokenizer and a chat template. Nothing is downloaded.

Runs in an interpreter that has transformers, of which it imports only what is light: numpy, safetensors, tokenizers.
Usage: python -m tools.llm_model DIRECTORY
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
# What it answers with, so that its answers can be read. No text is encoded to these: there are no merges.
_WORDS = ["a", "the", "some", "every", "no", "server", "port", "lease", "rank", "test", "worker", "group", "keeper"]
_WORDS += ["starts", "stops", "waits", "holds", "frees", "ends", "and"]
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SEED = 20240229
_HIDDEN, _INNER, _LAYERS, _HEADS, _KEY_HEADS = 64, 128, 2, 4, 2
# An answer may take minutes: a stream that is to be cut off is still there.
_POSITIONS = 1 << 16


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m tools.llm_model DIRECTORY", file=sys.stderr)
        return 2
    save(Path(sys.argv[1]))
    return 0


def save(directory: Path) -> None:
    """Save the model and its tokenizer, the same ones each time."""
    directory.mkdir(parents=True, exist_ok=True)
    words = _vocabulary()
    _save_tokenizer(directory, words)
    _save_model(directory, words)


def _vocabulary() -> list[str]:
    # The alphabet of bytes is a vocabulary for any text; in it a space is this letter.
    alphabet = sorted(_library("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    return [*_SPECIAL.values(), *_ROLES, *alphabet, *(f"\u0120{word}" for word in _WORDS)]


def _save_tokenizer(directory: Path, words: Sequence[str]) -> None:
    tokenizers = _library("tokenizers")
    core = tokenizers.models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer = tokenizers.Tokenizer(core)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([*_SPECIAL.values(), *_ROLES])
    tokenizer.save(str(directory / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": _POSITIONS, **_SPECIAL}
    _write(directory / "tokenizer_config.json", {**facts, "chat_template": _CHAT_TEMPLATE})


def _save_model(directory: Path, words: Sequence[str]) -> None:
    tokens = {f"{name}_id": words.index(word) for name, word in _SPECIAL.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(words),
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEY_HEADS,
        "max_position_embeddings": _POSITIONS,
        "tie_word_embeddings": False,
    }
    _write(directory / "config.json", {**config, **tokens})
    # The end of an answer is suppressed as well: it is as long as was asked for, in every run.
    others = list(range(len(words) - len(_WORDS)))
    _write(directory / "generation_config.json", {"do_sample": True, "suppress_tokens": others, **tokens})
    weights = directory / "model.safetensors"
    _library("safetensors.numpy").save_file(_weights(len(words)), weights, metadata={"format": "pt"})


def _weights(vocabulary: int) -> dict[str, Any]:
    np = _library("numpy")
    numbers = np.random.default_rng(_SEED)
    return {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else numbers.normal(0.0, shape[-1] ** -0.5, shape).astype(np.float32)
        for name, shape in _shapes(vocabulary).items()
    }


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Give the names and shapes of Llama's weights; what has one dimension is the scale of a norm."""
    keys = _HIDDEN // _HEADS * _KEY_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, _HIDDEN)}
    for number in range(_LAYERS):
        layer = {
            "self_attn.q_proj": (_HIDDEN, _HIDDEN),
            "self_attn.k_proj": (keys, _HIDDEN),
            "self_attn.v_proj": (keys, _HIDDEN),
            "self_attn.o_proj": (_HIDDEN, _HIDDEN),
            "mlp.gate_proj": (_INNER, _HIDDEN),
            "mlp.up_proj": (_INNER, _HIDDEN),
            "mlp.down_proj": (_HIDDEN, _INNER),
            "input_layernorm": (_HIDDEN,),
            "post_attention_layernorm": (_HIDDEN,),
        }
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (vocabulary, _HIDDEN)}


def _library(name: str) -> Any:
    """Import one that the project itself does without, and that need not be where it is checked."""
    return importlib.import_module(name)


def _write(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
