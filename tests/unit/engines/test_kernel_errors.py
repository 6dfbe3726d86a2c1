"""What is said about a failed kernel: the words of torch, CUDA and Triton, and none that could be a row's."""

from __future__ import annotations

import pytest

from gxr_batch.engines.slots.row_steps import device_failed, in_words
from gxr_batch.models.device_memory import out_of_memory

CUDA = "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(CUDA), "RuntimeError: CUDA error: an illegal memory access was encountered"),
        (RuntimeError("x" * 1000), f"RuntimeError: {'x' * 200}"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("a finding"), "ValueError"),
        (UnicodeEncodeError("utf-8", "a finding", 0, 1, "a reason"), "UnicodeEncodeError"),
    ],
)
def test_an_error_has_the_words_of_libraries_that_know_no_row(error, words):
    assert in_words(error) == words
    assert words in str(device_failed(error))


def test_triton_tells_in_words_that_memory_ran_out():
    assert out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not out_of_memory(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
