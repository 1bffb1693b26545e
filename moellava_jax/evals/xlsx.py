# SPDX-License-Identifier: Apache-2.0
"""Writes a table as an .xlsx file, which the server of MMBench wants.

The least that ECMA-376 asks of a workbook with one sheet, with strings in the
cells themselves; any reader of spreadsheets takes it.
"""

from collections.abc import Iterable, Sequence
import os
import re
from xml.sax import saxutils
import zipfile

_MAIN = 'http://schemas.openxmlformats.org/spreadsheetml/2006/main'
_PACKAGE = 'http://schemas.openxmlformats.org/package/2006'
_OFFICE = 'http://schemas.openxmlformats.org/officeDocument/2006/relationships'
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_TYPE = 'application/vnd.openxmlformats-officedocument.spreadsheetml'
_PARTS = {
    '[Content_Types].xml': (
        f'<Types xmlns="{_PACKAGE}/content-types"><Default Extension="rels"'
        ' ContentType="application/vnd.openxmlformats-package.relationships'
        '+xml"/><Default Extension="xml" ContentType="application/xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPE}.sheet.main'
        '+xml"/><Override PartName="/xl/worksheets/sheet1.xml"'
        f' ContentType="{_TYPE}.worksheet+xml"/></Types>'
    ),
    '_rels/.rels': (
        f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship'
        f' Id="rId1" Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/>'
        '</Relationships>'
    ),
    'xl/workbook.xml': (
        f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}"><sheets><sheet'
        ' name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>'
    ),
    'xl/_rels/workbook.xml.rels': (
        f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship'
        f' Id="rId1" Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/>'
        '</Relationships>'
    ),
}
# XML has no place for these, and Excel none for longer strings.
_FORBIDDEN = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]')
_LONGEST = 32767

Cell = str | int | None


def write(
    path: str | os.PathLike[str],
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
) -> None:
  """Writes `rows` under a head of `columns`; None is an empty cell."""
  lines = ''.join(
      f'<row r="{number}">{"".join(map(_cell, row))}</row>'
      for number, row in enumerate([columns, *rows], 1)
  )
  sheet = (
      f'<worksheet xmlns="{_MAIN}"><sheetData>{lines}</sheetData></worksheet>'
  )
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
    for name, text in {**_PARTS, 'xl/worksheets/sheet1.xml': sheet}.items():
      file.writestr(name, _HEAD + text)


def _cell(value: Cell) -> str:
  if value is None:
    return '<c/>'
  if isinstance(value, int):
    return f'<c><v>{value}</v></c>'
  text = saxutils.escape(_FORBIDDEN.sub('', value)[:_LONGEST])
  return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'
