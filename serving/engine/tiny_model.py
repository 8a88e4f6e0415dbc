"""A model small enough to be made on the spot: configuration, tokenizer and chat template, and no weights.

vLLM serves it with random weights on a CPU, and with none on a virtual GPU. The tokenizer is a byte-level BPE whose
merges are written down here rather than trained, so the same folder comes out everywhere and no library is needed.
Each of ``WORDS`` with a space before it is exactly one token.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

_WORD_TABLE = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word but
not what all were we when your can said there use an each which she do how their if will up other about out many
then them these so some her would make like him into time has look two more write go see number no way could people
my than first water been call who oil its now find long down day did get come made may part over new sound take only
little work know place year live me back give most very after thing our just name good sentence man think say great
where help through much before line right too mean old any same tell boy follow came want show also around form
three small set put end does another well large must big even such because turn here why ask went men read need land
different home us move try kind hand picture again change off play spell air away animal house point page letter
mother answer found study still learn should world rate limit token request server model capacity
"""
#: Common English words, each one token when a space precedes it.
WORDS = tuple(_WORD_TABLE.split())

#: Pairs that also merge inside words, after the words themselves.
_PAIRS = "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur"  # noqa: E501 - one table

BOS, EOS, TURN = "<|begin|>", "<|end|>", "<|turn|>"
_SPECIAL = (BOS, EOS, TURN)

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{TURN}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{TURN}assistant\n{{% endif %}}"
)


class TinyModel(msgspec.Struct, frozen=True):
    """A model folder, with the token ids that a virtual GPU speaks in."""

    path: Path
    word_ids: tuple[int, ...]
    eos_id: int


def make_tiny_model(folder: Path, max_model_len: int) -> TinyModel:
    """The model's folder under ``folder``, made unless it is there; named by its content.

    A change of any file gives another name, and a folder appears whole, so concurrent makers do not disturb each other.
    """
    vocabulary, merges = _vocabulary()
    contents = {
        "config.json": _config(len(vocabulary), max_model_len, vocabulary),
        "tokenizer.json": _tokenizer(vocabulary, merges),
        "tokenizer_config.json": _tokenizer_config(max_model_len),
    }
    files = {name: json.dumps(content, indent=1, sort_keys=True).encode() for name, content in contents.items()}
    digest = hashlib.sha256(b"\0".join(files[name] for name in sorted(files))).hexdigest()
    path = folder / f"tiny-llama-{digest[:16]}"
    if not path.is_dir():
        _write_folder(path, files)
    return TinyModel(path, tuple(vocabulary[_SPACE + word] for word in WORDS), vocabulary[EOS])


def _write_folder(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=path.name))
    for name, content in files.items():
        (draft / name).write_bytes(content)
    try:
        draft.rename(path)
    except OSError:
        shutil.rmtree(draft)
        if not path.is_dir():
            raise


def _byte_characters() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_SPACE = _byte_characters()[ord(" ")]


def _vocabulary() -> tuple[dict[str, int], list[list[str]]]:
    """Token ids, and the merges in order of rank.

    Each word is built from the left, prefix by prefix, and all such merges rank before the pairs: a prefix starts with
    the space, so no other merge can take its letters first, and a word always becomes one token.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        prefixes = [_SPACE + word[:length] for length in range(len(word) + 1)]
        merges |= {(prefix, letter): None for (prefix, _), letter in zip(pairwise(prefixes), word, strict=True)}
    merges |= {(pair[0], pair[1]): None for pair in _PAIRS.split()}
    tokens = [*_SPECIAL, *_byte_characters().values(), *(left + right for left, right in merges)]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, [list(merge) for merge in merges]


def _tokenizer(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], "content": token, **flags} for token in _SPECIAL],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _tokenizer_config(max_model_len: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": max_model_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }


def _config(vocabulary_size: int, max_model_len: int, vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "vocab_size": vocabulary_size,
        "bos_token_id": vocabulary[BOS],
        "eos_token_id": vocabulary[EOS],
    }
