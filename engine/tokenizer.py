"""Text to token ids and back, over the `tokenizers` library, and text that streams while tokens arrive.

A model directory's tokenizer.json does the work; tokenizer_config.json adds what Transformers reads from it: the
names of the special tokens, tokens the first file lacks, and whether BOS and EOS surround a prompt. What it does not
do: read SentencePiece's tokenizer.model or other vocabularies, or tidy spaces around punctuation after decoding
(clean_up_tokenization_spaces), which would change what the model wrote.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from engine.errors import RequestError, TokenizerError
from engine.json_file import brief, read_json

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not UTF-8

# Decoders under which more tokens only ever add text, except to an unfinished character or run of byte tokens.
_STREAMABLE = ("ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# No decoder model has one, and with merges that contradict it the library aborts the process.
_SUBWORD_PREFIX = re.compile(r'"continuing_subword_prefix"\s*:\s*"[^"]')
_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "vocab.json")


class Tokenizer:
    """One model's tokenizer; safe to use from several threads.

    bos_token, eos_token: their text, None where the model has none; bos_token_id, eos_token_id: their ids.
    vocab_size: number of tokens; a model's own vocabulary may be padded beyond it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        """`config` is tokenizer_config.json's content. Raises TokenizerError where the two contradict each other."""
        self._backend = backend
        backend.no_truncation()  # both are training settings that some files carry
        backend.no_padding()
        _add_tokens(backend, config.get("added_tokens_decoder"))
        self.bos_token, self.bos_token_id = _special_token(backend, config, "bos_token")
        self.eos_token, self.eos_token_id = _special_token(backend, config, "eos_token")
        self._surround(config)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        self._byte_ids = _byte_ids(backend)

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read `path`/tokenizer.json and, if there, tokenizer_config.json. Raises TokenizerError."""
        directory = Path(path)
        backend = _load(directory)
        config_file = directory / "tokenizer_config.json"
        return cls(backend, read_json(config_file, TokenizerError) if config_file.exists() else {})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises RequestError for text that is not valid Unicode."""
        if not isinstance(text, str):
            raise RequestError(f"text to encode must be a string, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"text has a lone surrogate at character {error.start}, which has no encoding") from None
        with _library_errors("the text cannot be encoded"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids that are no token add nothing, bytes that are not UTF-8 become U+FFFD."""
        try:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            raise RequestError("token ids must be in [0, 2^32)") from None

    def token_text(self, id: int) -> str:
        """Text of one token within a text: "▁the" is " the", half a character U+FFFD, no token at all "".

        Decoders treat a text's first token specially, so this is what the token adds after itself.
        """
        once = self.decode([id], skip_special_tokens=False)
        return self.decode([id, id], skip_special_tokens=False)[len(once) :]

    def adds_text(self, id: int, skip_special_tokens: bool = True) -> bool:
        """Whether decode regards `id` at all: it is a token, and not a skipped special one."""
        return self._backend.id_to_token(id) is not None and not (skip_special_tokens and id in self._special_ids)

    def is_byte(self, id: int) -> bool:
        """Whether `id` is one byte of a character the vocabulary lacks (byte fallback, "<0xE4>")."""
        return id in self._byte_ids

    def _surround(self, config: Mapping[str, Any]) -> None:
        """Make add_special_tokens follow add_bos_token and add_eos_token where the configuration names them."""
        present = self._backend.encode("").ids
        has_bos = self.bos_token is not None and present[:1] == [self.bos_token_id]
        has_eos = self.eos_token is not None and present[has_bos:][-1:] == [self.eos_token_id]
        bos = _flag(config, "add_bos_token", has_bos)
        eos = _flag(config, "add_eos_token", has_eos)
        if (bos, eos) == (has_bos, has_eos):
            return
        before = [self.bos_token] if bos else []
        after = [self.eos_token] if eos else []
        if None in before or None in after:
            raise TokenizerError("tokenizer_config.json wants BOS or EOS added but names no such token")
        ids = {self.bos_token: self.bos_token_id, self.eos_token: self.eos_token_id}
        self._backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(token, ids[token]) for token in {*before, *after}]
        )


class Detokenizer:
    """One answer's text, piece by piece: push token ids, get the text that no later token can change.

    The pieces together are what decoding prompt and answer at once gives after the prompt's text, where a U+FFFD that
    ends the prompt counts as the answer's, which may complete it. Two things are held back: a last character that is
    not complete UTF-8 yet, and a run of byte-fallback tokens, which turns into U+FFFD as a whole when any of it is
    invalid, until a token ends it.

    Only a short window of tokens is decoded at each push, the newest and enough before them for the decoder to be
    past its special treatment of a text's beginning, so a token costs O(1) whatever the answer's length.
    """

    _CONTEXT = 8  # tokens kept by a cut: more than the 4 an unfinished character can have
    _WINDOW = 24  # tokens decoded before a cut; a larger window is cut less often but decodes more

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._bytes: list[int] = []  # the answer's open run of byte tokens
        self._window = self._prompt_context(prompt_ids)
        self._sent = self._prompt_length()  # characters of the window's text

    def push(self, ids: Iterable[int]) -> str:
        """Take the answer's next tokens; returns the text that is now certain."""
        settled = len(self._window)
        for id in ids:
            if not self._tokenizer.adds_text(id, self._skip):
                continue
            self._bytes.append(id)
            if not self._tokenizer.is_byte(id):
                self._window += self._bytes
                self._bytes = []
        if len(self._window) == settled:
            return ""
        text = self._decode(self._window)
        certain = text.removesuffix(REPLACEMENT)
        piece = certain[self._sent :]
        self._sent = len(certain)
        if len(self._window) > self._WINDOW:
            self._cut(unsent=len(text) - len(certain))
        return piece

    def finish(self) -> str:
        """The text held back, once no more tokens will come; nothing when called again."""
        self._window += self._bytes
        self._bytes = []
        text = self._decode(self._window)
        piece = text[self._sent :]
        self._sent = len(text)
        return piece

    def _cut(self, unsent: int) -> None:
        """Drop the window's older tokens.

        What is left may begin inside a character and decode to U+FFFD there, but only in text already sent: an
        unfinished character has no more than 4 tokens. If it decodes to nothing, the decoder would take the next
        token for a text's first, so the cut waits.
        """
        kept = self._window[-self._CONTEXT :]
        length = len(self._decode(kept))
        if length > unsent:
            self._window, self._sent = kept, length - unsent

    def _prompt_context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens; an open run of byte tokens is kept whole, as the answer may continue it."""
        context: list[int] = []
        for id in reversed(prompt_ids):
            if self._tokenizer.adds_text(id, self._skip):
                context.append(id)
            if len(context) >= self._CONTEXT and not self._tokenizer.is_byte(context[-1]):
                break
        return context[::-1]

    def _prompt_length(self) -> int:
        """Characters of the prompt's context that are its own: an unfinished one at its end is the answer's."""
        text = self._decode(self._window)
        if self._window and self._tokenizer.is_byte(self._window[-1]):
            return len(text.rstrip(REPLACEMENT))  # one for each byte of the run
        return len(text.removesuffix(REPLACEMENT))  # one for the whole character

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _load(directory: Path) -> tokenizers.Tokenizer:
    file = directory / "tokenizer.json"
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise TokenizerError(_missing(directory)) from None
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file}: not a usable tokenizer: not UTF-8 at byte {error.start}") from None
    if _SUBWORD_PREFIX.search(text):
        raise TokenizerError(f"{file}: a continuing_subword_prefix is not supported")
    with _library_errors(f"{file}: not a usable tokenizer"):
        return tokenizers.Tokenizer.from_str(text)


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn an error of the library into a TokenizerError.

    The library raises nothing narrower than Exception, and a panic in its Rust code derives from BaseException alone.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what}: {error}") from None


def _missing(directory: Path) -> str:
    message = f"no tokenizer.json in {directory}"
    others = [name for name in _OTHER_FORMATS if (directory / name).exists()]
    if others:
        message += (
            f", only {' and '.join(others)}, which the engine does not read; convert once with Transformers: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )
    return message


def _add_tokens(backend: tokenizers.Tokenizer, declared: Any) -> None:
    """Add the tokens of tokenizer_config.json's added_tokens_decoder that tokenizer.json lacks, at the ids it says."""
    if declared is None:
        return
    known = backend.get_added_tokens_decoder()
    if not isinstance(declared, dict):
        raise TokenizerError("tokenizer_config.json: added_tokens_decoder must be an object")
    tokens = {_token_id(key): _added_token(options) for key, options in declared.items()}
    backend.add_tokens([tokens[id] for id in sorted(tokens) if known.get(id) != tokens[id]])
    for id, token in tokens.items():
        if backend.token_to_id(token.content) != id:
            raise TokenizerError(
                f"tokenizer_config.json puts token {brief(token.content)} at id {id}, tokenizer.json at "
                f"{backend.token_to_id(token.content)}"
            )


def _token_id(key: str) -> int:
    if not key.isascii() or not key.isdigit():
        raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder has {brief(key)} for a token id")
    return int(key)


def _added_token(options: Any) -> tokenizers.AddedToken:
    content = options.get("content") if isinstance(options, dict) else None
    flags = {name: options[name] for name in _TOKEN_FLAGS if name in options} if content else {}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder has a malformed token: {brief(options)}")
    return tokenizers.AddedToken(content, **flags)


def _special_token(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], name: str
) -> tuple[str | None, int | None]:
    """Text and id of the token called `name`, given as a string, {"content": string} or null; null has neither."""
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None, None
    id = backend.token_to_id(token) if isinstance(token, str) else None
    if id is None:
        raise TokenizerError(f"tokenizer_config.json: {name} {brief(token)} is not in the vocabulary")
    return token, id


def _flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TokenizerError(f"tokenizer_config.json: {name} must be true or false, not {brief(value)}")
    return value


def _byte_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Ids of the byte-fallback tokens. Raises TokenizerError for a decoder whose text could not be streamed."""
    steps = _steps(json.loads(backend.decoder.__getstate__())) if backend.decoder else []
    for step in steps:
        if step["type"] not in _STREAMABLE or step.get("stop"):
            raise TokenizerError(f"tokenizer.json: decoder {step} is not supported; {', '.join(_STREAMABLE)} are")
    if not any(step["type"] == "ByteFallback" for step in steps):
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(id for id in ids if id is not None)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder's elementary steps in order, sequences flattened."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]
