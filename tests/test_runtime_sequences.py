"""Sequences while they are generated: when each ends, and text that streams exactly as it decodes at once."""

import random
from functools import cache

import pytest
from engines import EOS, byte_level
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from costmodel.errors import InputError
from runtime.detokenizer import Detokenizer, StopStrings
from runtime.sampling import SamplingParams
from runtime.sequences import Completion, Sequences


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Words with a leading blank and single bytes for the rest, as Llama has them: the first blank is dropped."""
    words = ["▁the", "▁fox", "▁", "a", "b", "é", "▁END"]
    vocabulary = {word: number for number, word in enumerate(["</s>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    vocabulary |= {word: len(vocabulary) + number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def decoded(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encoded(text: str) -> list[int]:
    return byte_level()(text, add_special_tokens=False)["input_ids"]


def streamed(
    tokens: list[int], *, stream: bool = True, eos: frozenset[int] = frozenset({EOS}), **settings: object
) -> tuple[list[str | None], Completion]:
    """Feed one sequence; the pieces and the completion."""
    params = SamplingParams(**{"max_new_tokens": max(1, len(tokens)), **settings})
    sequences = Sequences([encoded("Hello")], [params], eos_token_ids=eos, tokenizer=byte_level(), stream=stream)
    pieces = []
    for token in tokens:
        if sequences.finished:
            break
        pieces += sequences.add([token])
    return pieces, sequences.completions()[0]


# ------------------------------------------------------------------ ends


def run(tokens: list[int], eos: set[int], **settings: object) -> Completion:
    """Feed one sequence without tokenizer."""
    sequences = Sequences([[5, 6, 7]], [SamplingParams(**settings)], eos_token_ids=frozenset(eos), tokenizer=None)
    for token in tokens:
        assert sequences.add([token]) == [None]
    return sequences.completions()[0]


def test_length_ends_a_sequence() -> None:
    done = run([4, 5, 6, 7], {2}, max_new_tokens=3)
    assert done == Completion(token_ids=(4, 5, 6), text=None, finish_reason="length", prompt_tokens=3)


@pytest.mark.parametrize(("eos", "kept"), [({0}, (4, 5)), ({5, 9}, (4,)), ({9}, (4, 5, 0)), ({4}, ())])
def test_any_end_token_ends_it_and_0_is_one_too(eos: set[int], kept: tuple[int, ...]) -> None:
    done = run([4, 5, 0, 9, 1], eos, max_new_tokens=10)
    assert done.token_ids == kept
    assert done.finish_reason == "stop"


def test_ignore_eos_keeps_the_end_tokens() -> None:
    done = run([4, 0, 5], {0}, max_new_tokens=3, ignore_eos=True)
    assert (done.token_ids, done.finish_reason) == ((4, 0, 5), "length")


def test_an_end_token_at_the_very_last_step_is_a_stop() -> None:
    assert run([4, 0], {0}, max_new_tokens=2).finish_reason == "stop"


def test_block_is_finished_when_all_have_ended() -> None:
    params = [SamplingParams(max_new_tokens=count) for count in (1, 3, 5)]
    sequences = Sequences([[1], [1, 2], []], params, eos_token_ids=frozenset({0}), tokenizer=None)
    seen = []
    for tokens in ([7, 7, 7], [8, 8, 8], [9, 9, 0]):
        sequences.add(tokens)
        seen.append((sequences.done, sequences.finished))
    assert seen == [
        ([True, False, False], False),
        ([True, False, False], False),
        ([True, True, True], True),
    ]
    sequences.add([3, 3, 3])
    assert [done.token_ids for done in sequences.completions()] == [(7,), (7, 8, 9), (7, 8)]
    assert [done.prompt_tokens for done in sequences.completions()] == [1, 2, 0]


def test_a_sequence_cut_short_is_complete_as_far_as_it_goes() -> None:
    tokens = encoded("the quick é")
    params = SamplingParams(max_new_tokens=100, stop=("never",))
    sequences = Sequences([[]], [params], eos_token_ids=frozenset(), tokenizer=byte_level())
    for token in tokens:
        sequences.add([token])
    assert sequences.completions()[0].text == "the quick é"
    assert sequences.finished


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        Sequences([[1]], [SamplingParams(stop=("x",))], eos_token_ids=frozenset(), tokenizer=None)


# ------------------------------------------------------------------ text


@given(st.text(max_size=40))
def test_pieces_join_to_the_decoded_text(text: str) -> None:
    tokens = encoded(text)
    pieces, done = streamed(tokens)
    assert "".join(pieces) == done.text == decoded(byte_level(), tokens) == text


@given(st.lists(st.integers(2, 319), max_size=60))
def test_any_tokens_stream_as_they_decode(tokens: list[int]) -> None:
    """Mostly bytes that make no characters: replacement characters and the settling of what waits."""
    pieces, done = streamed(tokens)
    assert "".join(pieces) == done.text == decoded(byte_level(), tokens)
    assert streamed(tokens, stream=False)[1] == done


def test_no_piece_holds_a_part_of_a_character() -> None:
    pieces, _ = streamed(encoded("日本 🦊🦊 語"))
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 3


def test_a_text_cut_within_a_character_ends_in_its_replacement() -> None:
    tokens = encoded("a🦊")[:-1]
    pieces, done = streamed(tokens)
    assert done.text == "a\N{REPLACEMENT CHARACTER}" == "".join(pieces)


@given(st.text(alphabet="ab éŰ🦊\n", max_size=30), st.text(alphabet="ab éŰ🦊\n", min_size=0, max_size=10))
def test_leading_blanks_follow_the_prompt_where_decoding_depends_on_it(text: str, prompt: str) -> None:
    """A Llama-like tokenizer drops the first blank of a text, not that of a continuation."""
    tokenizer = byte_fallback()
    start, tokens = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
    detokenizer = Detokenizer(tokenizer, start)
    pieces = [detokenizer.add([token]) for token in tokens] + [detokenizer.finish()]
    assert "".join(pieces) == decoded(tokenizer, start + tokens)[len(decoded(tokenizer, start)) :]


def test_words_of_a_llama_like_tokenizer_keep_their_blanks() -> None:
    tokenizer = byte_fallback()
    the, fox = tokenizer.convert_tokens_to_ids(["▁the", "▁fox"])
    detokenizer = Detokenizer(tokenizer, [the])
    assert [detokenizer.add([token]) for token in (fox, the, fox)] == [" fox", " the", " fox"]


def test_cost_of_a_token_does_not_grow() -> None:
    """Not even where bytes never make a character: at most a few dozen tokens are decoded per step."""

    class Counting:
        longest = 0

        def decode(self, tokens: list[int], **options: bool) -> str:
            self.longest = max(self.longest, len(tokens))
            return byte_level().decode(tokens, **options)

    for tokens in (encoded("🦊")[:1] * 500, [random.Random(1).randrange(2, 320) for _ in range(500)]):
        counting = Counting()
        detokenizer = Detokenizer(counting, encoded("Hello there"))
        for token in tokens:
            detokenizer.add([token])
        assert counting.longest <= 40


# ------------------------------------------------------------------ stop strings


def test_a_stop_string_ends_the_text_before_it() -> None:
    pieces, done = streamed(encoded("the lazy dog stop there fox"), stop=("stop",))
    assert done.text == "the lazy dog " == "".join(pieces)
    assert done.finish_reason == "stop"
    assert decoded(byte_level(), list(done.token_ids)).startswith("the lazy dog stop")
    assert "fox" not in decoded(byte_level(), list(done.token_ids))


@given(
    st.text(alphabet="ab🦊é ", max_size=25),
    st.lists(st.text(alphabet="ab🦊é ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_are_found_wherever_tokens_end(text: str, stops: list[str]) -> None:
    """The first position of any of them, found at the first token that completes one."""
    pieces, done = streamed(encoded(text), stop=tuple(stops))
    ends = []
    for length in range(len(text) + 1):  # the shortest text that holds one: no more was needed
        ends = [text[:length].find(stop) for stop in stops if stop in text[:length]]
        if ends:
            break
    assert "".join(pieces) == done.text
    assert len(done.text) <= (min(ends) if ends else len(text))
    assert text.startswith(done.text)
    assert not any(stop in done.text for stop in stops)
    assert done.finish_reason == ("stop" if ends else "length")
    assert streamed(encoded(text), stop=tuple(stops), stream=False)[1] == done


def test_what_may_become_a_stop_string_is_held_back_and_given_in_the_end() -> None:
    stops = StopStrings(["END", "EN?"])
    assert stops.add("the E") == ("the ", False)
    assert stops.add("N") == ("", False)
    assert stops.add("S") == ("ENS", False)
    assert stops.add("xEE") == ("xE", False)
    assert stops.finish() == "E"


def test_the_first_of_several_stop_strings_counts() -> None:
    assert StopStrings(["cd", "b"]).add("abcd") == ("a", True)
    assert StopStrings(["b", "abc"]).add("abc") == ("", True)


def test_a_text_that_ends_while_one_may_begin_is_whole() -> None:
    for tokens in (encoded("a stop, a st"), [*encoded("a stop, a st"), EOS]):
        assert streamed(tokens, stop=("stop!",))[1].text == "a stop, a st"


def test_a_stop_string_within_the_flushed_rest_counts() -> None:
    tokens = [*encoded("ab"), encoded("🦊")[0]]
    _, done = streamed(tokens, stop=("b\N{REPLACEMENT CHARACTER}",))
    assert (done.text, done.finish_reason) == ("a", "stop")


def test_special_tokens_are_no_text() -> None:
    pieces, done = streamed([*encoded("fox"), 1, *encoded("dog")])
    assert "".join(pieces) == done.text == "foxdog"
