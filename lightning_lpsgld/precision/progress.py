"""Progress of a pass over the data that the Trainer knows nothing of, beside its own bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

__all__ = ["tracked"]


def tracked(bar: ProgressBar | None, loader: DataLoader, description: str) -> Iterable[Any]:
    """The batches of ``loader``, counted under the progress bar of a trainer if that is tqdm's or rich's.

    Args:
        bar: The progress bar; ``None`` where there is none, and on other ranks than zero.
        loader: A loader of known length.
        description: Shown before the bar.

    Returns:
        The same batches; ``loader`` itself where there is nothing to show.
    """
    if not isinstance(bar, (RichProgressBar, TQDMProgressBar)) or bar.is_disabled:
        return loader
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        return _under_rich(bar, loader, description)
    if isinstance(bar, TQDMProgressBar):
        from tqdm.auto import tqdm

        batches: Iterable[Any] = tqdm(loader, desc=description, leave=False, position=1)
        return batches
    return loader


def _under_rich(bar: RichProgressBar, loader: DataLoader, description: str) -> Iterator[Any]:
    """A task in the bar's own display, hidden when it is over; the next pass takes the same one.

    It is never removed: the bar finds its tasks by their place in the list.
    """
    progress: Any = bar.progress
    task = next((t.id for t in progress.tasks if t.description == description), None)
    if task is None:
        task = progress.add_task(description, total=len(loader))
    progress.reset(task, total=len(loader), visible=True)
    try:
        for batch in loader:
            yield batch
            progress.advance(task)
            bar.refresh()
    finally:
        progress.update(task, visible=False)
        bar.refresh()
