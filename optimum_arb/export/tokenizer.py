"""A tokenizer of transformers as GGUF metadata: byte-level BPE ("gpt2") and SentencePiece-like BPE ("llama")."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Regular expressions by which tokenizers split text into words -> llama.cpp's name for them (llama-vocab.cpp).
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_OPENAI_WORDS = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+%s|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*%s|"
)
_WORDS = "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
_SIGNS = " ?[^\\s\\p{L}\\p{N}]+"
_PATTERNS = {
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_SIGNS}[\\r\\n]*|{_SPACES}": "llama-bpe",
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_SIGNS}[\\r\\n]*|{_SPACES}": "qwen2",
    _OPENAI_WORDS % ("", "") + f"\\p{{N}}|{_SIGNS}[\\r\\n/]*|{_SPACES}": "tekken",
    _OPENAI_WORDS % (_CONTRACTIONS + "?", _CONTRACTIONS + "?")
    + f"\\p{{N}}{{1,3}}|{_SIGNS}[\\r\\n/]*|{_SPACES}": "gpt-4o",
}
# Where a piece that is a token as a whole is that token, whatever the merges say (`ignore_merges`): llama.cpp has this
# under names of their own.
_WHOLE_PIECES = {"llama-bpe": True, "tekken": True}
_WITHOUT_WHOLE_PIECES = {"llama-bpe": "smaug-bpe"}


def write_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int, pre_tokenizer: str | None = None) -> None:
    """Everything of `tokenizer.*`.

    Args:
        writer: the writer.
        tokenizer: a fast tokenizer of transformers.
        vocab_size: rows of the model's embedding; what the tokenizer lacks is written as unused.
        pre_tokenizer: llama.cpp's name of the rule that splits text into words, where it is not found from the
            tokenizer, such as "llama-bpe".

    Raises:
        ValueError: a tokenizer that llama.cpp does not have.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot be exported: only fast tokenizers can. Leave the tokenizer out "
            "(tokenizer=None, --no-tokenizer)."
        )
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"A tokenizer of type {model['type']} cannot be exported to GGUF: the export knows BPE. Leave the "
            "tokenizer out (tokenizer=None, --no-tokenizer)."
        )
    pieces = tokenizer.get_vocab()
    if max(pieces.values()) >= vocab_size:
        raise ValueError(
            f"The tokenizer has the token id {max(pieces.values())}, but the model's embedding {vocab_size} rows: give "
            "the model's own tokenizer."
        )
    byte_level = not model.get("byte_fallback")
    pre = (pre_tokenizer or word_rule(state)) if byte_level else "default"
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(pre)
    tokens, types = _tokens(tokenizer, state, pieces, vocab_size)
    writer.add_token_list(tokens)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if byte_level:
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_add_space_prefix(False)
    else:
        writer.add_token_scores(_scores(pieces, merges, vocab_size))
        writer.add_token_types(types)
        writer.add_add_space_prefix(_adds_space(state))
    _write_special(writer, tokenizer)


def word_rule(state: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer splits text into words.

    Args:
        state: the content of tokenizer.json.

    Raises:
        ValueError: a rule that is not in the table.
    """
    pre = state.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if plain and kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex")
        name = _PATTERNS.get(pattern)
        if name is not None and steps[0].get("behavior") == "Isolated":
            whole = bool(state["model"].get("ignore_merges"))
            if whole == _WHOLE_PIECES.get(name, False):
                return name
            if not whole and name in _WITHOUT_WHOLE_PIECES:
                return _WITHOUT_WHOLE_PIECES[name]
    raise ValueError(
        "llama.cpp's name for this tokenizer's way to split text into words is not known: "
        f"{json.dumps(pre)[:300]}. Give it as pre_tokenizer (--pre-tokenizer; tokenizer.ggml.pre in GGUF files of the "
        "same model family), or leave the tokenizer out (tokenizer=None, --no-tokenizer)."
    )


def _tokens(tokenizer: Any, state: dict, pieces: dict[str, int], size: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    unknown = state["model"].get("unk_token")
    fallback = state["model"].get("byte_fallback")
    for piece, index in pieces.items():
        tokens[index] = piece
        types[index] = int(TokenType.NORMAL)
        if fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            types[index] = int(TokenType.BYTE)
    for index, added in tokenizer.added_tokens_decoder.items():
        tokens[index] = added.content
        if types[index] == TokenType.BYTE:
            continue
        types[index] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    if fallback and unknown in pieces:
        types[pieces[unknown]] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(pieces: dict[str, int], merges: list[list[str]], size: int) -> list[float]:
    """SentencePiece merges the pair whose result has the highest score, tokenizers the one of the earliest merge: the
    score of a piece is minus the rank of the first merge that makes it."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        rank.setdefault("".join(pair), index)
    scores = [-float(len(merges) + 1)] * size
    for piece, index in pieces.items():
        if piece in rank:
            scores[index] = -float(rank[piece])
    return scores


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normalizer = state.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    pre = state.get("pre_tokenizer") or {}
    before = [step for step in pre.get("pretokenizers", [pre]) if step.get("type") == "Metaspace"]
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or any(step.get("prepend_scheme", "always") != "never" for step in before)


def _write_special(writer: GGUFWriter, tokenizer: Any) -> None:
    for kind, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unk"), ("pad", "pad")):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    # what the tokenizer does, which its configuration says in several ways
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    added = len(full) - len(plain)
    start = next((at for at in range(added + 1) if full[at : at + len(plain)] == plain), 0)
    before, after = full[:start], full[start + len(plain) :]
    writer.add_add_bos_token(tokenizer.bos_token_id in before)
    writer.add_add_eos_token(tokenizer.eos_token_id in after)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        writer.add_chat_template([{"name": key, "template": value} for key, value in template.items()])
    elif template:
        writer.add_chat_template(template)
