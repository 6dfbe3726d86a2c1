"""Prompts with the real Gemma tokenizer: one BOS, only our control tokens, exactly the guide's layout."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gxr_batch.errors import RowError
from gxr_batch.models.tokens import ChatEncoder
from gxr_batch.records import Messages, Turn

pytestmark = pytest.mark.model

# Equivalent to Google's own template, written for these tests: no system role, texts trimmed.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
# Other families: one keeps the blanks around a text, the other trims them and begins with BOS.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "<|im_start|>assistant\n"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}<|head|>assistant<|/head|>\n\n"
)
CONTROLS = ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>"]


def byte_level(template: str, *, special: bool = True):
    """Return a small byte-level tokenizer, whose control tokens are marked as such or not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["user assistant system \n\n the lungs are clear ▁ Ġ"] * 9, trainer)
    marks = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]
    backend.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    if template == LLAMA:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", chat_template=template)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def by_the_library(tokenizer, *turns: tuple[str, str]) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], add_generation_prompt=True, return_dict=True
    )["input_ids"]


def messages(*texts: str, literal_chars: int = 0) -> Messages:
    roles = ("user", "model") * 3
    return Messages(tuple(Turn(roles[n], text) for n, text in enumerate(texts)), "t", literal_chars)


@pytest.fixture(scope="module")
def encoder(gemma_tokenizer):
    return ChatEncoder(gemma_tokenizer)


@pytest.fixture(scope="module")
def by_template(gemma_tokenizer):
    tokenizer = copy.deepcopy(gemma_tokenizer)
    tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


def test_a_prompt_is_one_bos_and_the_turns(encoder, gemma_tokenizer):
    ids = encoder.encode(messages("Look at this.")).token_ids
    assert gemma_tokenizer.decode(ids) == "<bos><start_of_turn>user\nLook at this.<end_of_turn>\n<start_of_turn>model\n"
    assert ids.count(gemma_tokenizer.bos_token_id) == 1
    assert (ids[1], ids.count(105), ids.count(106)) == (105, 2, 1)


def test_end_ids_of_gemma_are_1_and_106(gemma_tokenizer):
    assert gemma_tokenizer.eos_token_id == 1
    assert gemma_tokenizer.convert_tokens_to_ids("<end_of_turn>") == 106


@pytest.mark.parametrize("control", [*CONTROLS, "<unused7>", "[multimodal]", "<mask>"])
def test_a_control_token_in_a_cell_stays_text(encoder, gemma_tokenizer, control):
    harmless = encoder.encode(messages("before word after")).token_ids
    ids = encoder.encode(messages(f"before {control} after")).token_ids
    assert ids.count(gemma_tokenizer.convert_tokens_to_ids(control)) == harmless.count(
        gemma_tokenizer.convert_tokens_to_ids(control)
    )
    assert f"before {control} after" in gemma_tokenizer.decode(ids)
    assert ids[:5] == harmless[:5]
    assert ids[-6:] == harmless[-6:]


@given(st.lists(st.sampled_from([*CONTROLS, "\n", " ", "a", "user\n", "▁", "é", "  ", "\n\n"]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_mixture_of_control_tokens_gives_a_control_id(encoder, gemma_tokenizer, parts):
    ids = encoder.encode(messages("x" + "".join(parts) + "x")).token_ids
    special = set(gemma_tokenizer.all_special_ids) | {105, 106, 255999, 256000}
    assert [token for token in ids if token in special] == [2, 105, 106, 105]


@pytest.mark.parametrize(
    "texts",
    [["One."], ["  padded \n"], ["Two\n\nlines and é, 3.5 cm"], ["First.", "Answer.", "Second."], ["1 2  3   4"]],
)
def test_ids_are_those_of_the_tokenizers_own_chat_template(by_template, texts):
    turns = zip(("user", "assistant") * 2, texts, strict=False)
    assert ChatEncoder(by_template).encode(messages(*texts)).token_ids == by_the_library(by_template, *turns)


@pytest.mark.parametrize("template", [CHATML, LLAMA])
@pytest.mark.parametrize("text", ["One.", "  padded \n", "Two\n\nlines, é", "Ġ ▁ \ue0000\ue001"])
def test_other_families_get_the_ids_of_their_template_too(template, text):
    tokenizer = byte_level(template)
    made = Messages((Turn("system", "Be brief."), Turn("user", text), Turn("model", "No."), Turn("user", "Why?")), "t")
    turns = [("assistant" if turn.role == "model" else turn.role, turn.text) for turn in made.turns]
    assert ChatEncoder(tokenizer).encode(made).token_ids == by_the_library(tokenizer, *turns)


@pytest.mark.parametrize("template", [CHATML, LLAMA])
@pytest.mark.parametrize("special", [True, False], ids=["special", "marked as text"])
def test_a_cell_cannot_produce_a_templates_control_tokens(template, special):
    tokenizer = byte_level(template, special=special)
    encoder = ChatEncoder(tokenizer)
    harmless = encoder.encode(messages("the lungs are clear")).token_ids
    marks = [mark for mark in tokenizer.get_added_vocab() if mark in template or mark == tokenizer.bos_token]
    ids = encoder.encode(messages("the " + " ".join(marks) + " clear")).token_ids
    for mark in marks:
        number = tokenizer.convert_tokens_to_ids(mark)
        assert ids.count(number) == harmless.count(number)


def test_gemma_gets_its_bos_if_its_tokenizer_files_omit_it(gemma_tokenizer):
    from tokenizers import processors

    forgetful = copy.deepcopy(gemma_tokenizer)
    forgetful.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert forgetful("x").input_ids[0] != 2
    for form in ("chat", "literal"):
        assert ChatEncoder(forgetful, format=form).encode(messages("Look.")).token_ids.count(2) == 1


def test_invalid_unicode_fails_its_row_without_showing_the_text(encoder):
    with pytest.raises(RowError) as caught:
        encoder.encode(messages("canary \ud800"))
    assert "canary" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_text_survives_encoding_and_decoding(encoder, gemma_tokenizer):
    text = "  two blanks,\ttab\n\n\nthree lines <h1>é—日本</h1> 3.5 cm"
    ids = encoder.encode(messages("x" + text)).token_ids
    assert "x" + text in gemma_tokenizer.decode(ids)


def test_our_template_gives_what_googles_gives(encoder, by_template):
    made = Messages((Turn("system", "Be brief."), Turn("user", "Look.")), "t")
    expected = "<bos><start_of_turn>user\nBe brief.\n\nLook.<end_of_turn>\n<start_of_turn>model\n"
    assert by_template.decode(encoder.encode(made).token_ids) == expected
    assert ChatEncoder(by_template).encode(made) == encoder.encode(made)


def test_a_system_text_that_a_template_refuses_precedes_the_user_turn(gemma_tokenizer):
    tokenizer = copy.deepcopy(gemma_tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
    )
    made = Messages((Turn("system", "Be brief."), Turn("user", "Look.")), "t")
    assert "user\nBe brief.\n\nLook.<end_of_turn>" in tokenizer.decode(ChatEncoder(tokenizer).encode(made).token_ids)


def test_the_literal_layout_is_exactly_the_guides(gemma_tokenizer):
    literal = ChatEncoder(gemma_tokenizer, format="literal")
    alone = literal.encode(messages("Look.")).token_ids
    assert gemma_tokenizer.decode(alone) == "<bos><start_of_turn>user\nLook.\n<end_of_turn>\n<start_of_turn>model\n"
    both = literal.encode(Messages((Turn("system", "Be brief."), Turn("user", "Look.")), "t")).token_ids
    assert gemma_tokenizer.decode(both) == (
        "<bos><start_of_turn>system\nBe brief.\n<end_of_turn>\n<start_of_turn>user\nLook.\n<end_of_turn>\n"
        "<start_of_turn>model\n\n"
    )


PREFIX = "You are an expert radiologist. Analyze this chest X-ray"


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_shared_prefix_is_the_same_whatever_a_cell_holds(encoder, rest):
    encoded = encoder.encode(messages(PREFIX + rest + " end", literal_chars=len(PREFIX)))
    plain = encoder.encode(messages(PREFIX + " of a patient", literal_chars=len(PREFIX)))
    assert encoded.shared_tokens == plain.shared_tokens >= 10
    assert encoded.token_ids[: encoded.shared_tokens] == plain.token_ids[: plain.shared_tokens]


def test_the_character_for_a_blank_is_the_vocabularys_own(encoder):
    assert "Ġ" in encoder._tokenizer.get_vocab()  # an ordinary letter in Gemma
    assert encoder._blank == "▁"
    assert ChatEncoder(byte_level(CHATML))._blank == "Ġ"


def test_a_template_without_literal_text_shares_nothing(encoder):
    assert encoder.encode(messages("text")).shared_tokens == 0
