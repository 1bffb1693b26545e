# SPDX-License-Identifier: Apache-2.0
"""Names of directories: local, or `hf:org/name` on the Hugging Face Hub.

Nothing is fetched but what the user names in this way. A download that was cut
off goes on where it stopped; a finished one is not fetched again.
"""

import os
import re

from moellava_jax import config, run_folder

PREFIX = 'hf:'
# Weights of other frameworks, and what is not weights at all, stay there.
_WANTED = ('*.json', '*.txt', '*.model', '*.tiktoken', '*.jinja')


def local(name: str) -> str:
  """The directory (or file) that `name` stands for, fetched if need be.

  Raises:
    UserError: it does not exist, here or there.
  """
  if not name.startswith(PREFIX):
    run_folder.check(name)
    if not os.path.exists(name) and '://' not in name:
      meant = name.removeprefix('./').rstrip('/')
      repository = meant if re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', meant) else ''
      raise config.UserError(
          f'{name} does not exist. For a repository of the Hugging Face Hub'
          f' write {PREFIX}{repository or "org/name"}.'
      )
    return name
  import huggingface_hub
  from huggingface_hub import errors

  repository = name.removeprefix(PREFIX)
  try:
    names = huggingface_hub.list_repo_files(repository)
    safe = any(n.endswith('.safetensors') for n in names)
    weights = '*.safetensors' if safe else '*.bin'
    return huggingface_hub.snapshot_download(
        repository, allow_patterns=[*_WANTED, weights]
    )
  except errors.OfflineModeIsEnabled:
    return _cached(repository)
  except (errors.HfHubHTTPError, errors.HFValidationError) as error:
    raise config.UserError(
        f'{name} cannot be fetched: {error}. Log in with `hf auth login` if it'
        ' is gated, or fetch it yourself and name the directory.'
    ) from error
  except Exception as error:
    # No network: the HTTP libraries below share no base class.
    raise config.UserError(
        f'{name} cannot be reached: {error}. With HF_HUB_OFFLINE=1 what was'
        ' fetched before is used; else fetch it elsewhere (`hf download'
        f' {repository}`) and name the directory.'
    ) from error


def _cached(repository: str) -> str:
  import huggingface_hub
  from huggingface_hub import errors

  try:
    return huggingface_hub.snapshot_download(repository, local_files_only=True)
  except errors.LocalEntryNotFoundError as error:
    raise config.UserError(
        f'{PREFIX}{repository} has not been fetched before, and HF_HUB_OFFLINE'
        ' forbids it now. Unset it, or name a local directory.'
    ) from error
