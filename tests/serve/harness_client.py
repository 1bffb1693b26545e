# SPDX-License-Identifier: Apache-2.0
"""Asks a server through the client classes of evaluation harnesses.

  python harness_client.py CLIENT URL QUESTION IMAGE...

Run by itself, with a harness on the path and nothing of this repository: as a
harness runs. The last line is a JSON list: the answer about each image.
"""

import importlib.machinery
import importlib.util
import json
import pathlib
import sys
import types

NAME = 'tiny'


def _lmms(url, question, images):
  """lmms-eval with `--model openai`."""
  from lmms_eval import models
  from lmms_eval.api import instance
  from PIL import Image

  client = models.get_model('openai').create_from_arg_string(
      f'model_version={NAME},base_url={url}/v1,api_key=x,timeout=120,'
      'num_concurrent=16,max_retries=1',
      {'batch_size': 1},
  )
  # What an evaluator puts there.
  client.task_dict['pope'] = {'test': [Image.open(path) for path in images]}

  def messages(image):
    content = [
        {'type': 'image', 'url': image},
        {'type': 'text', 'text': question},
    ]
    return [{'role': 'user', 'content': content}]

  options = {  # Those of its task pope, but shorter.
      'max_new_tokens': 6,
      'temperature': 0,
      'top_p': 1.0,
      'num_beams': 1,
      'do_sample': False,
      'until': ['\n\n'],
  }
  found = client.generate_until(
      [
          instance.Instance(
              'generate_until',
              ('', messages, dict(options), i, 'pope', 'test'),
              0,
              {'task': 'pope', 'doc_id': i, 'repeats': 1},
          )
          for i in range(len(images))
      ]
  )
  for result in found:
    assert result.token_counts.input_tokens > 0, result
    assert result.token_counts.output_tokens == 6, result
  return [result.text for result in found]


def _vlmeval():
  """Imports of VLMEvalKit the modules of its clients.

  Its packages import on the way hundreds of models and benchmarks, and torch.
  Packages with the same path and empty bodies do not.
  """
  spec = importlib.util.find_spec('vlmeval')  # Runs nothing of it.
  assert spec is not None and spec.submodule_search_locations
  (root,) = map(pathlib.Path, spec.submodule_search_locations)
  for name in ('vlmeval', 'vlmeval.api', 'vlmeval.dataset'):
    package = types.ModuleType(name)
    package.__path__ = [str(root.joinpath(*name.split('.')[1:]))]
    package.__spec__ = importlib.machinery.ModuleSpec(
        name, None, is_package=True
    )
    sys.modules[name] = package
  # For prompts of particular models, which nobody asks for here.
  sys.modules['vlmeval.dataset'].DATASET_TYPE = None
  sys.modules['vlmeval.dataset'].DATASET_MODALITY = None
  from vlmeval.api import gpt, lmdeploy

  return gpt, lmdeploy


def _generate(client, question, images):
  return [
      client.generate(
          [
              {'type': 'image', 'value': path},
              {'type': 'text', 'value': question},
          ],
          dataset='POPE',
      )
      for path in images
  ]


def _vlmeval_base_url(url, question, images):
  """VLMEvalKit with `--base-url`, as its `build_model_from_base_url`."""
  _, lmdeploy = _vlmeval()
  client = lmdeploy.LMDeployAPI(
      model=NAME,
      api_base=f'{url}/v1/chat/completions',
      key='x',
      max_tokens=6,
      retry=1,
      timeout=120,
      temperature=0.0,
      repetition_penalty=1.0,
      verbose=False,
      video_llm=False,
      local_media=False,
  )
  return _generate(client, question, images)


def _vlmeval_gpt4v(url, question, images):
  """VLMEvalKit with `--config` that names its class GPT4V."""
  gpt, _ = _vlmeval()
  client = gpt.GPT4V(
      model=NAME,
      api_base=f'{url}/v1/chat/completions',
      key='x',
      max_tokens=6,
      retry=1,
      temperature=0,
      timeout=120,
      img_detail='high',
  )
  return _generate(client, question, images)


CLIENTS = {
    'lmms_openai': _lmms,
    'vlmevalkit_base_url': _vlmeval_base_url,
    'vlmevalkit_gpt4v': _vlmeval_gpt4v,
}

if __name__ == '__main__':
  _, name, url, question, *images = sys.argv
  answers = CLIENTS[name](url, question, images)
  print(json.dumps(answers))
