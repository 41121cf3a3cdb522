"""Tokenizers of the kinds that there are, made on the spot; with what they put before a text."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "The sluice at the lower mill was opened on the third morning. naïve café, it isn't: 42 times!"
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(prefix_space: bool = False, regex: bool = True) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it: any byte is a token, and characters are of several."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=regex)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [WORDS] * 3,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return _wrapped(made)


def byte_fallback(strips: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral (both strip the first space) and Gemma have it: <0xE6> where there is no other token."""
    vocab = {token: number for number, token in enumerate(SPECIAL)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for character in sorted(set(WORDS.replace(" ", "▁"))):
        vocab.setdefault(character, len(vocab))
    merges = []
    for left, right in [
        ("t", "h"),
        ("▁", "th"),
        ("▁th", "e"),
        ("i", "l"),
        ("il", "l"),
        ("m", "ill"),
        ("▁", "mill"),
        ("▁", "▁"),
    ]:
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(steps)
    return _wrapped(made)


def metaspace() -> PreTrainedTokenizerFast:
    """As T5 has it: word pieces that hold their space, and no bytes."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        [WORDS] * 3,
        trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    return _wrapped(made)


def word_piece(lower: bool = False) -> PreTrainedTokenizerFast:
    """As BERT has it: ## where a word goes on, spaces are not kept."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        [WORDS] * 3, trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    )
    return _wrapped(made)


def with_added(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, with tokens that were added: words, special ones, and ones that take spaces with them."""
    tokenizer.add_tokens(
        ["<|tool|>", "Wasserrad", AddedToken("<pad-left>", lstrip=True), AddedToken("日本", normalized=False)]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    return tokenizer


def with_bos(tokenizer: PreTrainedTokenizerFast, *begin: str, end: str = "") -> PreTrainedTokenizerFast:
    """The same, with a post-processor that puts tokens around a text."""
    names = [*(begin or ("<s>",)), *([end] if end else [])]
    single = " ".join([*(begin or ("<s>",)), "$A", *([end] if end else [])])
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def _wrapped(made: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level-prefix-space": lambda: byte_level(prefix_space=True),
    "byte-fallback": byte_fallback,
    "byte-fallback-no-strip": lambda: byte_fallback(strips=False),
    "metaspace": metaspace,
    "word-piece": word_piece,
    "word-piece-lower": lambda: word_piece(lower=True),
}
