# SPDX-License-Identifier: Apache-2.0
"""Which part of a published mix a row is of, and how many rows that part has.

Sources: the mix of LLaVA-1.5, counted from `llava_v1_5_mix665k.json` in
https://github.com/haotian-liu/LLaVA/issues/657; the others, rounded to
thousands, table 2 of MoE-LLaVA (arXiv 2401.15947). Folders as in
https://github.com/PKU-YuanGroup/MoE-LLaVA/blob/main/docs/TRAIN.md.
"""

from typing import NamedTuple

TEXT = 'text'  # Rows without an image.


class Count(NamedTuple):
  rows: int
  exact: bool  # Else rounded to thousands.
  group: str

  @property
  def text(self) -> str:
    return f'{self.rows}' if self.exact else f'{self.rows // 1000}k'


COUNTS = {
    'coco': Count(364_100, True, 'LLaVA-FT'),
    'vg': Count(86_417, True, 'LLaVA-FT'),
    'gqa': Count(72_140, True, 'LLaVA-FT'),
    'ocr_vqa': Count(80_000, True, 'LLaVA-FT'),
    'textvqa': Count(21_953, True, 'LLaVA-FT'),
    TEXT: Count(40_688, True, 'LLaVA-FT'),
    'llava_image': Count(558_000, False, 'LLaVA-PT'),
    'svit_tune': Count(157_000, False, 'Hybrid-FT'),
    'lvis_tune': Count(220_000, False, 'Hybrid-FT'),
    'lrv_tune': Count(331_000, False, 'Hybrid-FT'),
    'mimicit_tune': Count(256_000, False, 'Hybrid-FT'),
}
# In MoE-LLaVA's layout the folders of LLaVA-1.5 lie in this one.
_WRAPPERS = ('llava_image_tune',)


def source_of(path: str | None) -> str:
  """The part a row is of, from the path of its first image (None: no image).

  That is the first folder, or `.` for images in no folder.
  """
  if path is None:
    return TEXT
  folders = [p for p in path.replace('\\', '/').split('/')[:-1] if p != '.']
  if folders and folders[0] in _WRAPPERS:
    folders = folders[1:]
  return folders[0] if folders else '.'


def difference(source: str, rows: int) -> str | None:
  """How `rows` compares with what was published; None: that is not known."""
  if source not in COUNTS:
    return None
  count = COUNTS[source]
  found = rows if count.exact else round(rows, -3)
  return 'as published' if found == count.rows else f'{rows - count.rows:+d}'
