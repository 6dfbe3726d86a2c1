"""A form as tokens: whatever is drawn among what is allowed, the text has the form and keeps its limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, tiny_tokenizer

from gxr_batch.errors import JobFileError, ModelUnavailable
from gxr_batch.forms import Form, form_of, parts_of
from gxr_batch.forms.form import Part, column_names
from gxr_batch.forms.limits import refuse_short_limit
from gxr_batch.job import make_job
from gxr_batch.models.form_tokens import NO_ID, FormRow, FormTokens

END = 1
KINDS = ("text", "line", "bullets", "choice", "number")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def form(*kinds: str, **more) -> Form:
    headings = [f"Part {number}" for number in range(len(kinds))]
    choices = {"choice": ("high", "high grade", "low")}
    return Form(
        tuple(
            Part(heading, column, kind, choices=choices.get(kind, ()), **more)
            for heading, column, kind in zip(headings, column_names(headings), kinds, strict=True)
        )
    )


def ids_in(mask) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def drawn(tokens: FormTokens, rows: list[FormRow], rng: np.random.Generator, hasty: float) -> list[list[int]]:
    """Draw every row to its end at random; `hasty` is how often a row ends its section if it may."""
    texts = [list(tokens.openings[0]) if not row.forced else [] for row in rows]
    going = list(range(len(rows)))
    while going:
        allowed = tokens.allowed([rows[at] for at in going])
        for place, at in enumerate(list(going)):
            ids = ids_in(allowed.masks[place])
            ends = [id for id in (END, allowed.closing[place]) if id in ids]
            id = int(rng.choice(ends if ends and rng.random() < hasty else ids))
            texts[at].append(id)
            if rows[at].take(id):
                going.remove(at)
    return texts


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    st.tuples(st.integers(0, 40), st.sampled_from([0.0, 0.1, 0.6]), st.sampled_from([None, 8, 20]), st.booleans()),
    st.integers(0, 2**31),
)
def test_whatever_is_drawn_the_text_is_parsed_as_it_was_written_within_its_limits(tokenizer, kinds, how, seed):
    spare, hasty, most, opened = how
    made = form(*kinds)
    limits = {part.column: most for part in made.parts if part.kind not in {"choice", "number"}}
    made = Form(tuple(Part(**{**vars(part), "max_tokens": limits.get(part.column)}) for part in made.parts))
    tokens = FormTokens(made, tokenizer, frozenset({END}), VOCAB)
    limit = tokens.least_tokens + spare
    rows = [tokens.row(limit, opened=opened) for _ in range(3)]
    for ids, row in zip(drawn(tokens, rows, np.random.default_rng(seed), hasty), rows, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        parts = parts_of(made, text.rstrip())
        assert parts is not None, repr(text)
        assert len(ids) <= limit
        assert "\ufffd" not in text or not row.cut
        assert row.finish == ("closed" if row.cut else "stop")


def test_a_section_ends_at_its_own_limit_to_the_token(tokenizer):
    made = Form((Part("A", "a", "text", max_tokens=9), Part("B", "b", "text")))
    tokens = FormTokens(made, tokenizer, frozenset({END}), VOCAB)
    row = tokens.row(200)
    blank, letter = tokenizer.convert_tokens_to_ids(["Ġ", "x"])
    row.take(blank)
    for _ in range(7):
        assert not row.take(letter)
        assert not row.forced
    row.take(letter)
    assert row.forced
    assert row.cut == (0,)
    assert row.forced == [*tokens.separator, *tokens.openings[1]]
    assert tokenizer.decode([blank, *[letter] * 8, *row.forced]) == " xxxxxxxx\n\nB:"


def test_what_a_short_section_leaves_goes_to_the_later_ones(tokenizer):
    tokens = FormTokens(form("text", "text"), tokenizer, frozenset({END}), VOCAB)
    first = tokens.row(100)
    share = first.left
    first.take(tokenizer.convert_tokens_to_ids("Ġx"))
    first.take(tokens.separator[0])
    assert first.part == 1
    assert first.left > 1.3 * share


@pytest.mark.parametrize(("version", "share"), [(1, 1.0), (2, 1.5)])
def test_how_much_of_the_limit_a_section_may_take(tokenizer, version, share):
    made = replace(form("text", "text", "text", "text"), version=version)
    tokens = FormTokens(made, tokenizer, frozenset({END}), VOCAB)
    row = tokens.row(200)
    equal = (200 - row.used - 1 - tokens._headings(0)) / 4
    assert row.left == pytest.approx(share * equal, abs=2)
    lefts = []
    for _ in range(4):  # every section takes all that it may
        lefts.append(row.left)
        for letter in ["Ġ", *"x" * (row.left - 1)]:
            row.take(tokenizer.convert_tokens_to_ids(letter))
        while row.forced:
            row.take(row.forced[0])
    assert lefts[-1] > (0.9 if version == 1 else 0.4) * equal
    assert row.cut == (0, 1, 2, 3)
    only = replace(form("text"), version=version)
    alone = FormTokens(only, tokenizer, frozenset({END}), VOCAB).row(200)
    assert alone.left == 200 - alone.used - 1


def test_an_early_end_token_counts_as_the_blank_line_after_the_section(tokenizer):
    tokens = FormTokens(form("text", "text"), tokenizer, frozenset({END}), VOCAB)
    row = tokens.row(100)
    row.take(tokenizer.convert_tokens_to_ids("Ġx"))
    allowed = tokens.allowed([row])
    assert allowed.closing.tolist() == [tokens.separator[0]]
    logits = torch.zeros(1, VOCAB)
    logits[0, END] = 5.0
    tokens.hold(logits, allowed)
    assert logits[0, END] == -torch.inf
    assert logits[0, tokens.separator[0]] == pytest.approx(torch.tensor([0.0, 5.0]).logsumexp(0).item())


def test_in_the_last_section_the_end_token_ends_the_text(tokenizer):
    tokens = FormTokens(form("text"), tokenizer, frozenset({END}), VOCAB)
    row = tokens.row(100)
    assert END not in ids_in(tokens.allowed([row]).masks[0])  # not before there is content
    row.take(tokenizer.convert_tokens_to_ids("Ġx"))
    allowed = tokens.allowed([row])
    assert END in ids_in(allowed.masks[0])
    assert allowed.closing.tolist() == [NO_ID]
    assert row.take(END)
    assert row.finish == "stop"


def test_special_tokens_are_never_drawn(tokenizer):
    tokens = FormTokens(form("text"), tokenizer, frozenset({END}), VOCAB)
    row = tokens.row(100)
    row.take(tokenizer.convert_tokens_to_ids("Ġx"))
    assert {0, 2}.isdisjoint(ids_in(tokens.allowed([row]).masks[0]))


def test_a_choice_ends_by_itself_unless_it_may_become_a_longer_one(tokenizer):
    tokens = FormTokens(form("choice", "text"), tokenizer, frozenset({END}), VOCAB)
    for text, ended in ((" low", True), (" high", False), (" high grade", True)):
        row = tokens.row(200)
        for id in tokenizer(text, add_special_tokens=False).input_ids:
            row.take(id)
        assert bool(row.forced) == ended, text
        assert not row.cut


def test_a_limit_that_cannot_hold_the_form_names_the_least_that_can(tokenizer):
    job = make_job("x", ["form.name=teaching_case", "sampling.max_new_tokens=20"])

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    with pytest.raises(JobFileError, match="at least") as raised:
        refuse_short_limit(job, count)
    least = FormTokens(form_of(job), tokenizer, frozenset({END}), VOCAB).least_tokens
    assert f"sampling.max_new_tokens={least}" in raised.value.next_step
    refuse_short_limit(job.with_values({"sampling.max_new_tokens": least}), count)
    refuse_short_limit(make_job("x", ["sampling.max_new_tokens=1"]), count)


def test_a_tokenizer_of_an_unknown_kind_is_refused(tmp_path):
    made = tiny_tokenizer(tmp_path)
    made.backend_tokenizer.decoder = None
    with pytest.raises(ModelUnavailable, match="tokenizer"):
        FormTokens(form("text", "bullets"), made, frozenset({END}), VOCAB)


def test_headings_that_a_tokenizer_cannot_write_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **_: "Part")
    with pytest.raises(ModelUnavailable, match="headings"):
        FormTokens(form("text", "bullets"), tokenizer, frozenset({END}), VOCAB)


def test_the_ids_beyond_the_tokenizer_are_never_allowed(tokenizer):
    tokens = FormTokens(form("text"), tokenizer, frozenset({END}), VOCAB)
    row = tokens.row(50)
    row.take(tokenizer.convert_tokens_to_ids("Ġx"))
    assert max(ids_in(tokens.allowed([row]).masks[0])) < len(tokenizer)


def test_a_choice_of_characters_without_a_token_can_always_be_drawn(tokenizer):
    made = Form(
        (Part("A", "a", "choice", choices=("\u2161", "\u2160")), Part("B", "b", "choice", choices=("ab\u2265", "c")))
    )
    tokens = FormTokens(made, tokenizer, frozenset({END}), VOCAB)
    for seed in range(20):
        row = tokens.row(tokens.least_tokens)
        (ids,) = drawn(tokens, [row], np.random.default_rng(seed), 0.1)
        assert parts_of(made, tokenizer.decode(ids, skip_special_tokens=True).rstrip()) is not None


def test_a_late_section_with_a_high_limit_starves_no_earlier_one(tokenizer):
    made = Form((Part("A", "a", "text"), Part("B", "b", "text", max_tokens=400)))
    row = FormTokens(made, tokenizer, frozenset({END}), VOCAB).row(256)
    assert row.left > 100
