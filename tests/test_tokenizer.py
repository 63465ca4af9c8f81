"""The tokenizer's files, encoding, and streamed text against the library's one-shot decoding."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.errors import ConfigError, RequestError, TokenizerError
from engine.generation_defaults import GenerationDefaults
from engine.tokenizer import Detokenizer, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's  not   a test, is it?",
    "naïve café résumé — “quoted” 100 % of the time\n\tindented code: x = y[0] + z",
    "你好，世界。 こんにちは 세계 Привет мир",
    "emoji 😀 and 👩‍👩‍👧 family, combining e\u0301 n\u0303",
] * 3
SPECIALS = ["<s>", "</s>"]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen: tokens are bytes, a character may be cut anywhere."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def metaspace() -> tokenizers.Tokenizer:
    """As SentencePiece unigram: a space belongs to the word after it, and the text's first one is not shown."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[*SPECIALS, "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral: characters the vocabulary lacks are spelled in byte tokens <0x00>..<0xFF>."""
    space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = space
    trainer = trainers.BpeTrainer(
        vocab_size=200, limit_alphabet=101, initial_alphabet=["▁", *string.printable], show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(SPECIALS)
    backend.normalizer = space
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


BACKENDS = {build.__name__: build() for build in (byte_level, metaspace, byte_fallback)}
TOKENIZERS = {name: Tokenizer(backend, {}) for name, backend in BACKENDS.items()}
every_kind = pytest.mark.parametrize("kind", sorted(BACKENDS))


def one_shot(kind: str, prompt: list[int], answer: list[int]) -> str:
    """The answer's text in its context, by the library alone; half a character at the prompt's end is the answer's."""
    backend = BACKENDS[kind]
    before = backend.decode(prompt)
    last = [token for token in map(backend.id_to_token, prompt) if token and token not in SPECIALS][-1:]
    one_each = kind == "byte_fallback" and last and last[0].startswith("<0x")  # U+FFFD for every byte of the run
    own = before.rstrip("\ufffd") if one_each else before.removesuffix("\ufffd")
    return backend.decode(prompt + answer)[len(own) :]


def streamed(kind: str, prompt: list[int], answer: list[int], steps: random.Random) -> str:
    detokenizer = Detokenizer(TOKENIZERS[kind], prompt)
    text, position = "", 0
    while position < len(answer):
        count = steps.choice([1, 1, 1, 2, 5])
        text += detokenizer.push(answer[position : position + count])
        position += count
    return text + detokenizer.finish()


texts = st.lists(
    st.one_of(
        st.sampled_from(
            ["the ", " fox", "  ", "\n", "▁", "你好", "😀", "👩‍👩‍👧", "e\u0301", "\ufffd", "<s>", "</s>", "q"]
        ),
        st.text(max_size=6),
    ),
    max_size=30,
).map("".join)


@every_kind
@given(prompt=texts, answer=texts, seed=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_the_one_shot_text(kind: str, prompt: str, answer: str, seed: int) -> None:
    encode = TOKENIZERS[kind].encode
    prompt_ids, answer_ids = encode(prompt), encode(answer)
    expected = one_shot(kind, prompt_ids, answer_ids)
    assert streamed(kind, prompt_ids, answer_ids, random.Random(seed)) == expected


@every_kind
@given(data=st.data(), seed=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_arbitrary_tokens_stream_as_they_decode(kind: str, data: st.DataObject, seed: int) -> None:
    """Token ids at random: half characters, invalid bytes, specials, ids without a token."""
    backend = BACKENDS[kind]
    odd = st.integers(0, backend.get_vocab_size() + 3)
    raw = st.integers(3, 258)  # the byte tokens of byte_fallback, most bytes of byte_level
    emoji = st.just(TOKENIZERS[kind].encode("😀")[-4:])
    ids = st.lists(st.one_of(odd.map(lambda id: [id]), raw.map(lambda id: [id]), emoji), max_size=60).map(
        lambda parts: [id for part in parts for id in part]
    )
    prompt, answer = data.draw(ids), data.draw(ids)
    if kind == "byte_fallback":  # a prompt's run of bytes that the answer makes invalid has no text of its own
        prompt += TOKENIZERS[kind].encode("fox")
    assert streamed(kind, prompt, answer, random.Random(seed)) == one_shot(kind, prompt, answer)


@every_kind
def test_plain_words_come_out_at_once_and_in_context(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("The quick brown fox")
    half = len(ids) // 2
    detokenizer = Detokenizer(tokenizer, ids[:half])
    pieces = [detokenizer.push([id]) for id in ids[half:]]
    assert all(pieces)
    assert tokenizer.decode(ids[:half]) + "".join(pieces) == "The quick brown fox"
    assert detokenizer.finish() == ""


def test_a_character_comes_out_whole_and_an_invalid_byte_comes_out() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    emoji = [tokenizer.encode(character, add_special_tokens=False) for character in "\U0001f9ff"][0]
    assert len(emoji) > 1
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.push([id]) for id in emoji] == [""] * (len(emoji) - 1) + ["\U0001f9ff"]
    lead = emoji[0]
    assert detokenizer.push([lead]) == ""
    assert detokenizer.push(tokenizer.encode("a")) == "\ufffda"
    assert detokenizer.push([lead]) + detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


class Counting(Tokenizer):
    """Counts the token ids decoded."""

    decoded = 0

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens)


@every_kind
@pytest.mark.parametrize("text", ["the lazy dog ", "😀", "<s>", " ", "\ufffd"])
def test_work_per_token_does_not_grow_with_the_answer(kind: str, text: str) -> None:
    tokenizer = Counting(BACKENDS[kind], {})
    ids = tokenizer.encode(text * 500)
    detokenizer = Detokenizer(tokenizer, ids)
    for id in ids:
        detokenizer.push([id])
    detokenizer.finish()
    assert tokenizer.decoded <= 60 * len(ids)


@every_kind
@given(text=texts)
@example("<s> the </s>")
@settings(max_examples=60, deadline=None)
def test_token_texts_join_to_the_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    joined = "".join(tokenizer.token_text(id) for id in ids)
    if "\ufffd" not in joined:  # no character cut in pieces
        assert joined == whole or (kind != "byte_level" and joined == " " + whole)


def test_text_of_single_tokens() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    space, *_ = tokenizer.encode("the")
    assert tokenizer.token_text(space).startswith(" ")
    assert tokenizer.token_text(tokenizer.encode("你")[-1]) == "\ufffd"  # a byte of it
    assert tokenizer.token_text(1) == "<s>"
    assert tokenizer.token_text(tokenizer.vocab_size + 5) == ""


def save(directory: Path, config: dict[str, Any] | None, kind: str = "byte_level", template: str = "") -> Path:
    backend = tokenizers.Tokenizer.from_str(BACKENDS[kind].to_str())
    if template:
        tokens = [(token, backend.token_to_id(token)) for token in SPECIALS if token in template]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}


@pytest.mark.parametrize(
    ("template", "flags", "expected"),
    [
        ("<s> $A", {}, "<s>the"),
        ("$A", {}, "the"),
        ("<s> $A", {"add_bos_token": False}, "the"),
        ("$A", {"add_bos_token": True}, "<s>the"),
        ("<s> $A", {"add_bos_token": True, "add_eos_token": True}, "<s>the</s>"),
        ("<s> $A </s>", {"add_bos_token": None, "add_eos_token": False}, "<s>the"),
    ],
)
def test_bos_and_eos_follow_the_configuration(
    tmp_path: Path, template: str, flags: dict[str, Any], expected: str
) -> None:
    tokenizer = Tokenizer.from_directory(save(tmp_path, NAMES | flags, template=template))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode(tokenizer.encode("the"), skip_special_tokens=False) == expected
    assert tokenizer.decode(tokenizer.encode("the"), skip_special_tokens=True) == "the"
    assert tokenizer.decode(tokenizer.encode("the", add_special_tokens=False), skip_special_tokens=False) == "the"


def test_tokenizer_json_alone_suffices(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(save(tmp_path, None))
    assert tokenizer.decode(tokenizer.encode("日本 café")) == "日本 café"
    assert (tokenizer.bos_token_id, tokenizer.eos_token) == (None, None)
    assert tokenizer.vocab_size == BACKENDS["byte_level"].get_vocab_size()


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(BACKENDS["byte_level"].to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode("x y z " * 9), skip_special_tokens=False) == "x y z " * 9


def test_tokens_declared_only_in_the_configuration_are_added_at_their_ids(tmp_path: Path) -> None:
    size = BACKENDS["byte_level"].get_vocab_size()
    declared: dict[str, Any] = {
        str(size + 1): {"content": "<tool>", "special": False, "__type": "AddedToken"},
        str(size): {"content": "<|end|>", "special": True},
    }
    tokenizer = Tokenizer.from_directory(save(tmp_path, {"added_tokens_decoder": declared, "eos_token": "<|end|>"}))
    assert tokenizer.eos_token_id == size
    assert tokenizer.encode("<tool><|end|>") == [size + 1, size]
    assert tokenizer.decode([size + 1, size]) == "<tool>"
    declared[str(size + 7)] = {"content": "<gap>"}
    with pytest.raises(TokenizerError, match="'<gap>' at id"):
        Tokenizer.from_directory(save(tmp_path, {"added_tokens_decoder": declared}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": "<nope>"}, "'<nope>' is not in the vocabulary"),
        ({"bos_token": 3}, "bos_token 3"),
        ({"add_bos_token": "yes"}, "true or false"),
        ({"add_bos_token": True}, "names no such token"),
        ({"added_tokens_decoder": []}, "must be an object"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "'x' for a token id"),
        ({"added_tokens_decoder": {"1": {"content": 2}}}, "malformed token"),
        ({"added_tokens_decoder": {"1": {"content": "a", "special": "no"}}}, "malformed token"),
        ({"added_tokens_decoder": {"1": None}}, "malformed token"),
    ],
)
def test_a_bad_configuration_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_directory(save(tmp_path, config))


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path / "absent")
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    with pytest.raises(TokenizerError, match=r"only tokenizer\.model.*save_pretrained"):
        Tokenizer.from_directory(tmp_path)
    merges = b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'
    prefix = b'{"model": {"type": "BPE", "continuing_subword_prefix": "##"}}'
    for content, message in (
        (b"", "not a usable tokenizer"),
        (b"{}", "not a usable tokenizer: Model missing"),
        (b"\xff", "not UTF-8 at byte 0"),
        (merges, "not a usable tokenizer: .*out of vocabulary"),
        (prefix, "continuing_subword_prefix is not supported"),
    ):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_directory(tmp_path)
    save(tmp_path, None)
    (tmp_path / "tokenizer_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(TokenizerError, match="malformed JSON"):
        Tokenizer.from_directory(tmp_path)


def test_a_decoder_that_rewrites_earlier_text_is_refused() -> None:
    backend = tokenizers.Tokenizer.from_str(BACKENDS["byte_level"].to_str())
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer(backend, {})
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])
    with pytest.raises(TokenizerError, match="Strip"):
        Tokenizer(backend, {})


def test_bad_requests() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    with pytest.raises(RequestError, match="surrogate at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(RequestError, match="must be a string, not bytes"):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="token ids"):
        tokenizer.decode([-1])


def defaults(directory: Path, content: Any) -> GenerationDefaults:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "generation_config.json").write_text(text, encoding="utf-8")
    return GenerationDefaults.from_directory(directory, model_eos=(5,), tokenizer_eos=7)


def test_generation_defaults(tmp_path: Path) -> None:
    none = GenerationDefaults.from_directory(tmp_path, model_eos=(), tokenizer_eos=None)
    assert (dict(none.sampling), none.stop_token_ids) == ({}, frozenset())
    read = defaults(tmp_path, {"eos_token_id": [7, 9], "temperature": 0.6, "top_k": 20, "top_p": None, "min_length": 3})
    assert dict(read.sampling) == {"temperature": 0.6, "top_k": 20}
    assert read.stop_token_ids == {5, 7, 9}
    assert defaults(tmp_path, {"eos_token_id": 2, "do_sample": False}).stop_token_ids == {2, 5, 7}
    assert dict(defaults(tmp_path, {"do_sample": False}).sampling) == {}


@pytest.mark.parametrize(
    "content",
    ["[]", "{", {"temperature": -1}, {"top_p": 1.5}, {"top_k": "20"}, {"top_k": 2.5}, {"min_p": True}]
    + [{"eos_token_id": eos} for eos in ("2", -1, [1, None], True, 2.0)],
)
def test_invalid_generation_config_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        defaults(tmp_path, content)
