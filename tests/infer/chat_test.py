# SPDX-License-Identifier: Apache-2.0
"""`moellava_jax.load(DIR).chat(...)`: turns, batches, pieces, stop, traces."""

import dataclasses
import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

import moellava_jax
from moellava_jax import checkpoint, config, sharding, trees
from moellava_jax.data import images as images_lib
from moellava_jax.data import templates
from moellava_jax.evals import ask, base
from moellava_jax.infer import chat as chat_lib
from moellava_jax.infer import generate, requests, sampling, verify
from moellava_jax.model import llava
from tests import tiny

RED = Image.new('RGB', (9, 7), 'red')
# As long as a conversation of two turns with its answer, for one bucket.
QUESTION = 'Which colour is it?'
GREEN = Image.new('RGB', (20, 30), 'green')
ASK = {'max_new_tokens': 8}
HOT = {**ASK, 'temperature': 1.5}


def test_a_batch_equals_its_questions_one_by_one(chat, tmp_path):
  RED.save(tmp_path / 'red.png')
  images = [tmp_path / 'red.png', GREEN, RED]
  texts = [QUESTION, QUESTION.upper(), QUESTION[::-1]]
  for options in (ASK, HOT):
    # As four rows, which the mesh of another test divides.
    requests_N = [
        requests.conversation(*pair, ())
        for pair in zip(images, texts, strict=True)
    ]
    together = chat.generate(requests_N, **options, batch_size=4)
    alone = [
        chat.chat(image, text, **options, seed=n)
        for n, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    assert together == alone
  assert len(set(together)) == len(together)


def test_a_list_of_texts_is_a_batch(chat):
  (found,) = chat.chat([RED], [QUESTION], **HOT)
  assert found == chat.chat(RED, QUESTION, **HOT)


def test_pieces_are_the_answer_and_come_one_by_one(chat):
  answer = chat.chat(RED, QUESTION, **HOT)
  pieces = list(chat.chat(RED, QUESTION, **HOT, stream=True))
  assert ''.join(pieces) == answer
  assert len(pieces) > 2


def test_a_stop_string_ends_an_answer(chat):
  answer = chat.chat(RED, QUESTION, **HOT)
  stop = answer[3:5]
  expected = answer[: answer.index(stop)].strip()
  assert chat.chat(RED, QUESTION, **HOT, stop=(stop,)) == expected
  assert chat.chat(RED, QUESTION, **HOT, stop=stop) == expected
  found = chat.chat(RED, QUESTION, **HOT, stop=(stop,), stream=True)
  assert ''.join(found) == expected


def test_the_template_brings_its_stop_string(chat):
  assert chat.stop == ()  # It is the end token.
  assert chat._replace(template=templates.get('v0')).stop == ('###',)
  answer = chat.chat(RED, QUESTION, **HOT)
  # A question is followed by no `sep2`, so that the prompt stays.
  other = dataclasses.replace(chat.template, sep2=answer[3:5])
  expected = answer[: answer.index(answer[3:5])].strip()
  assert chat._replace(template=other).chat(RED, QUESTION, **HOT) == expected


def test_history_comes_before_and_images_with_its_first_question():
  asked = requests.conversation(RED, 'And now?', [('Is it red?', 'Yes')])
  assert asked.turns == (
      ('human', '<image>\nIs it red?'),
      ('gpt', 'Yes'),
      ('human', 'And now?'),
  )
  placed = requests.conversation(
      [RED, GREEN], 'Like <image>?', [('Is <image> red?', 'Yes')]
  )
  assert [words for _, words in placed.turns][::2] == [
      'Is <image> red?',
      'Like <image>?',
  ]
  assert placed.images == (RED, GREEN)


def test_a_turn_is_answered_as_the_whole_conversation(chat):
  found = chat.chat(RED, 'No', history=[('red?', 'Yes')], **HOT)
  turns = (
      ('human', '<image>\nred?'),
      ('gpt', 'Yes'),
      ('human', 'No'),
  )
  request = chat_lib.Request(turns, (RED,))
  assert chat.generate([request], **HOT, batch_size=1) == [found]
  assert chat.chat(RED, QUESTION, **HOT) != found


def test_the_trace_of_generation_is_that_of_the_whole_conversation(chat):
  request = requests.conversation(RED, QUESTION, ())
  (answer,) = chat.answer(
      [request],
      [sampling.Options(temperature=1.5)],
      **ASK,
      batch_size=1,
      trace=True,
  )
  made = answer.routing
  assert made is not None
  prompt = chat.encode(request)
  length = len(prompt.tokens_L)
  # The eighth token is not routed: nothing follows it.
  assert made.is_answer_T.tolist() == [False] * length + [True] * 7
  assert made.is_image_T.sum() == chat.model.cfg.vision.num_tokens
  whole = chat_lib.tracing.trace(
      chat.model,
      chat.params,
      prompt._replace(tokens_L=made.tokens_T),
      length,
      chat.mesh,
  )
  assert made.layers == whole.layers == (0,)
  np.testing.assert_array_equal(made.choice_MTk, whole.choice_MTk)
  np.testing.assert_array_equal(made.kept_MTk, whole.kept_MTk)
  np.testing.assert_allclose(made.weight_MTk, whole.weight_MTk, atol=1e-5)
  assert len(np.unique(made.choice_MTk)) > 1


def test_trace_includes_the_answer(chat):
  traced = chat.trace(RED, QUESTION, 'Yes')
  text = chat.tokenizer.decode(traced.tokens_T[traced.is_answer_T])
  assert text.strip() == 'Yes'
  assert traced.tokens_T[-1] == chat.tokenizer.eos_id
  own = chat.trace(RED, QUESTION, **ASK)
  text = chat.tokenizer.decode(own.tokens_T[own.is_answer_T])
  assert text.strip() == chat.chat(RED, QUESTION, **ASK)


def test_the_door_splits_a_model_over_a_mesh(checkpoint_dir, chat):
  sizes = {'data': 1, 'fsdp': 2, 'expert': 2, 'tensor': 2}
  mesh = sharding.make_mesh(
      dataclasses.replace(tiny.train_config().mesh, **sizes)
  )
  split = moellava_jax.load(checkpoint_dir, mesh=mesh)
  kernel = split.params['llm']['layers_0']['moe']['experts']['fc1']['kernel']
  assert kernel.addressable_shards[0].data.size * 8 == kernel.size
  assert split.digest == chat.digest
  asked = [requests.conversation(image, QUESTION, ()) for image in (RED, GREEN)]
  expected = chat.generate(asked, **ASK, batch_size=4)
  assert split.generate(asked, **ASK, batch_size=4) == expected


def test_a_model_trained_with_a_kernel_answers_without_one(
    checkpoint_dir, chat, tmp_path
):
  copy = tmp_path / 'moe' / 'final'
  shutil.copytree(checkpoint_dir, copy)
  saved = json.loads((copy / 'config.json').read_text())
  assert saved['model']['attention'] == 'auto'
  saved['model']['attention'] = 'flash'
  (copy / 'config.json').write_text(json.dumps(saved))
  there = chat_lib.load(str(copy))
  assert there.chat(RED, QUESTION, **ASK) == chat.chat(RED, QUESTION, **ASK)
  for ours, theirs in zip(
      verify.our_logits(str(copy))[1:],
      verify.our_logits(checkpoint_dir)[1:],
      strict=True,
  ):
    np.testing.assert_equal(ours, theirs)


@pytest.mark.parametrize(
    'image, text, options, message',
    [
        (RED, '<image> <image>?', {}, '2 <image> marks, but 1 images'),
        ('gone.png', 'Hi', {}, "'gone.png' does not exist"),
        (RED, ['Hi', 'Ho'], {}, 'one image for 2 texts'),
        ([RED], ['Hi', 'Ho'], {}, '1 entries of images for 2 texts'),
        (None, ['Hi'], {'stream': True}, 'stream=True goes with one text'),
        (None, ['Hi'], {'history': [('a', 'b')]}, 'history of 1 turns'),
        (None, 'Hi', {'max_new_tokens': 0}, 'max_new_tokens=0'),
        (None, 'Hi', {'temperature': -1.0}, 'temperature=-1.0'),
        (None, 'Hi', {'temperature': float('nan')}, 'temperature=nan'),
        (None, 'Hi', {'top_p': 0.0}, 'top_p=0.0'),
        (None, 'Hi', {'top_k': -1}, 'top_k=-1'),
        # Now, and not when the first piece is asked for.
        (None, 'Hi', {'top_k': -1, 'stream': True}, 'top_k=-1'),
    ],
)
def test_what_cannot_be_is_named(chat, image, text, options, message):
  with pytest.raises(config.UserError, match=message):
    chat.chat(image, text, **{'max_new_tokens': 4, **options})


def test_a_conversation_that_is_too_long_is_refused_before_it_is_asked(chat):
  length = len(chat.encode(requests.conversation(RED, QUESTION, ())).tokens_L)
  short = chat._replace(max_positions=length + 8)
  assert short.chat(RED, QUESTION, **ASK) == chat.chat(RED, QUESTION, **ASK)
  message = f'9 new tokens takes {length + 9} positions, .* for {length + 8}'
  for options in ({}, {'stream': True}):
    with pytest.raises(config.UserError, match=message):
      short.chat(RED, QUESTION, max_new_tokens=9, **options)


def test_positions_are_those_of_the_prompt_without_its_images(chat):
  there = requests.conversation([RED, GREEN], QUESTION, ())
  gone = requests.conversation(['gone.png', 'lost.png'], QUESTION, ())
  assert chat.positions(gone) == len(chat.encode(there).tokens_L)
  with pytest.raises(config.UserError, match='0 <image> marks, but 1 images'):
    chat.positions(chat_lib.Request((('human', 'Hi'),), ('gone.png',)))


def test_an_evaluation_goes_on_beyond_the_positions(chat, tmp_path):
  RED.save(tmp_path / 'red.png')
  asked = requests.conversation(tmp_path / 'red.png', QUESTION, ())
  short = chat._replace(max_positions=chat.positions(asked) + 3)
  with pytest.raises(config.UserError, match='was made for'):
    short.generate([asked], **ASK)
  found = ask.run(
      short,
      [base.Question(7, 'red.png', QUESTION, 'c', None, {})],
      str(tmp_path),
      tmp_path / 'answers.jsonl',
      'none',
      ask.Settings(
          ASK['max_new_tokens'],
          temperature=0.0,
          batch_size=1,
          routing_trace=False,
      ),
      model_id='moe',
  )
  assert found is not None
  assert [a.text for a in found] == [chat.chat(RED, QUESTION, **ASK)]


def test_an_image_is_shown_as_in_training_or_as_asked(chat):
  wide = Image.radial_gradient('L').resize((90, 30)).convert('RGB')
  vision = chat.model.cfg.vision
  request = requests.conversation(wide, QUESTION, ())

  def pixels(aspect):
    return images_lib.preprocess(
        wide, vision.image_size, aspect, vision.resize, vision.mean
    )

  assert (pixels('pad') != pixels('square')).any()
  shown = {
      aspect: chat._replace(image_aspect=aspect).encode(request).images_IHWC[0]
      for aspect in ('pad', 'square')
  }
  for aspect, pixels_HWC in shown.items():
    np.testing.assert_array_equal(pixels_HWC, pixels(aspect))
  trained = (
      chat.config.stage('moe').image_aspect or chat.config.data.image_aspect
  )
  np.testing.assert_array_equal(
      chat.encode(request).images_IHWC[0], shown[trained]
  )


@pytest.mark.parametrize('aspect', ['pad', 'square'])
@pytest.mark.parametrize('resize', ['short_edge', 'exact'])
def test_a_shrunk_image_is_asked_about_as_the_whole(chat, aspect, resize):
  model = chat.model.cfg
  model = dataclasses.replace(
      model, vision=dataclasses.replace(model.vision, resize=resize)
  )
  chat = chat._replace(model=llava.Llava(model), image_aspect=aspect)
  noise = np.random.default_rng(0).integers(0, 256, (50, 170, 4), np.uint8)
  for mode in ('RGB', 'RGBA', 'L', 'P'):
    image = Image.fromarray(noise).convert(mode)
    small = chat.shrink(image)
    assert small.size == (model.vision.image_size,) * 2
    whole, again = (
        chat.encode(requests.conversation(one, QUESTION, ()))
        for one in (image, small)
    )
    np.testing.assert_array_equal(again.images_IHWC, whole.images_IHWC)


def test_a_dense_model_has_no_trace(dense_dir):
  dense = chat_lib.load(dense_dir)
  with pytest.raises(config.UserError, match='is a dense model'):
    dense.trace(RED, 'Is it red?', 'Yes')


def test_stop_strings_and_options_compile_nothing(chat):
  def compiled():
    return generate._start._cache_size(), generate._advance._cache_size()

  chat.chat(RED, QUESTION, **ASK)
  before = compiled()
  chat.chat(RED, QUESTION[::-1], **HOT, top_k=3, top_p=0.5, seed=9)
  chat.chat(RED, QUESTION[::-1], **ASK, stop=('e', '<|extra_0|>'))
  chat.chat(RED, QUESTION[:-2], max_new_tokens=5)
  list(chat.chat(RED, QUESTION, **ASK, stream=True))
  assert compiled() == before


def test_kernels_are_held_as_products_take_them(
    checkpoint_dir, tmp_path, monkeypatch
):
  """Half of the bytes, never all of them: the same logits and digest."""
  path = tmp_path / 'final'
  shutil.copytree(checkpoint_dir, path)
  cfg = json.loads((path / 'config.json').read_text())
  cfg['model']['compute_dtype'] = 'bfloat16'
  (path / 'config.json').write_text(json.dumps(cfg))
  whole = checkpoint.load(str(path)).params
  held, stored_dtype = [], llava.stored_dtype

  def counted(*given):
    held.append(sum(x.nbytes for x in jax.live_arrays()))
    return stored_dtype(*given)

  monkeypatch.setattr(checkpoint, '_PART', 1)  # One array at a time.
  monkeypatch.setattr(llava, 'stored_dtype', counted)
  before = sum(x.nbytes for x in jax.live_arrays())
  chat = chat_lib.load(str(path))
  assert chat.digest == checkpoint.fingerprint(whole)
  leaves = trees.flatten(chat.params)
  for name, leaf in leaves.items():
    fp32 = '/router/' in name or not name.endswith('kernel')
    assert leaf.dtype == ('float32' if fp32 else 'bfloat16'), name
  largest = max(x.nbytes for x in jax.tree.leaves(whole))
  kept = sum(leaf.nbytes for leaf in leaves.values())
  assert max(held) - before <= kept + largest
  assert kept + largest < sum(x.nbytes for x in jax.tree.leaves(whole))
  data = tiny.batch(chat.model.cfg, rows=8)
  logits = [
      tiny.forward(chat.model.cfg, params, data).logits_BTV
      for params in (whole, jax.device_put(chat.params, jax.devices()[0]))
  ]
  np.testing.assert_array_equal(*logits)
  stored = trees.flatten(chat_lib.load(str(path), as_stored=True).params)
  assert {x.dtype.name for x in stored.values()} == {'float32'}
