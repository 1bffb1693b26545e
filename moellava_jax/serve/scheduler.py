# SPDX-License-Identifier: Apache-2.0
"""Many conversations, one engine: who waits, who has a slot, who is done.

One thread owns the engine. Others hand it requests (`submit`), change their
minds (`cancel`) and are called back with pieces of the answer, from that thread.
"""

import collections
from collections.abc import Callable, Sequence
import threading
import time
from typing import NamedTuple

from absl import logging

from moellava_jax.infer import engine as engine_lib
from moellava_jax.infer import generate, sampling, streaming


class FullError(Exception):
  """The queue is full."""


class ClosedError(Exception):
  """The scheduler is not ready yet, is closing, or has failed."""


class Piece(NamedTuple):
  """A part of an answer, the last one if it has a finish reason or an error."""

  text: str
  new_tokens: int  # So far.
  finish_reason: str | None  # 'stop', 'length' or 'cancelled'.
  error: Exception | None

  @property
  def last(self) -> bool:
    return self.finish_reason is not None or self.error is not None


CANCELLED = Piece('', 0, 'cancelled', None)


class Job:
  """A request on its way; only the scheduler looks inside."""

  def __init__(
      self,
      prompt: generate.Prompt,
      options: sampling.Options,
      max_new_tokens: int,
      stop: Sequence[str],
      deliver: Callable[[Piece], None],
  ):
    self.prompt = prompt
    self.options = options
    self.max_new_tokens = max_new_tokens
    self.stop = tuple(stop)
    self.deliver = deliver
    self.cancelled = False
    self.submitted = time.monotonic()
    self.stream: streaming.TextStream | None = None


class Observer:
  """What happens, for those who count it; called from several threads."""

  def began(self, waited: float, prompt_tokens: int) -> None:
    """A job has its first token `waited` seconds after it was submitted."""

  def ended(self, reason: str, new_tokens: int, seconds: float) -> None:
    """A job is over: 'stop', 'length', 'cancelled' or 'error'."""


class Scheduler:
  """Answers jobs in the order in which they come, `engine.slots` at a time.

  Attributes:
    ready: warmed up, and neither closing nor failed.
    failure: what ended the engine's thread, if that was not `close`.
  """

  def __init__(
      self,
      engine: engine_lib.Engine,
      tokenizer,
      *,
      queue: int,
      warm_up: Sequence[Callable[[], None]],
      observer: Observer | None = None,
  ):
    """Takes the engine over; `start` sets it to work.

    Args:
      engine: nobody else uses it from now on.
      tokenizer: of the model.
      queue: jobs that may wait for a slot.
      warm_up: what is called first, in the engine's thread.
      observer: is told what happens.
    """
    self.failure: BaseException | None = None
    self._engine, self._tokenizer = engine, tokenizer
    self._queue, self._warm_up = queue, warm_up
    self._observer = observer or Observer()
    self._on_failure: Callable[[], None] | None = None
    self._changed = threading.Condition()
    # Under the lock:
    self._waiting: collections.deque[Job] = collections.deque()
    self._warm = self._closing = False
    self._entering: Job | None = None  # Between the queue and its slot.
    # Of the engine's thread; others only look at its length.
    self._running: dict[int, Job] = {}
    self._thread = threading.Thread(
        target=self._main, name='engine', daemon=True
    )

  def start(self, on_failure: Callable[[], None] | None = None) -> None:
    """Starts the engine's thread; `on_failure` is called once if it fails."""
    self._on_failure = on_failure
    self._thread.start()

  @property
  def ready(self) -> bool:
    return self._warm and not self._closing and self.failure is None

  @property
  def waiting(self) -> int:
    return len(self._waiting)

  @property
  def running(self) -> int:
    return len(self._running)

  def submit(
      self,
      prompt: generate.Prompt,
      options: sampling.Options,
      *,
      max_new_tokens: int,
      stop: Sequence[str],
      deliver: Callable[[Piece], None],
  ) -> Job:
    """Queues a request.

    Args:
      prompt: shorter than the engine's context.
      options: how tokens are chosen.
      max_new_tokens: at least 1; fewer if the slot has no room for them.
      stop: texts that end the answer.
      deliver: gets every piece, from another thread, and must be quick. The
        last one has a finish reason or an error.

    Raises:
      FullError: as many wait as may.
      ClosedError: not ready.
    """
    job = Job(prompt, options, max_new_tokens, stop, deliver)
    with self._changed:
      if not self.ready:
        raise ClosedError
      # Those that will be let in at the next step do not wait for others.
      taken = len(self._running) + (self._entering is not None)
      free = self._engine.slots - taken
      if len(self._waiting) >= self._queue + free:
        raise FullError
      self._waiting.append(job)
      self._changed.notify()
    return job

  def cancel(self, job: Job) -> None:
    """Ends a job wherever it is; one that is over stays as it is."""
    with self._changed:
      job.cancelled = True
      if job not in self._waiting:
        return  # The engine's thread sees the mark before its next step.
      self._waiting.remove(job)
    self._end(job, 'cancelled')

  def close(self, timeout: float | None = None) -> bool:
    """Refuses new jobs, finishes the others and ends the thread.

    Returns:
      whether it has ended within `timeout` seconds.
    """
    with self._changed:
      self._closing = True
      self._changed.notify()
    self._thread.join(timeout)
    return not self._thread.is_alive()

  def _main(self) -> None:
    try:
      for step in self._warm_up:
        if self._closing:
          return
        step()
      self._warm = True
      while self._turn():
        pass
    except Exception as error:
      # What the slots hold is unknown now; a new process is the way out.
      logging.exception('The engine failed.')
      self._fail(error)

  def _fail(self, error: Exception) -> None:
    with self._changed:
      self.failure = error
      lost = [*self._running.values(), *self._waiting]
      if self._entering is not None:
        lost.append(self._entering)
      self._running.clear()
      self._waiting.clear()
    for job in lost:
      self._end(job, 'error', error)
    if self._on_failure is not None:
      self._on_failure()

  def _turn(self) -> bool:
    """Lets jobs in and takes one step; False when there is nothing left."""
    with self._changed:
      while not (self._waiting or self._running):
        if self._closing:
          return False
        self._changed.wait()
    self._drop_cancelled()
    # As often as there are slots, so that answers of one token, which never
    # take a slot, do not keep the others from theirs.
    for _ in range(self._engine.slots):
      if len(self._running) == self._engine.slots or not self._admit():
        break
    if self._running:
      tokens = self._engine.step()
      for slot, job in list(self._running.items()):
        if not self._push(job, int(tokens[slot])):
          self._free(slot)
    return True

  def _drop_cancelled(self) -> None:
    for slot, job in list(self._running.items()):
      if job.cancelled:
        self._free(slot)
        self._end(job, 'cancelled')

  def _free(self, slot: int) -> None:
    del self._running[slot]
    self._engine.free(slot)

  def _admit(self) -> bool:
    """Gives the first of the queue a slot; False if nobody waits."""
    with self._changed:
      if not self._waiting:
        return False
      job = self._entering = self._waiting.popleft()
    self._enter(job)  # If that fails, `_fail` ends the job.
    self._entering = None
    return True

  def _enter(self, job: Job) -> None:
    if job.cancelled:
      self._end(job, 'cancelled')
      return
    try:
      prefix = self._engine.prefill(job.prompt, job.options)
    except Exception as error:  # The slots are as they were.
      logging.exception('A prompt could not be read.')
      self._end(job, 'error', error)
      return
    self._observer.began(
        time.monotonic() - job.submitted, len(job.prompt.tokens_L)
    )
    job.stream = streaming.TextStream(
        self._tokenizer,
        stop=job.stop,
        max_new_tokens=min(job.max_new_tokens, prefix.room),
    )
    if self._push(job, prefix.token):
      slot = min(set(range(self._engine.slots)) - self._running.keys())
      self._engine.insert(prefix, slot)
      self._running[slot] = job

  def _push(self, job: Job, token: int) -> bool:
    """Hands a token on; False if the answer ends with it."""
    assert job.stream is not None
    text = job.stream.push(token)
    if job.stream.finish_reason is not None:
      self._end(job, job.stream.finish_reason, text=text)
      return False
    # The first also without a text: it says that the answer has begun.
    if text or job.stream.new_tokens == 1:
      self._deliver(job, Piece(text, job.stream.new_tokens, None, None))
    return True

  def _end(
      self,
      job: Job,
      reason: str,
      error: Exception | None = None,
      text: str = '',
  ) -> None:
    new_tokens = 0 if job.stream is None else job.stream.new_tokens
    self._observer.ended(reason, new_tokens, time.monotonic() - job.submitted)
    finish = None if error is not None else reason
    self._deliver(job, Piece(text, new_tokens, finish, error))

  def _deliver(self, job: Job, piece: Piece) -> None:
    try:
      job.deliver(piece)
    except Exception:  # One who cannot listen must not end the others' answers.
      logging.exception('A piece of an answer could not be delivered.')
      job.cancelled = True
