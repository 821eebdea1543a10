"""Silence on the command line: what libraries say while they load."""

from __future__ import annotations

import os
import sys


def quiet() -> None:
    """Silence what libraries say while loading; our own notes remain."""
    import logging as python_logging
    import warnings

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)
    warnings.filterwarnings("ignore")


def quiet_datasets() -> None:
    """No progress bars of `datasets` where nobody watches; call it before the first import."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
