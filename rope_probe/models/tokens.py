"""Token ids of text as a prompt: with BOS where the tokenizer adds one, and never with EOS behind."""

from transformers import PreTrainedTokenizerBase


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that this tokenizer begins a text with; none where it adds none."""
    return [token for token in tokenizer("a").input_ids[:1] if token == tokenizer.bos_token_id]


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text alone."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that a model is to go on from."""
    return [*bos_of(tokenizer), *plain_ids(tokenizer, text)]
