"""Find a model: the bundled one, a directory, a repository on the Hugging Face Hub, or a short name for one.

Downloads go through huggingface_hub into its cache, so HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
mean what they mean elsewhere. Only data are fetched (JSON, safetensors, templates), never code. The library is loaded
when a download is asked for and not before. What the files contain is checked by those who read them.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.errors import InvalidArgument, ModelNotFound
from engine.weights.aliases import ALIASES
from engine.weights.checkpoint import INDEX, SINGLE, read_weight_map

DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).resolve().parent / DEMO
# Patterns match whole paths: the second list keeps out copies of the weights in subdirectories (onnx/, original/),
# the first keeps out those beside them (consolidated.safetensors).
_WANTED = ("*.json", "*.jinja", "merges.txt", "model*.safetensors")
_UNWANTED = ("*/*",)


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """A model's files on this machine."""

    path: Path  # the directory
    name: str  # "demo", the repository's id, or the directory as it was given
    revision: str | None = None  # the downloaded commit
    note: str = ""  # how the name was understood, where that needs saying


def locate(model: str, *, revision: str | None = None, progress: bool = True) -> ModelLocation:
    """Where `model` is, after downloading what is missing.

    model: "demo", a directory, a repository id ("Qwen/Qwen3-8B") or a short name ("qwen3-8b"), tried in this order.
    revision: branch, tag or commit of a repository.
    progress: show a bar on stderr while downloading, if stderr is a terminal.
    Raises ModelNotFound, saying what to do; InvalidArgument for a revision of something that has none.
    """
    if model == DEMO or _is_directory(model):
        if revision is not None:
            raise InvalidArgument(f"revision {revision!r} cannot be chosen: {model!r} is not downloaded")
        return _bundled() if model == DEMO else ModelLocation(Path(model).expanduser(), model)
    if model.lower() in ALIASES:
        alias = ALIASES[model.lower()]
        note = f"{model} = {alias.repo} ({alias.kind})"
        return _downloaded(alias.repo, revision, progress, note)
    if _looks_like_path(model):
        raise ModelNotFound(f"{model!r} is not a directory")
    if "/" not in model:
        raise ModelNotFound(f"no directory, repository (owner/name) or short name {model!r}{_suggestions(model)}")
    return _downloaded(model, revision, progress, "")


def _is_directory(model: str) -> bool:
    try:
        return bool(model) and Path(model).expanduser().is_dir()
    except (ValueError, RuntimeError):  # a NUL in the name; no home to expand "~" to
        return False


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "~", "/", os.sep)) or model.count("/") > 1 or model.endswith("/") or "\0" in model


def _suggestions(model: str) -> str:
    names = [DEMO, *ALIASES]
    close = get_close_matches(model.lower(), names, n=4, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else f"; short names: {', '.join(_short_names())}"


def _short_names() -> Iterator[str]:
    yield DEMO
    yield from (name for name in ALIASES if not name.endswith(("-base", "-instruct", "-chat")))


def _bundled() -> ModelLocation:
    if not (DEMO_DIRECTORY / "config.json").is_file():
        raise ModelNotFound(f"the bundled model is missing from this installation: no config.json in {DEMO_DIRECTORY}")
    return ModelLocation(DEMO_DIRECTORY, DEMO)


def _downloaded(repo: str, revision: str | None, progress: bool, note: str) -> ModelLocation:
    _check_endpoint(os.environ.get("HF_ENDPOINT", ""))
    import huggingface_hub  # takes a tenth of a second, which local models need not pay
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its HTTP client's, whichever that is

    try:
        path = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
                tqdm_class=_bar_class(progress),
            )
        )
    # What the library lets through: its own errors (OSError, ValueError), those of its HTTP client (HTTPError; OSError
    # in releases before 1.0), of the cache's file system (OSError) and of the Xet transport (RuntimeError).
    except (OSError, ValueError, RuntimeError, HTTPError) as problem:
        raise ModelNotFound(_explain(problem, repo, revision)) from problem
    _check_complete(path, repo)
    return ModelLocation(path, repo, path.name, note)


def _check_endpoint(endpoint: str) -> None:
    """Refuse what the library would fail on while it is imported."""
    try:
        parts = urlsplit(endpoint)
        usable = not endpoint or (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        usable = False
    if not usable:
        raise ModelNotFound(f"HF_ENDPOINT={endpoint!r} is not the http or https address of a model hub")


def _bar_class(progress: bool) -> type[Any]:
    """The library's progress bar, shown on a terminal only (its own choice differs from bar to bar)."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    shown = progress and sys.stderr is not None and sys.stderr.isatty()

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": not shown})  # type: ignore[no-untyped-call]

    return Bar


def _check_complete(path: Path, repo: str) -> None:
    """Refuse a partial copy: cached files are used without asking when the Hub is out of reach."""
    if not (path / SINGLE).is_file() and not (path / INDEX).is_file():
        raise ModelNotFound(f"{repo} has neither {SINGLE} nor {INDEX} (in {path}): no other weights are read")
    weight_map = read_weight_map(path) or {}
    absent = [name for name in ("config.json", *dict.fromkeys(weight_map.values())) if not (path / name).is_file()]
    if absent:
        raise ModelNotFound(
            f"{path} lacks {len(absent)} of {repo}'s files, {absent[0]} first: if the download was interrupted, "
            "run again with network access"
        )


def _explain(problem: BaseException, repo: str, revision: str | None) -> str:
    """One sentence for the user: what went wrong and what to do about it."""
    from huggingface_hub import constants, errors

    hub, what = constants.ENDPOINT, f"{repo} (revision {revision})" if revision else repo
    causes = tuple(_causes(problem))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.HFValidationError):
        return f"{repo!r} is neither a directory nor a possible repository id (owner/name)"
    if caused_by(errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {hub}/{repo} and set HF_TOKEN to a token of that account"
    if caused_by(errors.RepositoryNotFoundError):
        return f"no directory {repo!r} here and no such repository at {hub}; for a private one set HF_TOKEN"
    if caused_by(errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r} at {hub}"
    if caused_by(errors.OfflineModeIsEnabled):
        return (
            f"{what} is not completely in the cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE forbids downloads: "
            "unset it, or pass a directory that holds the model"
        )
    status = next((code for cause in causes if (code := _status(cause)) is not None), None)
    if status in (401, 403):
        return f"{hub} refuses access to {what} (HTTP {status}): set HF_TOKEN to a token that may read it"
    if status is not None:
        return f"{what} is not cached and {hub} answered HTTP {status}: try again later, or set HF_ENDPOINT to a mirror"
    if type(problem) in _DISK_ERRORS:
        return _explain_disk(problem, what, constants.HF_HUB_CACHE)
    if isinstance(problem, errors.LocalEntryNotFoundError):
        return (
            f"{what} is not completely in the cache {constants.HF_HUB_CACHE} and {hub} cannot be reached: connect, "
            f"set HF_ENDPOINT to a mirror, or pass a directory that holds the model ({_first_line(causes[-1])})"
        )
    return f"downloading {what} from {hub} failed, run again to resume: {_first_line(problem)}"


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__


def _status(problem: BaseException) -> int | None:
    """The HTTP status that an error of the library or its HTTP client carries."""
    return getattr(getattr(problem, "response", None), "status_code", None)


# Exact types: the subclasses of OSError outside this list belong to sockets and libraries.
_DISK_ERRORS = (OSError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError, FileNotFoundError)


def _explain_disk(problem: BaseException, what: str, cache: str) -> str:
    assert isinstance(problem, OSError)
    if problem.errno is None:  # the library's own complaint about an incomplete file
        return f"downloading {what} failed, run again to resume: {_first_line(problem)}"
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {cache} for {what}: free some, or set HF_HUB_CACHE to another directory"
    return f"the cache {cache} cannot be used ({problem.strerror}): set HF_HUB_CACHE to a writable directory"


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__
