"""Build the bundled demo model: corpus -> tokenizer -> training -> export.

What.  This one script makes everything in ``weights/demo/`` from public text:
a 5.8 M parameter decoder of the Qwen3 architecture, trained from scratch on
Python sources and English documentation of permissively licensed open-source
packages.  Its stages are subcommands that share one work directory:

    python weights/demo/train.py corpus    --work DIR
    python weights/demo/train.py tokenizer --work DIR
    python weights/demo/train.py train     --work DIR --steps 6000
    python weights/demo/train.py export    --work DIR --out weights/demo
    python weights/demo/train.py verify    --out weights/demo
    python weights/demo/train.py sample    --out weights/demo --prompt "def "

Why.  Smoke tests, examples and quantisation studies need a model that is
small enough to sit in the repository and yet really trained: its perplexity
must mean something and its weight and activation statistics (hence AdamW and
weight decay, as real models use) must resemble those of larger models.

What not.  The engine never imports this file, and nothing here is needed to
run the model.  There is no training across machines, no GPU path and no
hyper-parameter search; the result is a demonstration, not a useful assistant.

Resuming.  ``train`` writes ``DIR/checkpoint.pt`` every few minutes (written
beside, then renamed) and continues from it when started again.  The batch of
a step depends only on the seed and the step, so no data state is stored.
Starting it again with another ``--steps`` re-plans the cosine from the
current step and learning rate down to the floor at the new last step.

Development-only dependencies, as used for the published weights (Python 3.11):

    torch==2.13.0  numpy==2.4.6  tokenizers==0.23.3
    safetensors==0.8.0  transformers==5.23.0 (verify, sample)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# --------------------------------------------------------------------------
# Corpus
# --------------------------------------------------------------------------

#: Where the text comes from: distribution, version, kind of file, licence.
#: Besides these, the standard library of the running Python (PSF-2.0).
SOURCES: tuple[tuple[str, str, str, str], ...] = (
    ("Django", "5.2.19", "sdist", "BSD-3-Clause"),
    ("SQLAlchemy", "2.1.9", "sdist", "MIT"),
    ("Sphinx", "9.0.4", "sdist", "BSD-2-Clause"),
    ("Twisted", "26.10.0", "sdist", "MIT"),
    ("Scrapy", "2.19.0", "sdist", "BSD-3-Clause"),
    ("setuptools", "84.2.1", "sdist", "MIT"),
    ("pip", "26.3", "sdist", "MIT"),
    ("pytest", "9.2.0", "sdist", "MIT"),
    ("mypy", "2.4.1", "sdist", "MIT"),
    ("Cython", "3.3.1", "sdist", "Apache-2.0"),
    ("trio", "0.35.0", "sdist", "MIT OR Apache-2.0"),
    ("anyio", "4.16.0", "sdist", "MIT"),
    ("tornado", "6.6.1", "sdist", "Apache-2.0, documentation CC-BY-3.0"),
    ("aiohttp", "3.14.5", "sdist", "Apache-2.0 AND MIT"),
    ("networkx", "3.6.1", "sdist", "BSD-3-Clause"),
    ("ipython", "9.18.1", "sdist", "BSD-3-Clause"),
    ("Flask", "3.1.3", "sdist", "BSD-3-Clause"),
    ("Jinja2", "3.1.6", "sdist", "BSD-3-Clause"),
    ("Werkzeug", "3.1.9", "sdist", "BSD-3-Clause"),
    ("click", "8.5.1", "sdist", "BSD-3-Clause"),
    ("requests", "2.34.2", "sdist", "Apache-2.0"),
    ("urllib3", "2.8.0", "sdist", "MIT"),
    ("httpx", "0.28.1", "sdist", "BSD-3-Clause"),
    ("attrs", "26.1.0", "sdist", "MIT"),
    ("xarray", "2026.9.0", "sdist", "Apache-2.0"),
    ("rich", "15.0.0", "sdist", "MIT"),
    ("fastapi", "0.165.0", "sdist", "MIT"),
    ("pydantic", "2.14.3", "sdist", "MIT"),
    ("coverage", "7.17.3", "sdist", "Apache-2.0"),
    ("packaging", "26.3", "sdist", "Apache-2.0 OR BSD-2-Clause"),
    ("pluggy", "1.7.0", "sdist", "MIT"),
    ("CherryPy", "18.10.0", "sdist", "BSD-3-Clause"),
    ("Pygments", "2.21.0", "sdist", "BSD-2-Clause"),
    ("alembic", "1.20.1", "sdist", "MIT"),
    ("Mako", "1.4.3", "sdist", "MIT"),
    ("marshmallow", "4.4.0", "sdist", "MIT"),
    ("gunicorn", "27.0.1", "sdist", "MIT"),
    ("zope.interface", "8.7", "sdist", "ZPL-2.1"),
    ("ZODB", "6.4", "sdist", "ZPL-2.1"),
    ("nltk", "3.10.4", "sdist", "Apache-2.0"),
    ("bokeh", "3.9.2", "sdist", "BSD-3-Clause"),
    ("dask", "2026.8.0", "sdist", "BSD-3-Clause"),
    ("distributed", "2026.8.0", "sdist", "BSD-3-Clause"),
    ("sympy", "1.14.0", "sdist", "BSD-3-Clause"),
    ("numpy", "2.4.6", "wheel", "BSD-3-Clause"),
    ("scipy", "1.17.1", "wheel", "BSD-3-Clause"),
    ("pandas", "3.1.1", "wheel", "BSD-3-Clause"),
    ("scikit-learn", "1.9.1", "wheel", "BSD-3-Clause"),
    ("matplotlib", "3.11.2", "wheel", "PSF-based"),
    ("statsmodels", "0.15.0", "wheel", "BSD-3-Clause"),
    ("seaborn", "0.13.2", "wheel", "BSD-3-Clause"),
    ("plotnine", "0.15.9", "wheel", "MIT"),
)

#: A path with one of these components is skipped: tests, data, translations,
#: vendored copies (other licences) and machine-made files.
SKIPPED_PARTS = frozenset(
    (
        "LICENSES",
        "_data",
        "_vendor",
        "_vendored",
        "array_api_compat",
        "baseline_images",
        "data",
        "datasets",
        "encodings",
        "ensurepip",
        "extern",
        "externals",
        "fixtures",
        "generated",
        "idlelib",
        "lex",
        "lib2to3",
        "licenses",
        "locale",
        "locales",
        "node_modules",
        "pydoc_data",
        "site-packages",
        "static",
        "test",
        "test-data",
        "test_data",
        "testdata",
        "testing",
        "tests",
        "translations",
        "turtledemo",
        "unicodedata",
        "vendor",
        "vendored",
    )
)
#: Files under other terms than their package: GFDL, GPL, and CC-BY-NC-ND documentation.
EXCLUDED_FILES = ("ZODB/*/old-guide/*", "plotnine/*/theme_tufte.py", "nltk/*.md", "nltk/*.rst", "nltk/*.txt")
SUFFIXES = {".py": "code", ".rst": "prose", ".md": "prose", ".txt": "prose"}
SKIPPED_NAMES = (
    "license",
    "licence",
    "copying",
    "requirements",
    "authors",
    "contributors",
    "sources",
    "top_level",
    "notice",
    "cmakelists",
    "manifest",
    "thanks",
    "lextab",
    "yacctab",
    "_builtins",
    "entities",
    "unistring",
)
#: Characters of one kind taken out of one source, for the balance of the mix.
MAX_PER_SOURCE = {"code": 1_200_000, "prose": 6_000_000}
MAX_FROM_STDLIB = {"code": 4_000_000, "prose": 6_000_000}
HELDOUT_MODULUS = 80  # about one file in so many is held out
HELDOUT_CHARS = 160_000  # the published part of the held-out files
EOS = "<|endoftext|>"


class Document(NamedTuple):
    """One file of the corpus; ``key`` decides its order and its split."""

    name: str
    kind: str
    text: str
    key: int

    @property
    def held_out(self) -> bool:
        return self.key % HELDOUT_MODULUS == 0


def document_key(name: str) -> int:
    """A fixed pseudo-random number of a file's source and path."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def download(work: Path) -> None:
    """Fetch every pinned source with pip into ``work/dl`` (kept between runs)."""
    for name, version, kind, _ in SOURCES:
        if find_archive(work, name, version, kind) is None:
            choice = "--no-binary" if kind == "sdist" else "--only-binary"
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                choice,
                name,
                "--dest",
                str(work / "dl"),
                f"{name}=={version}",
            ]
            subprocess.run(command, check=True)


def find_archive(work: Path, name: str, version: str, kind: str) -> Path | None:
    """The downloaded archive of one source, or None."""
    ends = (".whl",) if kind == "wheel" else (".tar.gz", ".zip")
    wanted = f"{name}-{version}".lower().replace("_", "-").replace(".", "-")
    for path in sorted((work / "dl").glob("*")):
        plain = path.name.lower().replace("_", "-").replace(".", "-")
        if path.name.endswith(ends) and plain.startswith(wanted + "-"):
            return path
    return None


def archive_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of the text files in a wheel or an sdist."""
    if archive.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if wanted_path(info.filename):
                    yield info.filename, zipped.read(info)
        return
    with tarfile.open(archive) as tarred:
        for member in tarred:
            if member.isfile() and wanted_path(member.name):
                handle = tarred.extractfile(member)
                assert handle is not None
                yield member.name, handle.read()


def stdlib_files() -> Iterator[tuple[str, bytes]]:
    """The standard library's sources and the language reference in pydoc."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if wanted_path(relative):
            yield relative, path.read_bytes()
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield f"topics/{topic}.rst", text.encode()


def wanted_path(path: str) -> bool:
    """Whether a path looks like hand-written text of the wanted kinds."""
    parts = path.split("/")
    name = parts[-1].lower()
    return (
        Path(name).suffix in SUFFIXES
        and not SKIPPED_PARTS.intersection(parts)
        and not name.startswith((*SKIPPED_NAMES, "test_", "conftest"))
        and not any(part.endswith((".dist-info", ".egg-info")) for part in parts)
    )


def clean(raw: bytes) -> str | None:
    """The decoded text, or None if it is too short, too long or not text-like."""
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n").strip() + "\n"
    except UnicodeDecodeError:
        return None
    if not 300 <= len(text) <= 200_000 or max(map(len, text.split("\n"))) > 400:
        return None
    letters = sum(text.count(c) for c in "etaoinsrhldcu")
    digits = sum(text.count(c) for c in "0123456789")
    if letters < 0.3 * len(text) or digits > 0.08 * len(text):
        return None
    if sum(ord(c) > 127 for c in text) > 0.01 * len(text):
        return None
    return text


def read_corpus(work: Path) -> list[Document]:
    """All documents of all sources: filtered, deduplicated, capped, in key order."""
    seen: set[bytes] = set()
    documents: list[Document] = []
    origins: list[tuple[str, Iterator[tuple[str, bytes]]]] = [("python", stdlib_files())]
    for name, version, kind, _ in SOURCES:
        archive = find_archive(work, name, version, kind)
        if archive is None:
            raise SystemExit(f"missing download: {name} {version}")
        origins.append((name, archive_files(archive)))
    for origin, files in origins:
        found: list[Document] = []
        for path, raw in files:
            name = f"{origin}/{path}"
            text = clean(raw)
            if text is None or any(fnmatch(name, pattern) for pattern in EXCLUDED_FILES):
                continue
            digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
            if digest not in seen:
                seen.add(digest)
                kind_of_text = SUFFIXES[Path(path).suffix.lower()]
                found.append(Document(name, kind_of_text, text, document_key(name)))
        most = MAX_FROM_STDLIB if origin == "python" else MAX_PER_SOURCE
        documents += capped(found, most)
    return sorted(documents, key=lambda document: document.key)


def capped(found: list[Document], most: dict[str, int]) -> list[Document]:
    """At most about ``most`` characters of each kind, chosen by key."""
    kept: list[Document] = []
    used = {"code": 0, "prose": 0}
    for document in sorted(found, key=lambda document: document.key):
        if used[document.kind] < most[document.kind]:
            used[document.kind] += len(document.text)
            kept.append(document)
    return kept


def heldout_text(documents: list[Document]) -> str:
    """The published held-out text: whole files in the corpus's mix of kinds."""
    total = sum(len(d.text) for d in documents)
    parts: list[str] = []
    for kind in ("prose", "code"):
        share = sum(len(d.text) for d in documents if d.kind == kind) / total
        budget = int(HELDOUT_CHARS * share)
        for document in documents:
            fits = 1_000 <= len(document.text) <= min(budget, 24_000)
            if document.held_out and document.kind == kind and fits:
                budget -= len(document.text)
                parts.append(document.text)
    return "\n".join(parts)


def stage_corpus(work: Path) -> None:
    """Download, filter and split the text; write it as JSON lines."""
    (work / "dl").mkdir(parents=True, exist_ok=True)
    download(work)
    documents = read_corpus(work)
    with open(work / "corpus.jsonl", "w", encoding="utf-8") as out:
        for document in documents:
            out.write(json.dumps(document._asdict()) + "\n")
    (work / "heldout.txt").write_text(heldout_text(documents), encoding="utf-8")
    table: dict[str, dict[str, int]] = {}
    for document in documents:
        row = table.setdefault(document.name.split("/")[0], {"code": 0, "prose": 0})
        row[document.kind] += len(document.text)
    for name, row in table.items():
        print(f"{name:20s} code {row['code']:>9,d}  prose {row['prose']:>9,d}")
    for kind in ("code", "prose"):
        print(kind, f"{sum(row[kind] for row in table.values()):,d}")
    print("documents", len(documents), "held out", sum(d.held_out for d in documents))


def load_corpus(work: Path) -> list[Document]:
    """The documents that ``stage_corpus`` wrote."""
    with open(work / "corpus.jsonl", encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]


# --------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of the model's vocabulary size; id 0 is the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ModelConfig.vocab,
        special_tokens=[EOS],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == ModelConfig.vocab
    return tokenizer


def stage_tokenizer(work: Path) -> None:
    """Train the byte-level BPE, unless ``work`` has one, and encode both splits."""
    from tokenizers import Tokenizer

    documents = load_corpus(work)
    training = [d.text for d in documents if not d.held_out]
    path = work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(training[::3]).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    eos = tokenizer.token_to_id(EOS)
    held_out = [d.text for d in documents if d.held_out]
    for split, texts in (("train", training), ("heldout", held_out)):
        pieces: list[np.ndarray] = []
        for start in range(0, len(texts), 256):
            for encoding in tokenizer.encode_batch(texts[start : start + 256]):
                pieces.append(np.array([*encoding.ids, eos], dtype=np.uint16))
        ids = np.concatenate(pieces)
        np.save(work / f"{split}.npy", ids)
        size = sum(len(text.encode()) for text in texts)
        print(f"{split}: {size:,d} bytes, {len(ids):,d} tokens, {size / len(ids):.3f} bytes/token")


# --------------------------------------------------------------------------
# Model (Qwen3: pre-norm, grouped-query attention with q/k norm, SwiGLU)
# --------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; every in-feature size is a multiple of 128."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 768
    rope_theta: float = 10000.0
    max_positions: int = 1024
    eps: float = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout; x is (batch, heads, time, dim)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention; parameter names are Transformers' names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, width, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.eps)
        self.k_norm = RMSNorm(config.head_dim, config.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        dim, groups = self.config.head_dim, self.config.heads // self.config.kv_heads
        q = self.q_norm(self.q_proj(x).view(batch, length, -1, dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, -1, dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, -1, dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The model; the output head shares the embedding's matrix."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)
        half = torch.arange(0, config.head_dim, 2) / config.head_dim
        angles = torch.outer(torch.arange(config.max_positions), config.rope_theta**-half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * config.layers) if residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every position."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean next-token cross-entropy of rows of length + 1 tokens."""
        logits = self(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


# --------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------

TOKENS_PER_STEP = 4096
SHORT, LONG = 512, 1024  # row lengths; the last part of the steps uses LONG
LONG_FROM = 0.85
PEAK_RATE, FLOOR_RATE, WARMUP = 2e-3, 1e-4, 150
SEED = 20240


@dataclass
class Schedule:
    """Linear warm-up, then a cosine from ``peak`` at ``start`` to the floor at ``steps``."""

    steps: int
    start: int = WARMUP
    peak: float = PEAK_RATE

    def rate(self, step: int) -> float:
        if step < WARMUP and self.start == WARMUP:
            return self.peak * (step + 1) / WARMUP
        done = min(1.0, (step - self.start) / max(1, self.steps - self.start))
        return FLOOR_RATE + (self.peak - FLOOR_RATE) * 0.5 * (1 + math.cos(math.pi * done))

    def replanned(self, step: int, steps: int) -> Schedule:
        """A schedule that goes from this one's rate at ``step`` to the floor at ``steps``."""
        if steps == self.steps or step <= WARMUP:
            return Schedule(steps, self.start, self.peak)
        return Schedule(steps, step, self.rate(step))

    def row_length(self, step: int) -> int:
        return LONG if step >= int(self.steps * LONG_FROM) else SHORT


def batch_of(ids: np.ndarray, step: int, length: int) -> Tensor:
    """The rows of one step: without replacement within an epoch, shifted per epoch."""
    rows, per_epoch = TOKENS_PER_STEP // length, (len(ids) - 1) // length - 1
    parts = []
    for index in range(step * rows, (step + 1) * rows):
        epoch, place = divmod(index, per_epoch)
        if (epoch, length) not in _ORDERS:
            rng = np.random.default_rng((SEED, length, epoch))
            _ORDERS[epoch, length] = rng.permutation(per_epoch) * length + rng.integers(length)
        begin = int(_ORDERS[epoch, length][place])
        parts.append(ids[begin : begin + length + 1])
    return torch.from_numpy(np.stack(parts).astype(np.int64))


_ORDERS: dict[tuple[int, int], np.ndarray] = {}


def make_optimizer(model: Decoder) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside and rename, so that a kill never leaves half a file."""
    beside = path.with_suffix(".partial")
    torch.save(state, beside)
    os.replace(beside, path)


def heldout_loss(model: Decoder, ids: np.ndarray, rows: int = 32) -> float:
    """A quick running estimate: mean loss of evenly spaced rows of the held-out split."""
    starts = np.linspace(0, len(ids) - SHORT - 2, rows).astype(int)
    batch = torch.from_numpy(np.stack([ids[s : s + SHORT + 1] for s in starts]).astype(np.int64))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return sum(float(model.loss(part)) for part in batch.split(8)) / (rows // 8)


def stage_train(work: Path, steps: int, save_every: int, compiled: bool, ranks: int) -> None:
    """Train in ``ranks`` processes of one thread each.

    Processes that meet once a step hold up far better on a busy machine than
    threads that meet after every operation.
    """
    meeting = work / "meeting"
    meeting.unlink(missing_ok=True)
    arguments = (ranks, meeting, work, steps, save_every, compiled)
    torch.multiprocessing.spawn(train_rank, arguments, nprocs=ranks)


def average_gradients(model: Decoder, ranks: int) -> None:
    """Replace every gradient by its mean over the processes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def train_rank(rank: int, ranks: int, meeting: Path, work: Path, steps: int, save_every: int, compiled: bool) -> None:
    """Train up to ``steps``, from the checkpoint if there is one; rank 0 reports and saves."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting.absolute()}", rank=rank, world_size=ranks, timeout=timedelta(days=1)
    )
    train_ids, held_ids = np.load(work / "train.npy"), np.load(work / "heldout.npy")
    model = Decoder(ModelConfig())
    optimizer = make_optimizer(model)
    schedule, first, seconds = Schedule(steps), 0, 0.0
    path = work / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        first, seconds = state["step"], state["seconds"]
        schedule = Schedule(**state["schedule"]).replanned(first, steps)
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,d} parameters, {len(train_ids):,d} training tokens, from step {first}, {schedule}", flush=True)
    loss_of = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    window, since, mark = 0.0, time.monotonic(), first
    for step in range(first, steps):
        rate = schedule.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch_of(train_ids, step, schedule.row_length(step))[rank::ranks]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(batch)
        loss.backward()
        average_gradients(model, ranks)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window += loss.item()
        done = step + 1
        if rank == 0 and done % 20 == 0:
            spent = time.monotonic() - since
            speed = (done - mark) * TOKENS_PER_STEP / spent
            print(
                f"{time.strftime('%T')} step {done}/{steps} loss {window / 20:.4f} "
                f"rate {rate:.2e} {speed:,.0f} tokens/s",
                flush=True,
            )
            seconds += spent
            window, since, mark = 0.0, time.monotonic(), done
        if rank == 0 and (done % save_every == 0 or done == steps):
            print(f"step {done} held-out loss {heldout_loss(model, held_ids):.4f}", flush=True)
            save_checkpoint(
                path,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                    "rng": torch.get_rng_state(),
                    "seconds": seconds,
                    "schedule": asdict(schedule),
                },
            )
            seconds += time.monotonic() - since
            since, mark = time.monotonic(), done
    dist.barrier()
    dist.destroy_process_group()


# --------------------------------------------------------------------------
# Export
# --------------------------------------------------------------------------


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of Transformers' Qwen3, in the older and the newer spelling."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn,
        "layer_types": ["full_attention"] * config.layers,
        "max_position_embeddings": config.max_positions,
        "max_window_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": config.eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def stage_export(work: Path, out: Path) -> None:
    """Write the checkpoint's weights in bf16 and all files that belong to them."""
    from safetensors.torch import save_file

    state = torch.load(work / "checkpoint.pt", weights_only=True)
    config = ModelConfig()
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor.to(torch.bfloat16).contiguous() for name, tensor in state["model"].items()}
    beside = out / "model.safetensors.partial"
    save_file(tensors, beside, metadata={"format": "pt"})
    beside.chmod(0o644)
    os.replace(beside, out / "model.safetensors")
    write_json(out / "config.json", hf_config(config))
    write_json(
        out / "generation_config.json",
        {
            "do_sample": True,
            "eos_token_id": 0,
            "max_new_tokens": 200,
            "temperature": 0.7,
            "top_p": 0.9,
        },
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": config.max_positions,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    for name in ("tokenizer.json", "heldout.txt"):
        (out / name).write_bytes((work / name).read_bytes())
    print(
        f"exported step {state['step']} of {state['schedule']['steps']}, "
        f"{state['step'] * TOKENS_PER_STEP:,d} tokens, {state['seconds'] / 3600:.2f} hours"
    )


# --------------------------------------------------------------------------
# Verification and samples
# --------------------------------------------------------------------------


def perplexity(model: nn.Module, ids: Tensor, window: int = 1024, stride: int = 512) -> float:
    """Sliding-window perplexity: each token once, with at least window - stride before it.

    The first window scores all its tokens but the first one; every further
    window starts ``stride`` later and scores only the tokens not scored yet.
    No special token is put in front.
    """
    total, count, scored = 0.0, 0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        logits = model(ids[None, begin:end])
        logits = getattr(logits, "logits", logits)[0]
        picked = F.cross_entropy(logits[scored - begin - 1 : -1].double(), ids[scored:end], reduction="sum")
        total, count, scored = total + float(picked), count + end - scored, end
        if end == len(ids):
            break
    return math.exp(total / count)


def stage_verify(out: Path) -> None:
    """Compare with Transformers on the exported files and measure perplexity."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    text = (out / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert tokenizer.decode(ids) == text
    ours = Decoder(ModelConfig())
    weights = load_file(out / "model.safetensors")
    ours.load_state_dict({k.removeprefix("model."): v.float() for k, v in weights.items()})
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        mine, other = ours(ids[None, :1024]), theirs(ids[None, :1024]).logits
        print(f"largest logit {other.abs().max():.3f}, largest difference {(mine - other).abs().max():.2e}")
        value = perplexity(theirs, ids)
    size = len(text.encode())
    print(
        f"held-out: {size:,d} bytes, {len(ids):,d} tokens, perplexity {value:.4f}, "
        f"{math.log2(value) * len(ids) / size:.4f} bits per byte"
    )


def stage_sample(out: Path, prompt: str, seed: int) -> None:
    """Print one sampled continuation, with the exported sampling defaults."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    print(tokenizer.decode(model.generate(ids)[0]))


STAGES = ("corpus", "tokenizer", "train", "export", "verify", "sample")


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description="Build the bundled demo model.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, help="work directory, outside the checkout")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="export directory")
    parser.add_argument("--steps", type=int, default=6000, help="last step of the schedule")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--ranks", type=int, default=2, help="training processes")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    parser.add_argument("--prompt", default="The following example shows how to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.work is None and options.stage in ("corpus", "tokenizer", "train", "export"):
        parser.error("--work is required for this stage")
    if options.stage == "corpus":
        stage_corpus(options.work)
    elif options.stage == "tokenizer":
        stage_tokenizer(options.work)
    elif options.stage == "train":
        stage_train(options.work, options.steps, options.save_every, not options.no_compile, options.ranks)
    elif options.stage == "export":
        stage_export(options.work, options.out)
    elif options.stage == "verify":
        stage_verify(options.out)
    else:
        stage_sample(options.out, options.prompt, options.seed)


if __name__ == "__main__":
    main()
