"""A progress bar of rows, with tokens per second and the time left."""

import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """
    Rows done out of all rows of this process, on standard error. To be used as a context manager.

    Rows that were there at the start count as done, not as fast: rates and the time left follow from what is done now.

    Args:
        description (`str`):
            What is being done.
        total_rows (`int`):
            Rows of this process.
        done_rows (`int`, *optional*, defaults to `0`):
            Rows that were on disk at the start.
        show (`bool`, *optional*, defaults to `True`):
            Whether to print anything.

    Attributes:
        num_tokens (`int`): Completion tokens so far.
    """

    def __init__(self, description: str, total_rows: int, done_rows: int = 0, *, show: bool = True) -> None:
        self.num_tokens = 0
        self._started = time.perf_counter()
        self._bar = tqdm(
            total=total_rows, initial=done_rows, desc=description, unit=" rows", disable=not show, smoothing=0.05
        )

    def update(self, rows: int, tokens: int) -> None:
        """Count rows and their completion tokens."""
        self.num_tokens += tokens
        self._bar.set_postfix_str(f"{self.tokens_per_second:,.0f} tokens/s", refresh=False)
        self._bar.update(rows)

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens per second since the start."""
        return self.num_tokens / max(time.perf_counter() - self._started, 1e-9)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
