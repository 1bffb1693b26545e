# SPDX-License-Identifier: Apache-2.0
"""How the page of a chat looks, in Gradio, which is imported where it is used."""

from collections.abc import Sequence

from moellava_jax.serve import experts, page, talk

_AT_ONCE = 4  # Answers being written; each has a cache of its own.
_WAITING = 32  # Browsers that may wait for one of these.
_KEEP_SECONDS = 24 * 3600  # Uploads.
_USUAL_ANSWER = 256  # Tokens, to begin with.

CSS = experts.CSS + """
#chat [data-testid=user] img { width: 150px; height: 150px;
  object-fit: contain; }
/* It would send the conversation to another site. */
#chat [aria-label=Share] { display: none; }
#examples > .gallery { display: flex; flex-flow: row wrap; gap: 8px; }
#examples .gallery-item p { font-size: var(--text-sm); }
#examples .gallery-item img { width: 48px; height: 48px; }
"""


def blocks(shown: page.Page, questions: Sequence[tuple[str, str]]):
  """The page as `gradio.Blocks`.

  Args:
    shown: what it does.
    questions: (question, image file) pairs to begin with.
  """
  import gradio as gr

  with gr.Blocks(
      title=shown.title,
      analytics_enabled=False,
      fill_width=True,
      delete_cache=(3600, _KEEP_SECONDS),
  ) as demo:
    gr.Markdown(f'## {shown.title}')
    told = gr.State(talk.Talk())
    with gr.Row():
      with gr.Column(scale=3):
        chatbot, box = _conversation(gr, questions)
      with gr.Column(scale=2, min_width=340):
        temperature, length, stop, clear = _controls(gr, shown.max_new_tokens)
        bars, layer, chips = _experts(gr, shown)
    outputs = [chatbot, told, bars, chips]
    asked = box.submit(
        shown.ask,
        [box, told, temperature, length],
        [box, *outputs],
        concurrency_limit=_AT_ONCE,
        concurrency_id='model',
        api_visibility='private',
        show_progress='hidden',
    )
    asked.then(
        shown.trace,
        [told, layer],
        outputs,
        concurrency_limit=_AT_ONCE,
        concurrency_id='model',
        api_visibility='private',
        show_progress='hidden',
    )
    # At once, also while all places in the queue are taken.
    stop.click(shown.stop, [told], queue=False, api_visibility='private')
    gr.on(
        [clear.click, chatbot.clear],
        shown.clear,
        [told],
        outputs,
        queue=False,
        api_visibility='private',
        show_progress='hidden',
    )
    layer.change(
        shown.show,
        [told, layer],
        chips,
        queue=False,
        api_visibility='private',
        show_progress='hidden',
    )
  return demo.queue(max_size=_WAITING)


def _conversation(gr, questions):
  chatbot = gr.Chatbot(
      label='Conversation',
      height=480,
      buttons=['copy_all'],
      allow_tags=False,
      allow_file_downloads=False,
      feedback_options=None,
      placeholder='Attach an image below, and ask about it.',
      elem_id='chat',
  )
  box = gr.MultimodalTextbox(
      show_label=False,
      placeholder='Ask something',
      sources=['upload'],
      file_types=['image'],
      file_count='multiple',
      max_plain_text_length=10**6,  # Beyond, pasted text becomes a file.
      autofocus=True,
      elem_id='box',
  )
  if questions:
    gr.Examples(
        [[{'text': text, 'files': [path]}] for text, path in questions],
        box,
        label='Examples',
        api_visibility='private',
        elem_id='examples',
    )
  return chatbot, box


def _controls(gr, most: int):
  temperature = gr.Slider(
      0,
      page.MOST_TEMPERATURE,
      0,
      step=0.1,
      label='Temperature (0: always the likeliest token)',
      elem_id='temperature',
  )
  length = gr.Slider(
      1,
      most,
      min(_USUAL_ANSWER, most),
      step=1,
      label='Longest answer (tokens)',
      elem_id='length',
  )
  with gr.Row():
    stop = gr.Button('Stop', variant='stop', elem_id='stop')
    clear = gr.Button('Clear', elem_id='clear')
  return temperature, length, stop, clear


def _experts(gr, shown: page.Page):
  gr.Markdown('### Experts of the last answer')
  start = shown.empty()
  bars = gr.HTML(start[0], elem_id='bars')
  layer = gr.Dropdown(
      [(f'layer {n}', n) for n in shown.layers],
      value=shown.layers[0] if shown.layers else None,
      label='Tokens in',
      visible=len(shown.layers) > 1,
      elem_id='layer',
  )
  return bars, layer, gr.HTML(start[1], elem_id='chips')
