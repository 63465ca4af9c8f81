"""Finding and downloading models, against a local server that speaks the parts of the Hub's protocol a download needs.

huggingface_hub reads its environment when it is imported, so downloads run in a child process; several models per
child, because starting one takes a second.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from engine.errors import InvalidArgument, ModelNotFound
from engine.weights import locate as locate_module
from engine.weights.aliases import ALIASES
from engine.weights.checkpoint import Checkpoint
from engine.weights.locate import DEMO_DIRECTORY, ModelLocation, locate
from engine.weights.write import save_safetensors

ROOT = Path(__file__).resolve().parent.parent
DRIVER = """
import json, sys
from engine.errors import EngineError
from engine.weights.locate import locate
answers = []
for model, revision in json.loads(sys.argv[1]):
    try:
        found = locate(model, revision=revision)
        answers.append({"path": str(found.path), "name": found.name, "revision": found.revision, "note": found.note})
    except EngineError as problem:
        answers.append({"error": type(problem).__name__, "message": str(problem)})
print(json.dumps(answers))
"""

UNWANTED = (
    *("modeling_x.py", "pytorch_model.bin", "README.md"),
    *("consolidated.safetensors", "original/model.safetensors", "onnx/config.json"),
)


def safetensors_bytes(tmp: Path, **tensors: np.ndarray) -> bytes:
    save_safetensors(tmp / "t.safetensors", tensors)
    return (tmp / "t.safetensors").read_bytes()


class Hub(ThreadingHTTPServer):
    """repositories: id -> {path: content}; faults: id -> what goes wrong. Every request is noted."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]], faults: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.faults = repositories, faults
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @staticmethod
    def commit(repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, kind, revision = found.groups()
            self.answer_api(repo, kind, revision or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.answer_file(*found.groups())
        else:
            self.send(404, b"")

    def answer_api(self, repo: str, kind: str | None, revision: str) -> None:
        fault = self.server.faults.get(repo)
        if fault == "private":
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if fault == "token":
            return self.send(401, b'{"error": "Invalid credentials in Authorization header"}')
        if fault == "busy":
            return self.send(503, b"busy")
        if fault == "forbidden":
            return self.send(403, b'{"error": "no"}')
        if fault == "portal":
            return self.send(200, b"<html>please log in to this network</html>")
        if repo not in self.server.repositories:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", Hub.commit(repo)):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.server.repositories[repo]
        tree = [{"type": "file", "path": p, "size": len(d), "oid": etag(d)} for p, d in files.items()]
        info = {"id": repo, "modelId": repo, "sha": Hub.commit(repo), "siblings": [{"rfilename": p} for p in files]}
        self.send(200, json.dumps(tree if kind == "tree" else info).encode(), {"Content-Type": "application/json"})

    def answer_file(self, repo: str, revision: str, path: str) -> None:
        fault, data = self.server.faults.get(repo), self.server.repositories[repo][path]
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": Hub.commit(repo), "Accept-Ranges": "bytes"}
        if fault == "gated":
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        if self.command == "GET" and fault == "short" and path.endswith(".safetensors"):
            return self.send(200, data[:-9], headers)
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            begin = int(start[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return self.send(206, data[begin:], headers)
        if self.command == "GET" and fault == "cut" and path.endswith(".safetensors"):
            self.server.faults.pop(repo)  # once
            return self.send(200, data, headers, cut=len(data) // 2)
        self.send(200, data, headers)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("content")
    weights = safetensors_bytes(tmp, w=np.arange(6, dtype=np.float32))
    shards = [safetensors_bytes(tmp, a=np.ones(3, np.float32)), safetensors_bytes(tmp, b=np.zeros(2, np.float32))]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode()
    base = {"config.json": b"{}", "tokenizer.json": b"{}", "chat_template.jinja": b"x", "merges.txt": b"a b"}
    model = base | {"model.safetensors": weights}
    repositories = {
        "tiny/model": model | dict.fromkeys(UNWANTED, b"unwanted"),
        "tiny/sharded": base | {"model.safetensors.index.json": index, names[0]: shards[0], names[1]: shards[1]},
        "tiny/lacking": base | {"model.safetensors.index.json": index, names[0]: shards[0]},
        "tiny/pickle": base | {"pytorch_model.bin": b"x"},
        "tiny/bare": {"model.safetensors": weights},
        ALIASES["qwen3-0.6b"].repo: model,
    } | {f"tiny/{fault}": model for fault in ("gated", "short", "cut")}
    faults = {f"tiny/{f}": f for f in ("gated", "private", "token", "busy", "forbidden", "portal", "short", "cut")}
    server = Hub(repositories, faults)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(home: Path, endpoint: str, *questions: str | tuple[str, str], **environment: str) -> tuple[list[dict], str]:
    """What `locate` answers in a process of its own, and what that process wrote to stderr."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING")) and not key.lower().endswith("_proxy")
    }
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    models = [question if isinstance(question, tuple) else (question, None) for question in questions]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(models)],
        env=inherited | settings | environment,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert all("\n" not in answer.get("message", "") for answer in answers)
    return answers, done.stderr


class Downloaded(NamedTuple):
    home: Path  # HF_HOME of a cache that now holds the models
    answers: list[dict]
    errors: str  # stderr
    requests: list[str]


@pytest.fixture(scope="module")
def downloaded(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("work") / "hf"
    hub.requests.clear()
    models = ("tiny/model", "tiny/sharded", ("tiny/model", "v1"), "qwen3-0.6b", "tiny/cut", "tiny/cut")
    answers, errors = ask(home, hub.url, *models)
    return Downloaded(home, answers, errors, list(hub.requests))


@pytest.fixture(scope="module")
def home(downloaded):
    return downloaded.home


def test_download_and_use(downloaded):
    model, sharded, tagged, alias, cut, again = downloaded.answers
    assert model["name"] == "tiny/model" and model["revision"] == Hub.commit("tiny/model")
    assert sorted(p.name for p in Path(model["path"]).iterdir()) == [
        "chat_template.jinja", "config.json", "merges.txt", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert np.array_equal(Checkpoint(model["path"]).tensor("w"), np.arange(6, dtype=np.float32))
    assert set(Checkpoint(sharded["path"]).names()) == {"a", "b"}
    assert tagged == model
    assert alias["name"] == "Qwen/Qwen3-0.6B" and alias["note"] == "qwen3-0.6b = Qwen/Qwen3-0.6B (instruct)"
    assert cut == again or "run again to resume" in cut["message"]  # the library of today retries by itself
    assert Checkpoint(again["path"]).names() == ("w",)
    fetched = {path.split("/resolve/")[1].split("/", 1)[1] for path in downloaded.requests if "/resolve/" in path}
    assert "model.safetensors" in fetched and not fetched & set(UNWANTED)
    assert "%|" not in downloaded.errors  # stderr is no terminal: no progress bar


def test_cache_serves_without_network(home, hub):
    hub.requests.clear()
    answers, _ = ask(
        home, hub.url, "tiny/model", ("tiny/model", "v1"), "tiny/other", ("tiny/model", "v2"), HF_HUB_OFFLINE="1"
    )
    assert hub.requests == []
    assert [answer.get("name") for answer in answers] == ["tiny/model", "tiny/model", None, None]
    for answer in answers[2:]:
        assert answer["error"] == "ModelNotFound"
        assert "HF_HUB_OFFLINE forbids downloads" in answer["message"] and str(home / "hub") in answer["message"]


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_cache_serves_while_the_hub_is_down(home):
    url = f"http://127.0.0.1:{unused_port()}"
    (cached, other), _ = ask(home, url, "tiny/model", "tiny/other")
    assert cached["name"] == "tiny/model"
    assert other["error"] == "ModelNotFound"
    for part in ("tiny/other", url, "cannot be reached", "HF_ENDPOINT", "pass a directory", "refused"):
        assert part in other["message"]


def test_partial_cache_is_noticed(home):
    snapshot = next((home / "hub").glob("models--tiny--sharded/snapshots/*"))
    shard = snapshot / "model-00002-of-00002.safetensors"
    target = os.readlink(shard)
    shard.unlink()
    try:
        (answer,), _ = ask(home, "http://127.0.0.1:9", "tiny/sharded", HF_HUB_OFFLINE="1")
    finally:
        shard.symlink_to(target)
    assert answer["error"] == "ModelNotFound" and "tiny/sharded" in answer["message"]
    assert "not completely in the cache" in answer["message"] or "lacks 1 of" in answer["message"]


REFUSALS = {
    "tiny/nothing": ["no such repository at", "HF_TOKEN"],
    "tiny/private": ["no such repository at", "HF_TOKEN"],
    "tiny/gated": ["tiny/gated is gated", "accept its terms", "HF_TOKEN"],
    "tiny/token": ["refuses access to tiny/token (HTTP 401)", "HF_TOKEN"],
    "tiny/forbidden": ["refuses access to tiny/forbidden (HTTP 403)", "HF_TOKEN"],
    "tiny/busy": ["HTTP 503", "try again later"],
    "tiny/portal": ["downloading tiny/portal from", "failed"],
    "tiny/short": ["downloading tiny/short", "run again"],
    "tiny/lacking": ["lacks 1 of tiny/lacking's files, model-00002-of-00002.safetensors"],
    "tiny/pickle": ["tiny/pickle has neither model.safetensors nor model.safetensors.index.json"],
    "tiny/bare": ["lacks 1 of tiny/bare's files, config.json"],
    "tiny/bad name!": ["neither a directory nor a possible repository id"],
    "tiny--x/..y": ["neither a directory nor a possible repository id"],
    "llama-3.1-8b": ["no such repository", "meta-llama/Llama-3.1-8B-Instruct"],
}


def test_refusals_say_what_to_do(hub, tmp_path):
    answers, _ = ask(tmp_path / "hf", hub.url, *REFUSALS, ("tiny/model", "v9"))
    for answer, (model, parts) in zip(answers, [*REFUSALS.items(), ("", ["no revision 'v9'"])], strict=True):
        assert answer.get("error") == "ModelNotFound", (model, answer)
        for part in parts:
            assert part in answer["message"], (model, answer)


def test_unusable_cache(hub, tmp_path):
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    (answer,), _ = ask(tmp_path / "hf", hub.url, "tiny/model", HF_HUB_CACHE=cache)
    assert answer["error"] == "ModelNotFound" and f"the cache {cache} cannot be used" in answer["message"]


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://host", "http://", "http://[::", "http://host:x"])
def test_malformed_endpoint(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ModelNotFound, match=f"HF_ENDPOINT='{re.escape(endpoint)}' is not"):
        locate("tiny/x")


@pytest.mark.parametrize(
    "problem, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left in .* set HF_HUB_CACHE to another"),
        (OSError(errno.EROFS, "Read-only file system"), r"cannot be used \(Read-only file system\): set HF_HUB_CACHE"),
        (PermissionError(errno.EACCES, "Permission denied"), r"cannot be used \(Permission denied\)"),
        (OSError("Consistency check failed: 3 bytes\nmore"), "run again to resume: Consistency check failed: 3 bytes$"),
        (RuntimeError("transport broke"), "downloading tiny/x .* failed, run again to resume: transport broke"),
    ],
)
def test_failures_that_need_an_injured_machine(monkeypatch, problem, message):
    import huggingface_hub

    def fail(*args: object, **options: object) -> str:
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFound, match=message) as caught:
        locate("tiny/x", progress=False)
    assert caught.value.__cause__ is problem


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal, progress", [(True, True), (True, False), (False, True)])
def test_progress_bar_on_terminals_only(monkeypatch, terminal, progress):
    import huggingface_hub

    monkeypatch.setattr(sys, "stderr", Screen(terminal))

    def download(*args: object, tqdm_class: type, **options: object) -> str:
        for _ in tqdm_class(range(3), desc="files"):
            pass
        raise RuntimeError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelNotFound):
        locate("tiny/x", progress=progress)
    assert ("files: 100%" in sys.stderr.getvalue()) == (terminal and progress)


def test_directories_come_before_repositories_and_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("owner/name", "qwen3-8b", "own"):
        (tmp_path / name).mkdir(parents=True)
        assert locate(name) == ModelLocation(Path(name), name)
    assert locate("~/own").path == tmp_path / "own"
    assert locate(str(tmp_path)).path == tmp_path
    with pytest.raises(InvalidArgument, match="revision 'main' cannot be chosen"):
        locate("own", revision="main")


def test_bundled_model(tmp_path, monkeypatch):
    monkeypatch.setattr(locate_module, "DEMO_DIRECTORY", tmp_path)
    with pytest.raises(ModelNotFound, match="bundled model is missing"):
        locate("demo")
    (tmp_path / "config.json").write_text("{}")
    assert locate("demo") == ModelLocation(tmp_path, "demo")
    with pytest.raises(InvalidArgument, match="revision"):
        locate("demo", revision="main")
    assert DEMO_DIRECTORY.parent == Path(locate_module.__file__).resolve().parent


@pytest.mark.parametrize("model", ["./none", "/none/such", "../none", "~/none", "a/b/c", "none/", ".", "a\0b"])
def test_paths_that_are_no_directories_are_not_looked_up(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    if model == ".":
        assert locate(model).path == Path(".")
        return
    with pytest.raises(ModelNotFound, match="is not a directory"):
        locate(model)


def test_unknown_names_suggest_known_ones():
    with pytest.raises(ModelNotFound, match="did you mean .*qwen2.5-7b"):
        locate("qwen25-7b")
    with pytest.raises(ModelNotFound, match="did you mean demo"):
        locate("dem")
    with pytest.raises(ModelNotFound, match="short names: demo, .*qwen3-8b"):
        locate("zzzzzz")
    with pytest.raises(ModelNotFound):
        locate("")


def test_table_of_short_names():
    assert ALIASES["qwen2.5-7b"] == ("Qwen/Qwen2.5-7B-Instruct", "instruct")
    assert ALIASES["qwen2.5-7b-base"] == ("Qwen/Qwen2.5-7B", "base")
    assert ALIASES["qwen3-8b-base"] == ("Qwen/Qwen3-8B-Base", "base")
    assert ALIASES["llama-2-7b-chat"] == ALIASES["llama-2-7b"]
    for name, alias in ALIASES.items():
        assert name == name.lower() and re.fullmatch(r"[\w-]+/[\w.-]+", alias.repo)
        assert alias.kind == ("base" if name.endswith("-base") else "instruct")
        base = ALIASES.get(f"{name}-base")
        assert base is None or base.repo != alias.repo
    assert len({alias.repo for alias in ALIASES.values()}) == sum(  # nothing entered twice
        not name.endswith(("-instruct", "-chat")) for name in ALIASES
    )
