# SPDX-License-Identifier: Apache-2.0
"""What a run says of where it runs."""

import pytest

from moellava_jax.train import about


@pytest.mark.parametrize(
    'setting, told, expected',
    [
        ('always [madvise] never', None, True),
        ('always [madvise] never', 'glibc.malloc.hugetlb=0', False),
        ('[always] madvise never', None, False),  # They come unasked.
        ('always madvise [never]', None, False),
        (None, None, False),  # Another system.
    ],
)
def test_huge_pages_are_spoken_of_where_asking_would_help(
    tmp_path, monkeypatch, setting, told, expected
):
  file = tmp_path / 'enabled'
  if setting:
    file.write_text(setting)
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  if told:
    monkeypatch.setenv('GLIBC_TUNABLES', told)
  assert about.could_have_huge_pages(str(file)) is expected
