# SPDX-License-Identifier: Apache-2.0
"""What the server counts, in Prometheus' text format."""

from collections.abc import Callable

import prometheus_client

from moellava_jax.serve import scheduler

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PREFIX = 'moellava_'


class Metrics(scheduler.Observer):
  """Counters of one server; thread-safe."""

  def __init__(self):
    self._registry = prometheus_client.CollectorRegistry()
    self._responses = self._counter(
        'http_responses', 'Responses by path and status.', 'path', 'status'
    )
    self._answers = self._counter(
        'answers', 'Answers by the reason of their end.', 'reason'
    )
    self._prompt_tokens = self._counter(
        'prompt_tokens', 'Positions of prompts, those of images included.'
    )
    self._new_tokens = self._counter('generated_tokens', 'Tokens of answers.')
    self._first = self._histogram(
        'time_to_first_token_seconds', 'From the queue to the first token.'
    )
    self._whole = self._histogram(
        'answer_seconds', 'From the queue to the last token.'
    )
    self.seconds = 1.0  # Of a recent answer, waiting included.

  def watch(self, name: str, help_text: str, value: Callable[[], float]):
    """Reports `value()` as a gauge."""
    prometheus_client.Gauge(
        _PREFIX + name, help_text, registry=self._registry
    ).set_function(value)

  def responded(self, path: str, status: int) -> None:
    self._responses.labels(path, str(status)).inc()

  def began(self, waited: float, prompt_tokens: int) -> None:
    self._first.observe(waited)
    self._prompt_tokens.inc(prompt_tokens)

  def ended(self, reason: str, new_tokens: int, seconds: float) -> None:
    self._answers.labels(reason).inc()
    self._new_tokens.inc(new_tokens)
    if reason in ('stop', 'length'):
      self._whole.observe(seconds)
      self.seconds += 0.1 * (seconds - self.seconds)

  def text(self) -> bytes:
    return prometheus_client.generate_latest(self._registry)

  def _counter(self, name: str, help_text: str, *labels: str):
    return prometheus_client.Counter(
        _PREFIX + name, help_text, labels, registry=self._registry
    )

  def _histogram(self, name: str, help_text: str):
    return prometheus_client.Histogram(
        _PREFIX + name, help_text, registry=self._registry, buckets=_SECONDS
    )
