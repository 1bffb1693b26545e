# SPDX-License-Identifier: Apache-2.0
"""Generation: right requests, rows of the original's layout, resumable."""

import json

import pytest

from moellava_jax.evals import ask, base

SETTINGS = ask.Settings(
    max_new_tokens=4, temperature=0.0, batch_size=2, routing_trace=False
)


@pytest.fixture
def ask_all(chats, questions, images, write_jsonl, tmp_path):
  """Runs the five questions with a named model into one answers file."""
  asked = base.read_questions(write_jsonl('q.jsonl', questions))

  def run(model='moe', control='none', settings=SETTINGS, asked=asked):
    return ask.run(
        chats(model),
        asked,
        images,
        tmp_path / 'out' / 'a.jsonl',
        control,
        settings,
        model_id=model,
    )

  run.path = tmp_path / 'out' / 'a.jsonl'
  run.asked = asked
  return run


def test_each_question_is_asked_with_its_image(ask_all, chats, images):
  chats('moe').reply = lambda request: f' {request.images[0][-5]}\n'
  answers = ask_all()
  assert [a.text for a in answers] == list('abcde')
  assert chats('moe').seen[1] == (
      (('human', '<image>\nIs there a b?'),),
      (f'{images}/b.png',),
  )
  # Batches of 2, 2 and 1: tokens and temperature as set, and seeds differ.
  assert chats('moe').calls == [(2, 4, 0.0, 0), (2, 4, 0.0, 2), (1, 4, 0.0, 4)]


def test_a_text_only_question_has_no_image_mark(ask_all, chats):
  ask_all(asked=[base.Question(0, None, 'Hi', 'c', None, {})])
  assert chats('moe').seen == [((('human', 'Hi'),), ())]


def test_rows_have_the_layout_of_the_original(ask_all):
  ask_all()
  row = json.loads(ask_all.path.read_text().splitlines()[0])
  assert list(row) == [
      'question_id',
      'prompt',
      'text',
      'answer_id',
      'model_id',
      'metadata',
  ]
  assert row['prompt'] == 'Is there a a?'
  assert row['model_id'] == 'moe'
  assert row['metadata'] == {
      'digest': 'digest-of-moe',
      'control': 'none',
      'image': 'a.png',
      'max_new_tokens': 4,
      'temperature': 0.0,
  }


def test_a_killed_run_goes_on_where_it_was(ask_all, chats):
  ask_all()
  whole = ask_all.path.read_bytes()
  ask_all.path.unlink()
  chats('moe').seen.clear()

  chats('moe').dies_at = 4
  with pytest.raises(KeyboardInterrupt):
    ask_all()
  assert whole.startswith(ask_all.path.read_bytes())
  with ask_all.path.open('ab') as file:
    file.write(b'{"question_id": 4, "pro')  # The kill hit a write.
  chats('moe').dies_at = None
  chats('moe').seen.clear()
  answers = ask_all()
  assert len(chats('moe').seen) == 1
  assert ask_all.path.read_bytes() == whole
  assert [a.question_id for a in answers] == [0, 1, 2, 3, 4]


def test_a_finished_run_asks_nothing(ask_all, chats):
  first = ask_all()
  chats('moe').seen.clear()
  assert ask_all() == first
  assert chats('moe').seen == []


def test_answers_of_another_model_are_not_continued(ask_all):
  ask_all(model='moe')
  before = ask_all.path.read_bytes()
  with pytest.raises(
      base.EvalError, match="line 1: answered with digest 'digest-of-moe'"
  ):
    ask_all(model='dense')
  assert ask_all.path.read_bytes() == before


@pytest.mark.parametrize(
    'change, message',
    [
        ({'control': 'blank_image'}, "control 'none'.*'blank_image'"),
        (
            {'settings': SETTINGS._replace(max_new_tokens=9)},
            'max_new_tokens 4, but this run has 9',
        ),
    ],
)
def test_answers_of_other_settings_are_not_continued(ask_all, change, message):
  ask_all()
  with pytest.raises(base.EvalError, match=message):
    ask_all(**change)


def test_answers_of_other_questions_are_neither_continued_nor_cut(ask_all):
  ask_all()
  with ask_all.path.open('ab') as file:
    file.write(b'{"torn')
  before = ask_all.path.read_bytes()
  other = [base.Question(0, None, 'Something else', 'c', None, {})]
  with pytest.raises(base.EvalError, match='line 1: question 0 is not one of'):
    ask_all(asked=other)
  assert ask_all.path.read_bytes() == before


def test_batch_size_may_change_between_runs(ask_all, chats):
  chats('moe').dies_at = 2
  with pytest.raises(KeyboardInterrupt):
    ask_all()
  chats('moe').dies_at = None
  answers = ask_all(settings=SETTINGS._replace(batch_size=64))
  assert len(answers) == 5


def test_a_doubled_line_is_named(ask_all):
  ask_all()
  lines = ask_all.path.read_text().splitlines(keepends=True)
  ask_all.path.write_text(''.join([*lines, lines[2]]))
  with pytest.raises(base.EvalError, match='line 6: question 2 is answered tw'):
    ask_all()


def test_the_blank_control_reaches_the_model(ask_all, chats):
  ask_all(control='blank_image')
  sizes = [request.images[0].size for request in chats('moe').seen]
  assert sizes == [(10 + i, 20) for i in range(5)]


def test_the_shuffled_control_reaches_the_model_and_the_file(ask_all, chats):
  answers = ask_all(control='shuffled_image')
  for question, request, answer in zip(
      ask_all.asked, chats('moe').seen, answers, strict=True
  ):
    assert not request.images[0].endswith(question.image)
    assert request.images[0].endswith(answer.metadata['image'])


def test_missing_images_are_listed_before_anything_is_asked(
    ask_all, chats, tmp_path
):
  for name in 'bd':
    (tmp_path / 'images' / f'{name}.png').unlink()
  with pytest.raises(
      base.EvalError, match=r"of 5 images, missing: 2 \('b.png', 'd.png'\)"
  ):
    ask_all()
  assert chats('moe').seen == []


def test_a_question_whose_image_cannot_be_read_is_named(ask_all, chats, images):
  chats('moe').unreadable = (f'{images}/d.png',)
  with pytest.raises(
      base.EvalError, match='^Question 3: an image cannot be read'
  ):
    ask_all()
  assert len(ask_all.path.read_text().splitlines()) == 2


def test_progress_is_plain_lines_off_a_terminal(ask_all, capsys):
  ask_all()
  lines = capsys.readouterr().err.splitlines()
  assert [line.split(',')[0] for line in lines] == [
      'a.jsonl: 2/5',
      'a.jsonl: 4/5',
      'a.jsonl: 5/5',
  ]
