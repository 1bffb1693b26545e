# SPDX-License-Identifier: Apache-2.0
"""Worker processes that do not outlive the one that started them."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
  """To be called in a worker process when it starts.

  A parent that is killed tells nobody, and its workers would wait for ever,
  and keep their memory.
  """
  parent = multiprocessing.parent_process()
  assert parent is not None
  threading.Thread(
      target=lambda: (parent.join(), os._exit(1)), daemon=True
  ).start()
