"""What several test files share: the demo model, prepared once, and its tokenizer, loaded once."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest

# As the command line has it: threads that wait sleep instead of spinning, which on a busy machine is many times faster.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
pytest.register_assert_rewrite("engine_contract")

with suppress(ImportError):  # the environment for vLLM has no Hypothesis
    from hypothesis import settings

    # A property either holds or not; how long an example takes is a matter of the machine.
    settings.register_profile("any machine", deadline=None)
    settings.load_profile("any machine")


@pytest.fixture
def one_thread():
    """Tiny products on many threads spend their time waiting for the threads, especially on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_model_dir():
    """The folder of the converted demo model, in the user's own cache, so that it is converted once a machine."""
    from gxr_batch.models.demo import ensure_demo_model

    return ensure_demo_model()


@pytest.fixture(scope="session")
def gemma_tokenizer(demo_model_dir):
    """The real Gemma 3 tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_dir)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, gemma_tokenizer):
    """The tiny random Gemma 3 with its window of 8 tokens as a model folder with the real tokenizer."""
    from tiny import tiny_gemma

    folder = tmp_path_factory.mktemp("tiny") / "tiny-gemma"
    tiny_gemma().save_pretrained(folder)
    gemma_tokenizer.save_pretrained(folder)
    return folder
