"""Server-sent events, read from bytes in whatever pieces they come."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybustcall.sse import Block, BrokenStream, StreamParser

STREAM = (
    ": a comment\n\nid: e-1\nevent: bust\ndata: {\n"
    "data: }\n\nid: e-2\nunknown: x\nretry: 10\n: ping\n\nevent:bare\ndata:ä\n\n"
)
BLOCKS = [
    Block("", None, ""),
    Block("bust", "{\n}", "e-1"),
    Block("", None, "e-2"),
    Block("bare", "ä", "e-2"),
]


def read(*pieces: bytes) -> list[Block]:
    parser = StreamParser()
    return [block for piece in pieces for block in parser.feed(piece)]


@given(
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 200), max_size=20),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_a_stream_reads_the_same_in_any_pieces_and_with_any_line_ends(end: str, cuts: list[int], mark: bytes) -> None:
    """Also cut within a line end, a byte order mark, or a character."""
    text = mark + STREAM.replace("\n", end).encode()
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    assert read(*(text[begin:stop] for begin, stop in pairwise(places)), b"") == BLOCKS


def test_a_stream_reads_the_same_byte_by_byte() -> None:
    """The smallest pieces, with the line end that is two bytes."""
    text = STREAM.replace("\n", "\r\n").encode()
    assert read(*(text[place : place + 1] for place in range(len(text)))) == BLOCKS


def test_what_has_not_ended_is_not_told() -> None:
    """An event without its empty line may go on."""
    assert read(b"id: e-1\ndata: x\n") == []


def test_an_id_holds_until_the_next_and_one_with_a_null_is_none() -> None:
    """As the standard says."""
    assert read(b"id: a\ndata: 1\n\nid: b\0\ndata: 2\n\nid\ndata\n\n") == [
        Block("", "1", "a"),
        Block("", "2", "a"),
        Block("", "", ""),
    ]


def test_one_space_after_the_colon_is_no_part_of_the_value() -> None:
    """A second is."""
    assert read(b"data:  x\n\n") == [Block("", " x", "")]


@pytest.mark.parametrize("text", [b"data: " + b"x" * 100, b"data: x\n" * 13])
def test_an_event_that_is_too_long_is_no_event(text: bytes) -> None:
    """In one line without an end, or in many."""
    parser = StreamParser(most=90)
    pieces = (text[place : place + 7] for place in range(0, len(text), 7))
    with pytest.raises(BrokenStream, match="longer than 90 bytes"):
        list(map(parser.feed, pieces))


def test_the_limit_is_of_each_event_alone() -> None:
    """Many short ones may come."""
    parser = StreamParser(most=20)
    assert len([block for _ in range(100) for block in parser.feed(b"data: 0123456789\n\n")]) == 100


def test_text_that_is_not_utf_8_is_no_event() -> None:
    """A key that is read wrongly would not be dropped."""
    with pytest.raises(BrokenStream, match="not UTF-8"):
        read(b"data: \xff\n\n")
