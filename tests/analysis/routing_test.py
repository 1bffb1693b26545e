# SPDX-License-Identifier: Apache-2.0
"""What a model routes is counted exactly: it is run, or it was recorded."""

import csv
import dataclasses
import functools
import json
import re

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from moellava_jax import checkpoint, config, sharding
from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import main, recorded, routing
from moellava_jax.data import tokenizer as tokenizer_lib
from moellava_jax.evals import base, traces
from moellava_jax.infer import chat as chat_lib
from moellava_jax.infer import generate
from moellava_jax.infer import requests as requests_lib
from tests import tiny
from tests.analysis import routers

EXPERTS, TOP_K, FACTOR = 4, 2, 0.6
LAYERS = (0, 1, 2)


def _write(path, stage, experts=EXPERTS, seed=0):
  tokenizer = tokenizer_lib.train(['Is there a red square? Yes. No.'] * 9, 300)
  moe = tiny.moe_config(
      num_experts=experts,
      top_k=TOP_K,
      layers='all',
      eval_capacity_factor=FACTOR,
  )
  model = tiny.model_config(moe=moe, vocab_size=320, depth=len(LAYERS))
  cfg = dataclasses.replace(tiny.train_config(), model=model)
  params = tiny.params_of(cfg.stage_model(stage), seed)
  checkpoint.write_final(
      epath.Path(path), params, cfg, stage, {}, tokenizer.save
  )
  return str(path)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A sparse model that drops, within a run that logged two steps."""
  workdir = tmp_path_factory.mktemp('run')
  layer = {'load': [0.25] * 4, 'aux_loss': 1.0, 'drop_rate': 0.1}
  moe = {str(n): layer for n in LAYERS}
  (workdir / 'metrics.jsonl').write_text(
      ''.join(
          json.dumps({'stage': 'moe', 'step': n, 'moe': moe}) + '\n'
          for n in (1, 2)
      )
  )
  return _write(workdir / 'moe' / 'final', 'moe')


@pytest.fixture(scope='module')
def chat(model):
  return chat_lib.load(model)


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
  """(folder, questions): some with an image, one without."""
  folder = tmp_path_factory.mktemp('data')
  rows = []
  for n in range(5):
    Image.new('RGB', (28, 28), (50 * n, 90, 9)).save(folder / f'{n}.png')
    text = f'Is there a {"red " * n}square?'
    rows.append(
        {
            'question_id': n,
            'text': text,
            'category': 'random',
            'label': 'no',
            'image': None if n == 3 else f'{n}.png',
        }
    )
  path = folder / 'questions.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder, base.read_questions(path)


@functools.partial(jax.jit, static_argnames='model')
def _logits(model, params, tokens_BT, segments_BT, positions_BT, images_BIHWC):
  """`[L, B, T, E]`, straight from the layers."""
  _, sown = model.apply(
      {'params': params},
      tokens_BT,
      segments_BT,
      positions_BT,
      images_BIHWC,
      train=False,
      rngs={'router': jax.random.key(0)},
      mutable=['diagnostics'],
  )
  layers = sown['diagnostics']['llm']
  return jnp.stack(
      [layers[f'layers_{n}']['moe']['routing'][0].logits_BTE for n in LAYERS]
  )


def _add(counted, logits_LBTE, is_token_BT, is_image_BT):
  """Routes and counts every row in loops."""
  _, rows, length, _ = logits_LBTE.shape
  slots = routers.capacity(length, EXPERTS, TOP_K, FACTOR)
  for b in range(rows):
    routed = [
        routers.route(logits_TE, is_token_BT[b], TOP_K, slots)
        for logits_TE in logits_LBTE[:, b]
    ]
    for t in range(length):
      if is_token_BT[b, t]:
        counted.add(
            is_image_BT[b, t],
            [choice_Tk[t] for choice_Tk, _ in routed],
            [kept_Tk[t] for _, kept_Tk in routed],
        )


def test_counts_of_a_model_are_those_of_a_router_in_loops(chat, asked):
  folder, questions = asked
  rows = routing.conversations(questions)
  counts, about = routing.measure(chat, rows, str(folder))
  counted = routers.Counted(len(LAYERS), EXPERTS)
  for batch in routing.batches(chat, rows, str(folder)):
    with sharding.use(chat.mesh):
      placed = sharding.put_batch(batch, chat.mesh)
      logits = _logits(
          chat.model,
          chat.params,
          placed.tokens_BT,
          placed.segment_ids_BT,
          placed.positions_BT,
          placed.images_BIHWC,
      )
    is_image_BT = batch.tokens_BT == config.IMAGE_TOKEN
    _add(counted, np.asarray(logits), batch.segment_ids_BT > 0, is_image_BT)
  counted.check(counts)
  assert counts.conversations == len(questions)
  dropped = counts.assigned_LME.sum() - counts.kept_LME.sum()
  assert 0 < dropped < counts.assigned_LME.sum()
  assert about['digest'] == chat.digest


def test_images_are_those_that_the_model_answers_about(chat, asked, tmp_path):
  _, questions = asked
  rows = routing.conversations(questions[:1])
  wide = Image.radial_gradient('L').resize((90, 30)).convert('RGB')

  wide.save(tmp_path / '0.png')

  def shown(aspect):
    seen = chat._replace(image_aspect=aspect)
    (batch,) = routing.batches(seen, rows, str(tmp_path))
    want_HWC = np.asarray(seen.shrink(wide))
    np.testing.assert_array_equal(batch.images_BIHWC[0, 0], want_HWC)
    return want_HWC

  assert (shown('pad') != shown('square')).any()


@pytest.fixture(scope='module')
def folder_of_traces(chat, asked, tmp_path_factory):
  """What an evaluation records, and the same from a router in loops."""
  folder, questions = asked
  where = tmp_path_factory.mktemp('out') / 'a.routing'
  counted = routers.Counted(len(LAYERS), EXPERTS)
  answers, routings = [], []
  for question in questions:
    image = question.image and str(folder / question.image)
    routings.append(chat.trace(image, question.text, 'Yes.'))
    request = requests_lib.conversation(image, question.text, ())
    prompt = chat.encode(
        request._replace(turns=(*request.turns, ('gpt', 'Yes.')))
    )
    tokens_BT, lengths_B, images_BIHWC = generate.pad([prompt], 1)
    positions_BT = np.arange(tokens_BT.shape[1])[None]
    is_token_BT = positions_BT < lengths_B[:, None]
    with sharding.use(chat.mesh):
      logits_LBTE = _logits(
          chat.model,
          chat.params,
          tokens_BT,
          is_token_BT.astype(np.int32),
          positions_BT,
          images_BIHWC,
      )
    is_image_BT = tokens_BT == config.IMAGE_TOKEN
    _add(counted, np.asarray(logits_LBTE), is_token_BT, is_image_BT)
    answers.append(_answer(question.question_id, chat.digest))
  traces.write(where, [0, 1], answers[:2], routings[:2], EXPERTS)
  traces.write(where, [2, 3, 4], answers[2:], routings[2:], EXPERTS)
  return where, counted


def _answer(question_id, digest, control='none'):
  return base.Answer(
      question_id,
      '',
      'Yes.',
      'a',
      'tiny',
      {'digest': digest, 'control': control},
  )


def test_counts_of_traces_are_those_of_a_router_in_loops(folder_of_traces):
  where, counted = folder_of_traces
  counts = recorded.count([str(where)])
  counted.check(counts)
  assert counts.kept_LME.sum() < counts.assigned_LME.sum()
  assert counts.entropy_LM is None


def _options(**flags):
  defaults = dict(
      model=None,
      questions=None,
      images=None,
      traces=[],
      run=None,
      cpu_devices=1,
      mesh=None,
  )
  return main.Options(**{**defaults, **flags})


def test_command_writes_page_figures_and_tables(model, asked, tmp_path, capsys):
  folder, _ = asked
  path = str(folder / 'questions.jsonl')
  main.run(
      _options(
          model=model,
          questions=path,
          images=str(folder),
          mesh='fsdp=2,expert=2',
          out=str(tmp_path),
      )
  )
  names = {file.name for file in tmp_path.iterdir()}
  shown = (
      'load',
      'preference',
      'pathways',
      'drop_rate',
      'entropy',
      'coactivation',
      'balance_over_steps',
      'load_over_steps',
  )
  figures = {f'{n}.{end}' for n in shown for end in ('png', 'svg', 'csv')}
  assert names == {'routing.json', 'routing.html', *figures}
  page = (tmp_path / 'routing.html').read_text()
  assert page.count('<figure>') == len(shown)
  assert not re.search(r'(src|href)=(?!"data:)', page)
  summary = json.loads((tmp_path / 'routing.json').read_text())
  counts = counts_lib.from_json(summary['counts'])
  with (tmp_path / 'drop_rate.csv').open() as file:
    rows = [row for row in csv.DictReader(file) if row['tokens'] == 'all']
  dropped_L = (counts.assigned_LME - counts.kept_LME).sum((1, 2))
  assert [int(row['dropped']) for row in rows] == dropped_L.tolist()
  assert 'layer 2: load of the experts' in capsys.readouterr().out


def test_command_reads_traces(folder_of_traces, model, tmp_path, capsys):
  where, counted = folder_of_traces
  main.run(_options(traces=[str(where)], model=model, out=str(tmp_path)))
  summary = json.loads((tmp_path / 'routing.json').read_text())
  counted.check(counts_lib.from_json(summary['counts']))
  assert summary['entropy'] is None
  page = (tmp_path / 'routing.html').read_text()
  assert 'Router entropy: traces hold choices' in page
  assert 'absent: Router entropy' in capsys.readouterr().out


def test_a_dense_model_has_nothing_to_show(asked, tmp_path, folder_of_traces):
  dense = _write(tmp_path / 'finetune' / 'final', 'finetune')
  told = 'dense model of stage .finetune.*nothing to show.*stage moe'
  # Before the questions are read, which are not there.
  flags = {'questions': str(tmp_path / 'gone'), 'images': '.'}
  for others in (flags, {'traces': [str(folder_of_traces[0])]}):
    with pytest.raises(routing.DenseModelError, match=told):
      main.run(_options(model=dense, out=str(tmp_path / 'out'), **others))
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'experts, seed, told',
    [
        (8, 0, 'experts 4 instead of 8'),
        (EXPERTS, 1, 'digest of the weights .* instead of '),
    ],
)
def test_traces_of_another_model_are_refused(
    experts, seed, told, tmp_path, folder_of_traces
):
  other = _write(tmp_path / 'final', 'moe', experts, seed)
  options = _options(
      traces=[str(folder_of_traces[0])], model=other, out=str(tmp_path)
  )
  with pytest.raises(config.UserError, match=f'another model than .*{told}'):
    main.run(options)


def test_traces_of_different_models_are_not_added_up(
    chat, asked, folder_of_traces, tmp_path
):
  where, _ = folder_of_traces
  folder, questions = asked
  found = chat.trace(str(folder / '0.png'), questions[0].text, 'No.')
  for change, told in (
      ({'layers': (0, 2, 4)}, r'sparse layers \(0, 2, 4\) instead of \(0, 1'),
      ({'experts': 8}, 'experts 8 instead of 4'),
      ({'digest': 'else'}, 'digest of the weights else instead of'),
      ({'control': 'blank_image'}, 'control blank_image instead of none'),
  ):
    other = tmp_path / next(iter(change))
    answer = _answer(
        0,
        change.get('digest', chat.digest),
        change.get('control', 'none'),
    )
    one = found._replace(layers=change.get('layers', LAYERS))
    traces.write(other, [0], [answer], [one], change.get('experts', EXPERTS))
    with pytest.raises(config.UserError, match=told):
      recorded.count([str(where), str(other)])
    # As files of one folder.
    (other / '0000000.npz').rename(other / '0000009.npz')
    first = _answer(0, chat.digest)
    traces.write(other, [0], [first], [found], EXPERTS)
    with pytest.raises(config.UserError, match='of several models'):
      recorded.count([str(other)])


def test_flags_that_do_not_go_together_are_refused(tmp_path, asked, model):
  out = str(tmp_path)
  with pytest.raises(
      config.UserError, match='--questions and --images missing'
  ):
    main.run(_options(model=model, out=out))
  with pytest.raises(config.UserError, match='--images: the questions of'):
    main.run(_options(traces=['a'], images='b', out=out))
  with pytest.raises(config.UserError, match='write them with --routing_trace'):
    main.run(_options(traces=[str(tmp_path / 'gone')], out=out))
  open_questions = tmp_path / 'open.jsonl'
  row = {'question_id': 0, 'text': 'What?', 'category': '', 'image': None}
  open_questions.write_text(json.dumps(row) + '\n')
  with pytest.raises(config.UserError, match='has no answers .* as --traces'):
    main.run(
        _options(
            model=model, questions=str(open_questions), images='.', out=out
        )
    )


def test_a_run_without_metrics_is_refused(tmp_path, folder_of_traces):
  options = _options(
      traces=[str(folder_of_traces[0])], run=str(tmp_path), out=str(tmp_path)
  )
  with pytest.raises(config.UserError, match='metrics.jsonl is missing: --run'):
    main.run(options)
