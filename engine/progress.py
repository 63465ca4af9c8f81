"""Progress bars: on stderr, and only where a person can see them move."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A function update(done, total), in bytes, that draws a bar if `shown` and stderr is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from tqdm import tqdm  # most programs never show a bar

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
