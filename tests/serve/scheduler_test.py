# SPDX-License-Identifier: Apache-2.0
"""Order, bounds and faults of the scheduler."""

import queue
import threading

import numpy as np
import pytest

from moellava_jax.infer import chat as chat_lib
from moellava_jax.infer import engine as engine_lib
from moellava_jax.infer import sampling
from moellava_jax.serve import scheduler as scheduler_lib
from tests.serve import serving


@pytest.fixture
def gated(chat):
  return serving.Gated(
      chat, slots=serving.OPTIONS.slots, context=serving.OPTIONS.context
  )


@pytest.fixture
def scheduler(gated, chat):
  found = scheduler_lib.Scheduler(gated, chat.tokenizer, queue=3, warm_up=())
  found.start()
  serving.until(lambda: found.ready, 300)
  gated.gated = True
  yield found
  gated.open()
  assert found.close(60)


def _submit(scheduler, chat, pieces, *, text='left ?', most=8, deliver=None):
  request = chat_lib.Request((('human', text),), ())
  return scheduler.submit(
      chat.encode(request),
      sampling.Options(),
      max_new_tokens=most,
      stop=(),
      deliver=deliver or pieces.put,
  )


def _reason(pieces: queue.Queue) -> str | None:
  while not (piece := pieces.get(timeout=60)).last:
    pass
  return piece.finish_reason


def test_slots_are_given_in_the_order_of_coming(scheduler, gated, chat):
  order = []

  def listener(n):
    return lambda piece: order.append(n) if n not in order else None

  ended = queue.Queue()
  for n in range(7):
    _submit(scheduler, chat, None, deliver=listener(n))
  serving.until(lambda: scheduler.waiting == 6)
  with pytest.raises(scheduler_lib.FullError):
    _submit(scheduler, chat, ended)
  gated.let_in(scheduler, 7)
  assert (scheduler.running, scheduler.waiting) == (4, 3)
  with pytest.raises(scheduler_lib.FullError):
    _submit(scheduler, chat, ended)
  gated.open()
  serving.until(lambda: not (scheduler.running or scheduler.waiting))
  assert order == list(range(7))


def test_a_mixture_of_lengths_is_answered_as_each_alone(
    scheduler, gated, chat, alone
):
  gated.open()
  asked = [(text, most) for text in ('left ?', 'red') for most in (1, 3, 9)]
  answers = {}
  jobs = []
  for n, (text, most) in enumerate(asked):
    answers[n] = []
    ended = queue.Queue()

    def deliver(piece, n=n, ended=ended):
      answers[n].append(piece.text)
      ended.put(piece)

    serving.until(lambda: scheduler.waiting < 3)
    _submit(scheduler, chat, None, text=text, most=most, deliver=deliver)
    jobs.append(ended)
  for n, (text, most) in enumerate(asked):
    assert _reason(jobs[n]) == 'length'
    request = chat_lib.Request((('human', text),), ())
    assert ''.join(answers[n]) == alone(request, most)


def test_one_who_cannot_listen_ends_no_other(scheduler, gated, chat):
  def deaf(piece):
    raise RuntimeError('the event loop is closed')

  good = queue.Queue()
  _submit(scheduler, chat, None, deliver=deaf)
  _submit(scheduler, chat, good)
  gated.open()
  assert _reason(good) == 'length'
  serving.until(lambda: scheduler.running == 0)
  assert scheduler.failure is None


def test_when_a_slot_cannot_be_filled_all_hear_of_it(gated, chat, monkeypatch):
  def fail(*_):
    raise RuntimeError('out of memory')

  monkeypatch.setattr(gated, 'insert', fail)
  failed = threading.Event()
  found = scheduler_lib.Scheduler(gated, chat.tokenizer, queue=3, warm_up=())
  found.start(failed.set)
  serving.until(lambda: found.ready, 300)
  gated.gated = True
  jobs = [queue.Queue() for _ in range(3)]
  for pieces in jobs:
    _submit(found, chat, pieces)
  serving.until(lambda: found.waiting == 2)
  gated.open()
  assert failed.wait(60)
  for pieces in jobs:
    while not (piece := pieces.get_nowait()).last:
      pass
    assert str(piece.error) == 'out of memory' and pieces.empty()


def test_cancelling_twice_or_late_changes_nothing(scheduler, gated, chat):
  gated.open()
  pieces = queue.Queue()
  job = _submit(scheduler, chat, pieces)
  assert _reason(pieces) == 'length'
  scheduler.cancel(job)
  scheduler.cancel(job)
  assert pieces.empty() and scheduler.waiting == 0


def test_closing_answers_what_waits_and_takes_no_more(gated, chat):
  found = scheduler_lib.Scheduler(gated, chat.tokenizer, queue=3, warm_up=())
  found.start()
  serving.until(lambda: found.ready, 300)
  gated.gated = True
  jobs = [queue.Queue() for _ in range(6)]
  for pieces in jobs:
    _submit(found, chat, pieces)
  gated.let_in(found, 6)
  assert not found.close(0.01)
  with pytest.raises(scheduler_lib.ClosedError):
    _submit(found, chat, queue.Queue())
  gated.open()
  assert [_reason(pieces) for pieces in jobs] == ['length'] * 6
  assert found.close(60)


def test_closing_does_not_wait_for_the_whole_warm_up(gated, chat):
  steps = []
  found = scheduler_lib.Scheduler(
      gated,
      chat.tokenizer,
      queue=3,
      warm_up=[
          lambda: steps.append(found.close(0)),
          lambda: steps.append('second'),
      ],
  )
  # `close` is called by the thread that it would wait for.
  found._thread.join = lambda timeout: None
  found.start()
  serving.until(lambda: not found._thread.is_alive())
  assert steps == [False] and not found.ready


class Endless(engine_lib.Engine):
  """Answers of one token, each followed by another request."""

  def __init__(self, chat, again):
    super().__init__(chat, slots=4, context=serving.OPTIONS.context)
    self.again = again
    self.steps = 0

  def step(self) -> np.ndarray:
    self.steps += 1
    return super().step()


def test_answers_of_one_token_do_not_starve_the_others(chat):
  engine = Endless(chat, None)
  found = scheduler_lib.Scheduler(engine, chat.tokenizer, queue=9, warm_up=())
  found.start()
  serving.until(lambda: found.ready, 300)
  over = []

  def again(piece):
    # From the engine's own thread, so that the queue is never empty.
    if piece.last and not over:
      _submit(found, chat, None, most=1, deliver=again)

  for _ in range(6):
    _submit(found, chat, None, most=1, deliver=again)
  pieces = queue.Queue()
  _submit(found, chat, pieces, most=6)
  assert _reason(pieces) == 'length'
  over.append(True)
  assert found.close(60)
