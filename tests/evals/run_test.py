# SPDX-License-Identifier: Apache-2.0
"""Whole runs: protocols, tables with images, submissions, judges, the paper."""

import base64
import dataclasses
import io
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
from PIL import Image
import pytest

from moellava_jax.evals import ask, base, parts, prompts, run
from tests.evals import tables

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def options(tmp_path):
  """Options to ask the model `moe`."""
  (tmp_path / 'moe').mkdir()
  default = run.Options(
      benchmark='pope',
      questions=None,
      model=[str(tmp_path / 'moe')],
      control=['none'],
      protocol='llava',
      answers=[],
      images=None,
      annotations=None,
      out=str(tmp_path / 'out'),
      submission=None,
      judge_url=None,
      judge_model=None,
      judge_key='NO_KEY',
      judge_prices=[],
      yes=False,
      scores=[],
      server_score=[],
      batch_size=2,
      max_new_tokens=None,
      temperature=0.0,
      image_aspect=None,
      cpu_devices=1,
      mesh=None,
      shard=None,
      routing_trace=False,
  )
  return lambda **changes: dataclasses.replace(default, **changes)


def _scores(tmp_path):
  return json.loads((tmp_path / 'out' / 'scores.json').read_text())


def _command(*flags):
  return subprocess.run(
      [sys.executable, '-m', 'moellava_jax.evals.main', *flags],
      capture_output=True,
      text=True,
      check=False,
      cwd=ROOT,
  )


def _pope(write_jsonl, questions):
  rows = [
      {**row, 'text': f'{row["text"]}\n{prompts.SHORT}'} for row in questions
  ]
  return write_jsonl('pope.jsonl', rows)


def test_a_protocol_has_its_prompts_files_and_scores(
    chats, options, questions, images, write_jsonl, tmp_path
):
  path = _pope(write_jsonl, questions)
  asked = options(questions=path, images=images, protocol='vlmevalkit')
  run.evaluate(asked)
  chat = chats(asked.model[0])
  assert chat.seen[0].turns == (('human', '<image>\nIs there a a?'),)
  entry = _scores(tmp_path)['moe']['none']['pope.vlmevalkit']
  assert entry['protocol'] == 'vlmevalkit'
  answers = [str(tmp_path / 'out' / 'moe.vlmevalkit.pope.jsonl')]
  run.evaluate(
      options(questions=path, protocol='vlmevalkit', model=[], answers=answers)
  )
  with pytest.raises(base.EvalError, match='answered for another prompt: 5'):
    run.evaluate(options(questions=path, model=[], answers=answers))
  with pytest.raises(base.EvalError, match="pope has no protocol 'mine'"):
    run.evaluate(options(questions=path, protocol='mine'))


def test_activated_parameters_are_those_of_the_paper():
  params = {
      'llm': {
          'layers': {
              'moe': {
                  'experts': {'up': np.zeros((4, 3, 5))},
                  'router': np.zeros((3, 4)),
              }
          },
          'norm': np.zeros(3),
      },
      'vision': {'patch': np.zeros(100)},
  }
  moe = types.SimpleNamespace(num_experts=4, top_k=2)
  # Two of four experts; the tower does not count.
  sparse = types.SimpleNamespace(moe=moe)
  assert run.activated(params, sparse) == 2 * 15 + 12 + 3
  assert run.activated(params, types.SimpleNamespace(moe=None)) == 75


def test_several_images_are_shown_in_order(chats, images, tmp_path):
  settings = ask.Settings(8, 0.0, 4, False)
  first = base.Question(1, 'a.png', 'Compare.', 'c', None, {}, ('b.png',))
  placed = dataclasses.replace(
      first, question_id=2, text='Is <image> like <image>?'
  )
  text = base.Question(3, None, 'Hi', 'c', None, {})
  path = tmp_path / 'a.jsonl'
  ask.run(
      chats('moe'),
      [first, placed, text],
      images,
      path,
      'none',
      settings,
      model_id='moe',
  )
  assert [request.turns[0][1] for request in chats('moe').seen] == [
      '<image>\n<image>\nCompare.',
      'Is <image> like <image>?',
      'Hi',
  ]
  shown = (f'{images}/a.png', f'{images}/b.png')
  assert [r.images for r in chats('moe').seen] == [shown, shown, ()]
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [row['metadata']['image'] for row in rows] == [
      ['a.png', 'b.png'],
      ['a.png', 'b.png'],
      None,
  ]
  missing = dataclasses.replace(first, more_images=('gone.png', 'b.png'))
  with pytest.raises(base.EvalError, match=r"missing: 1 \('gone.png'\)"):
    ask.check_images([missing], images)


def test_controls_reach_every_image(chats, images, tmp_path):
  question = base.Question(1, 'a.png', 'Q', 'c', None, {}, ('b.png',))
  for control in ('shuffled_image', 'blank_image'):
    ask.run(
        chats(control),
        [question],
        images,
        tmp_path / f'{control}.jsonl',
        control,
        ask.Settings(8, 0.0, 4, False),
        model_id='moe',
    )
  swapped = (f'{images}/b.png', f'{images}/a.png')
  assert chats('shuffled_image').seen[0].images == swapped
  assert [i.size for i in chats('blank_image').seen[0].images] == [
      (10, 20),
      (11, 20),
  ]


def test_questions_that_share_an_id_are_all_asked_and_resumed(
    chats, images, tmp_path
):
  questions = [
      base.Question('a', 'a.png', f'Q{n}', 'c', None, {}) for n in range(5)
  ]
  settings = ask.Settings(8, 0.0, 2, False)
  arguments = questions, images, tmp_path / 'a.jsonl', 'none', settings
  chats('moe').dies_at = 2
  with pytest.raises(KeyboardInterrupt):
    ask.run(chats('moe'), *arguments, model_id='moe')
  chats('moe').dies_at = None
  answers = ask.run(chats('moe'), *arguments, model_id='moe')
  assert [answer.prompt for answer in answers] == ['Q0', 'Q1', 'Q2', 'Q3', 'Q4']
  assert len(chats('moe').seen) == 5


@pytest.mark.parametrize('shards', [1, 2])
def test_a_question_that_is_repeated_is_asked_once_and_answered_twice(
    chats, images, tmp_path, shards
):
  texts = ['Q0', 'Q1', 'Q2', 'Q0']
  questions = [
      base.Question('a', 'a.png', text, 'c', None, {}) for text in texts
  ]
  chats('moe').model.cfg.moe = types.SimpleNamespace(num_experts=4, top_k=2)

  def answer(shard):
    return ask.run(
        chats('moe'),
        questions,
        images,
        tmp_path / 'a.jsonl',
        'none',
        ask.Settings(8, 0.0, 2, True),
        model_id='moe',
        shard=parts.Shard(shard, shards) if shards > 1 else None,
    )

  for _ in range(2):  # Again it is all there.
    *_, answers = [answer(n) for n in range(shards)]
    assert [answer.prompt for answer in answers or ()] == texts
    assert len(chats('moe').seen) == 3
  lines = (tmp_path / 'a.jsonl').read_text().splitlines()
  (tmp_path / 'a.jsonl').write_text(
      ''.join(f'{x}\n' for x in lines + lines[:1])
  )
  with pytest.raises(base.EvalError, match="question 'a' is answered twice"):
    answer(0)


def _mmbench(path, second='Which?'):
  buffer = io.BytesIO()
  Image.new('RGB', (60, 40), 'red').save(buffer, 'PNG')
  image = base64.b64encode(buffer.getvalue()).decode()
  return tables.write(
      path,
      [
          {
              'index': index,
              'question': question,
              'A': a,
              'B': b,
              'answer': answer,
              'image': image if index == '1' else '1',
          }
          for index, question, a, b, answer in (
              ('1', 'Which?', 'red', 'blue', 'A'),
              ('1000001', second, 'blue', 'red', 'B'),
          )
      ],
  )


def test_a_table_with_images_is_asked_scored_and_submitted(
    chats, options, tmp_path
):
  asked = options(
      benchmark='mmbench',
      questions=_mmbench(tmp_path / 'dev.tsv'),
      submission=str(tmp_path / 'up' / 'moe.xlsx'),
  )
  chats(asked.model[0]).reply = lambda request: (
      'A' if 'A. red' in request.turns[0][1] else 'B'
  )
  run.evaluate(asked)
  folder = tmp_path / 'out' / 'images' / 'dev'
  assert [r.images for r in chats(asked.model[0]).seen] == 2 * [
      (str(folder / '1.jpg'),)
  ]
  entry = _scores(tmp_path)['moe']['none']['mmbench']
  assert (entry['accuracy'], entry['rows']) == (1.0, 2)
  assert tables.read_xlsx(tmp_path / 'up' / 'moe.xlsx')[2][:2] == [
      1000001,
      'Which?',
  ]


def test_what_cannot_be_asked_is_found_before_the_first_answer(
    chats, options, tmp_path
):
  questions = _mmbench(tmp_path / 'dev.tsv', 'Which <image>, <image> or none?')
  asked = options(benchmark='mmbench', questions=questions, batch_size=1)
  with pytest.raises(
      base.EvalError,
      match=r'dev: questions that cannot be asked: 1 .*1000001.*2 <image> marks',
  ):
    run.evaluate(asked)
  assert chats(asked.model[0]).seen == []


def test_questions_beyond_the_positions_are_asked_with_a_warning(
    chats, options, questions, images, write_jsonl, tmp_path, capsys
):
  questions[3]['text'] += ' Or a cat?'
  questions[4]['text'] += ' Or a dog, and ' + 200 * 'very ' + 'old?'
  path = write_jsonl('pope.jsonl', questions)
  asked = options(questions=path, images=images)
  chat = chats(asked.model[0])
  # An image is 10, the others' words are 4, and POPE's answers 128.
  chat.max_positions = 142
  run.evaluate(asked)
  assert len(chat.seen) == 5
  assert {call[1] for call in chat.calls} == {128}
  (warning,) = [
      line for line in capsys.readouterr().err.splitlines() if '142' in line
  ]
  assert (
      'with 128 new tokens 2 of 5 questions take more than the 142' in warning
  )
  assert '1 of them by the question alone (the longest: 219)' in warning


def test_an_image_aspect_is_recorded_and_not_mixed(
    chats, options, questions, images, write_jsonl, tmp_path
):
  path = _pope(write_jsonl, questions)
  asked = options(questions=path, images=images)
  square = dataclasses.replace(asked, image_aspect='square')
  run.evaluate(asked)
  assert 'image_aspect' not in _scores(tmp_path)['moe']['none']['pope']
  with pytest.raises(
      base.EvalError, match="image_aspect None, but this run has 'square'"
  ):
    run.evaluate(square)
  chat = chats(asked.model[0])
  assert chat.aspects == 5 * ['pad']  # As in training.

  answers = tmp_path / 'out' / 'moe.pope.jsonl'
  answers.unlink()
  run.evaluate(square)
  assert chat.aspects[5:] == 5 * ['square']
  assert _scores(tmp_path)['moe']['none']['pope']['image_aspect'] == 'square'
  with pytest.raises(
      base.EvalError, match="image_aspect 'square', but this run has None"
  ):
    run.evaluate(asked)
  (tmp_path / 'out' / 'scores.json').unlink()
  scored = options(questions=path, model=[], answers=[str(answers)])
  run.evaluate(scored)
  assert _scores(tmp_path)['moe']['none']['pope']['image_aspect'] == 'square'
  with pytest.raises(base.EvalError, match='--image_aspect: goes with --model'):
    run.evaluate(dataclasses.replace(scored, image_aspect='pad'))


def test_a_test_set_is_answered_for_its_server(
    chats, options, images, write_jsonl, tmp_path, capsys
):
  row = {'question_id': 1, 'image': 'a.png', 'text': 'Q', 'category': 'c'}
  asked = options(
      benchmark='vizwiz',
      questions=write_jsonl('test.jsonl', [row]),
      images=images,
      submission=str(tmp_path / 'up.json'),
  )
  chats(asked.model[0])
  run.evaluate(asked)
  assert 'answers written. The VizWiz test set' in capsys.readouterr().out
  assert json.loads((tmp_path / 'up.json').read_text()) == [
      {'image': 'a.png', 'answer': 'yes'}
  ]
  assert not (tmp_path / 'out' / 'scores.json').exists()
  answers = [str(tmp_path / 'out' / 'moe.test.jsonl')]
  again = dataclasses.replace(
      asked, model=[], answers=answers, submission=str(tmp_path / 'again.json')
  )
  run.evaluate(again)
  assert 'moe, control none: The VizWiz test set' in capsys.readouterr().out
  assert (tmp_path / 'again.json').read_text() == (
      tmp_path / 'up.json'
  ).read_text()
  # To score alone what cannot be scored is a mistake.
  with pytest.raises(base.UnscoredError, match='--annotations=val.json'):
    run.evaluate(dataclasses.replace(again, submission=None))


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'questions': None}, 'Give --questions=FILE'),
        ({'submission': 'x'}, 'pope has no submission; .* gqa, mmbench'),
        ({'judge_model': 'x'}, 'pope is scored by rules; drop --judge_url'),
        (
            {'benchmark': 'mmvet', 'judge_model': 'x'},
            'Give both --judge_url and --judge_model',
        ),
        (
            {
                'benchmark': 'mmvet',
                'judge_model': 'x',
                'judge_url': 'file:///etc/passwd',
            },
            'file:///etc/passwd: expected http',
        ),
        (
            {
                'benchmark': 'mmvet',
                'judge_model': 'x',
                'judge_url': 'http://127.0.0.1:1/v1',
                'judge_prices': ['30'],
            },
            '--judge_prices=30: expected the dollars',
        ),
        (
            {
                'benchmark': 'mmvet',
                'judge_model': 'x',
                'judge_url': 'http://127.0.0.1:1/v1',
                'out': None,
            },
            'Give --out=DIR, where the replies are kept',
        ),
        (
            {
                'benchmark': 'gqa',
                'questions': 'Q',
                'annotations': 'A',
                'control': ['none', 'blank_image'],
                'submission': 'x',
            },
            '--submission is one file; give one --model and one --control',
        ),
    ],
)
def test_a_mistake_in_the_flags_is_found_at_once(
    chats, options, write_jsonl, tmp_path, changes, message
):
  row = {'question_id': 1, 'image': None, 'text': 'Q', 'category': 'c'}
  entry = {'isBalanced': True, 'answer': 'x'}
  (tmp_path / 'gqa.json').write_text(json.dumps({'1': entry}))
  files = {
      'Q': write_jsonl('q.jsonl', [{**row, 'question_id': '1'}]),
      'A': str(tmp_path / 'gqa.json'),
  }
  changes = {
      key: files.get(value, value) if isinstance(value, str) else value
      for key, value in {'questions': 'Q', **changes}.items()
  }
  with pytest.raises(base.EvalError, match=message):
    run.evaluate(options(**changes))
  assert not chats.loaded


def test_the_command_grades_with_a_judge_and_draws_the_paper(
    tmp_path, write_jsonl, judge_server
):
  official = {'question': 'x?', 'answer': 'y', 'capability': ['ocr']}
  (tmp_path / 'mm-vet.json').write_text(json.dumps({'v1_0': official}))
  row = {'question_id': 0, 'image': 'a.png', 'text': 'x?', 'category': 'c'}
  answer = {'question_id': 0, 'prompt': 'x?', 'text': 'y', 'model_id': 'moe'}
  flags = (
      '--benchmark=mmvet',
      f'--questions={write_jsonl("q.jsonl", [row])}',
      f'--answers={write_jsonl("a.jsonl", [answer])}',
      f'--annotations={tmp_path}/mm-vet.json',
      f'--out={tmp_path}/out',
      f'--judge_url={judge_server.url}',
      '--judge_model=gpt-4-0613',
      '--judge_prices=30,60',
  )
  judge_server.reply = lambda body, n: '0.7'
  stopped = _command(*flags)
  assert stopped.returncode == 1
  assert 'Nothing was sent. Repeat the command with --yes' in stopped.stderr
  assert '1 requests, 0 kept' in stopped.stdout
  assert judge_server.bodies == []
  done = _command(*flags, '--yes')
  assert done.returncode == 0, done.stderr
  entry = _scores(tmp_path)['moe']['none']['mmvet']
  assert (entry['total'], entry['judge']) == (70.0, 'gpt-4-0613')

  done = _command(
      '--benchmark=paper',
      f'--out={tmp_path}/out',
      '--server_score=moe:vqav2:76.5',
  )
  assert done.returncode == 0, done.stderr
  assert ['moe', '-', '-', '76.5', *6 * '-', '-', '70.0'] in [
      line.split() for line in done.stdout.splitlines()
  ]
  assert (tmp_path / 'out' / 'pope_by_activated_parameters.svg').exists()
  missing = _command('--benchmark=paper', f'--scores={tmp_path}/gone')
  assert missing.returncode == 1
  assert missing.stderr.startswith('error: --scores=')


def test_answers_swapped_between_questions_of_an_image_are_others():
  yes, no = (
      [
          base.Answer(1, prompt, text, '', '', {})
          for prompt, text in zip('ab', texts, strict=True)
      ]
      for texts in (('Yes', 'No'), ('No', 'Yes'))
  )
  assert run._digest({'q': yes}) == run._digest({'q': yes[::-1]})
  assert run._digest({'q': yes}) != run._digest({'q': no})
