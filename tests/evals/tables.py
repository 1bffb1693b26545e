# SPDX-License-Identifier: Apache-2.0
"""Writes tables with tabs, and reads the workbooks that are submitted."""

import csv
import pathlib
from xml.etree import ElementTree
import zipfile

_SHEET = '{http://schemas.openxmlformats.org/spreadsheetml/2006/main}'


def write(path, rows):
  """Writes rows of equal keys as pandas would; returns the path as a string."""
  with pathlib.Path(path).open('w', encoding='utf-8', newline='') as file:
    table = csv.DictWriter(file, list(rows[0]), delimiter='\t')
    table.writeheader()
    table.writerows(rows)
  return str(path)


def read_xlsx(path):
  """The cells of the one sheet, row by row."""
  with zipfile.ZipFile(path) as file:
    sheet = ElementTree.fromstring(file.read('xl/worksheets/sheet1.xml'))
  return [
      [_value(cell) for cell in row.iter(f'{_SHEET}c')]
      for row in sheet.iter(f'{_SHEET}row')
  ]


def _value(cell):
  number, text = cell.find(f'{_SHEET}v'), cell.find(f'{_SHEET}is/{_SHEET}t')
  if number is not None:
    return int(number.text)
  return None if text is None else text.text or ''
