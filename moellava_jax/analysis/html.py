# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file: figures and images inside, nothing fetched.

The template escapes every value, so questions and answers may hold any text.
"""

import base64
import dataclasses
import io
import pathlib

from moellava_jax.analysis import look

# Sides of a sample image on the page, in pixels.
SAMPLE_SIDE = 160


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of strings; the first cell of a row is its heading."""

  caption: str
  columns: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Figure:
  title: str
  reading: str  # How to read it, in a sentence or two.
  png: bytes


@dataclasses.dataclass(frozen=True)
class Sample:
  """One question about one image, with what the model answered."""

  group: str  # Category of POPE or kind of exact-match question.
  image: str  # Relative to the directory of the questions.
  question: str
  truth: str
  answer: str
  right: bool


@dataclasses.dataclass(frozen=True)
class Page:
  """What a report shows, in this order; empty parts are left out."""

  title: str
  subtitle: str
  absent: tuple[str, ...]
  results: tuple[Table, ...]
  scores: tuple[Figure, ...]
  training: tuple[Table, ...]
  losses: tuple[Figure, ...]
  routing: tuple[Table, ...]
  experts: tuple[Figure, ...]
  samples: tuple[Sample, ...]
  images: pathlib.Path  # Root of the samples' images.
  commands: tuple[str, ...]
  details: tuple[tuple[str, str], ...]  # (summary, text).


def render(page: Page) -> str:
  """The page as HTML."""
  import jinja2

  environment = jinja2.Environment(
      autoescape=True,
      trim_blocks=True,
      lstrip_blocks=True,
      undefined=jinja2.StrictUndefined,
  )
  samples = [
      (s, _data_uri(enlarged(page.images / s.image))) for s in page.samples
  ]
  return environment.from_string(_TEMPLATE).render(
      page=page, samples=samples, data_uri=_data_uri, width=_shown_width
  )


def enlarged(path: pathlib.Path) -> bytes:
  """The image as PNG of about `SAMPLE_SIDE` pixels, small ones unblurred."""
  from PIL import Image

  with path.open('rb') as file:
    image = Image.open(file).convert('RGB')
  factor = round(SAMPLE_SIDE / max(image.size))
  if factor >= 1:  # Whole pixels stay squares of one size.
    size = (image.width * factor, image.height * factor)
    image = image.resize(size, Image.Resampling.NEAREST)
  else:
    image.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
  buffer = io.BytesIO()
  image.save(buffer, 'PNG')
  return buffer.getvalue()


def _shown_width(png: bytes) -> int:
  """Pixels of the page that a figure takes, so that all have one font size."""
  # The width is the first number of a PNG's first chunk.
  return round(int.from_bytes(png[16:20], 'big') / look.SHARPNESS)


def _data_uri(png: bytes) -> str:
  return 'data:image/png;base64,' + base64.b64encode(png).decode()


_TEMPLATE = """\
{% macro table(t) %}
<div class="scroll"><table>
<caption>{{ t.caption }}</caption>
<thead><tr>
{% for c in t.columns %}<th scope="col">{{ c }}</th>{% endfor %}

</tr></thead>
<tbody>
{% for row in t.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro figure(f) %}
<figure><h3>{{ f.title }}</h3>
<img src="{{ data_uri(f.png) }}" width="{{ width(f.png) }}" alt="{{ f.title }}">
<figcaption>{{ f.reading }}</figcaption></figure>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
:root { color-scheme: light; --ink: #222; --soft: #5a5a5a; --line: #ddd; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 24px 20px 64px;
  color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; }
h2 { margin: 48px 0 12px; padding-bottom: 6px; font-size: 1.25rem;
  border-bottom: 2px solid var(--ink); }
h3 { margin: 0 0 8px; font-size: 1.02rem; }
.sub, figcaption, caption { color: var(--soft); }
.sub { margin: 4px 0 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 16px 0; }
table { border-collapse: collapse; min-width: 60%;
  font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; padding-top: 8px; text-align: left;
  font-size: .92rem; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
tbody th { font-weight: 500; }
figure { margin: 28px 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 75ch; font-size: .92rem; }
.note { margin: 20px 0; padding: 10px 16px; background: #f5f5f5;
  border-left: 4px solid #E69F00; overflow-wrap: anywhere; }
.note ul { margin: 4px 0; padding-left: 20px; }
.samples { display: grid; gap: 16px; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); }
.samples li { padding: 12px; border: 1px solid var(--line);
  border-top: 5px solid #0072B2; border-radius: 4px;
  overflow-wrap: anywhere; font-size: .92rem; }
.samples li.wrong { border-top-color: #D55E00; }
.samples img { display: block; margin-bottom: 8px; }
.samples p { margin: 0 0 4px; white-space: pre-line; }
.samples .group { color: var(--soft); font-size: .85rem; }
.mark { font-weight: 700; color: #0072B2; }
.wrong .mark { color: #B34700; }
pre { overflow-x: auto; padding: 12px 14px; background: #f5f5f5;
  border-radius: 4px; font-size: .85rem; line-height: 1.5; }
summary { cursor: pointer; font-weight: 600; padding: 6px 0; }
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
<p class="sub">{{ page.subtitle }}</p>
{% if page.absent %}
<div class="note"><strong>Not in this report</strong><ul>
{% for line in page.absent %}<li>{{ line }}</li>
{% endfor %}
</ul></div>
{% endif %}
{% if page.results or page.scores %}
<h2>Results</h2>
{% for f in page.scores %}{{ figure(f) }}{% endfor %}
{% for t in page.results %}{{ table(t) }}{% endfor %}
{% endif %}
{% if page.training or page.losses %}
<h2>Training</h2>
{% for t in page.training %}{{ table(t) }}{% endfor %}
{% for f in page.losses %}{{ figure(f) }}{% endfor %}
{% endif %}
{% if page.routing or page.experts %}
<h2>Experts</h2>
{% for t in page.routing %}{{ table(t) }}{% endfor %}
{% for f in page.experts %}{{ figure(f) }}{% endfor %}
{% endif %}
{% if samples %}
<h2>Sample answers</h2>
<p class="sub">Held-out images, enlarged. Wrong answers are picked on purpose
where there are any: the table above has the rates.</p>
<ul class="samples">
{% for s, uri in samples %}
<li class="{{ 'right' if s.right else 'wrong' }}">
<img src="{{ uri }}" alt="image of the question below">
<p class="group">{{ s.group }}</p>
<p>{{ s.question }}</p>
<p>truth: <strong>{{ s.truth }}</strong></p>
<p>answer: <strong>{{ s.answer or '(empty)' }}</strong></p>
<p class="mark">{{ 'right' if s.right else 'wrong' }}</p>
</li>
{% endfor %}
</ul>
{% endif %}
<h2>How to reproduce</h2>
<pre>{{ page.commands | join('\\n') }}</pre>
{% for summary, text in page.details %}
<details><summary>{{ summary }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
</body>
</html>
"""
