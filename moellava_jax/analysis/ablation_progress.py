# SPDX-License-Identifier: Apache-2.0
"""What a grid says while it runs: a bar in a terminal, lines elsewhere."""

import threading
import time


class Progress:
  """Cells finished and left, and since when; a context manager."""

  def __init__(self, cells: int, finished: int):
    from rich import console, progress

    self._console = console.Console(stderr=True, highlight=False)
    self._bar = progress.Progress(
        progress.TextColumn('{task.description}'),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn('left'),
        progress.TimeRemainingColumn(),
        console=self._console,
    )
    self._task = self._bar.add_task('cells', total=cells, completed=finished)
    self._lock = threading.Lock()
    self._began = {}
    self._cells, self._finished = cells, finished

  def __enter__(self) -> 'Progress':
    if self._console.is_terminal:
      self._bar.start()
    return self

  def __exit__(self, *error) -> None:
    self._bar.stop()

  def say(self, name: str, state: str, is_cell: bool) -> None:
    """A job has begun (`running`), or ended (`done`, `failed`)."""
    with self._lock:
      now = time.monotonic()
      if state == 'running':
        self._began[name] = now
        text = f'{name}: running'
      else:
        took = now - self._began.get(name, now)
        text = f'{name}: {state} after {took:.0f} s'
        if is_cell:
          self._finished += 1
          self._bar.advance(self._task)
          text += f'; {self._finished} of {self._cells} cells'
      self._console.print(text, markup=False)
