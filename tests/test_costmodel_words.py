"""The words of the reports: a count agrees with its noun, and nothing has no sign."""

import pytest

from costmodel import words


@pytest.mark.parametrize(
    ("number", "nouns", "text"),
    [
        (0, ("run",), "0 runs"),
        (1, ("run",), "1 run"),
        (2, ("run",), "2 runs"),
        (1200, ("prompt",), "1,200 prompts"),
        (1, ("policy", "policies"), "1 policy"),
        (3, ("policy", "policies"), "3 policies"),
        (1, ("policy", "different policies"), "1 policy"),
    ],
)
def test_a_count_agrees_with_its_noun(number: int, nouns: tuple[str, ...], text: str) -> None:
    assert words.counted(number, *nouns) == text


@pytest.mark.parametrize(
    ("share", "decimals", "text"),
    [(0.25, 1, "+25.0 %"), (-0.2, 0, "-20 %"), (0.0004, 1, "0.0 %"), (-0.004, 0, "0 %"), (12.5, 0, "+1,250 %")],
)
def test_what_rounds_to_nothing_has_no_sign(share: float, decimals: int, text: str) -> None:
    assert words.signed_percent(share, decimals) == text
