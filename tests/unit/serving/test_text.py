"""Text comes out whole characters at a time, and never past a stop string."""

from random import Random
from typing import Any

import pytest

from serving.engine.text import TextStream
from tests.tiny import make_tokenizer

TEXTS = ("the cat sat on a mat", "naïve café", "日本語のテキスト", "👩‍👩‍👧 family 🎉🎉", "mixed é日🎉 end", "\n\t  spaces  ")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pieces(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    given = []
    for token in ids:
        given.append(stream.push(token))
        if stream.stopped:
            break
    return [*given, stream.finish()], stream


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text_and_hold_whole_characters(tokenizer: Any, text: str) -> None:
    given, _ = pieces(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(given) == text
    assert not any("�" in piece for piece in given)


def test_a_character_cut_in_half_at_the_end_is_left_out(tokenizer: Any) -> None:
    given, _ = pieces(tokenizer, tokenizer("ok 🎉")["input_ids"][:-1])
    assert "".join(given) == "ok "


def test_bytes_that_are_no_text_do_not_hold_back_what_follows(tokenizer: Any) -> None:
    broken = tokenizer("🎉")["input_ids"][1:2] * 9
    given, _ = pieces(tokenizer, [*broken, *tokenizer(" and then words")["input_ids"]])
    assert "".join(given).endswith(" and then words")
    assert any(given[:9]), "nine broken bytes were all held back"


def test_random_bytes_decode_as_the_tokenizer_decodes_them_whole(tokenizer: Any) -> None:
    random = Random(0)
    for _ in range(200):
        ids = [random.randrange(3, 380) for _ in range(random.randrange(1, 30))]
        given, _ = pieces(tokenizer, ids)
        assert "".join(given) == tokenizer.decode(ids, skip_special_tokens=True).rstrip("�") or "".join(given) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_text_ends_before_the_first_stop_string_however_tokens_fall(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    for start in range(len(text)):
        stop = text[start : start + 3]
        given, stream = pieces(tokenizer, ids, (stop, "absent"))
        assert "".join(given) == text[: text.index(stop)]
        assert stream.stopped


def test_what_only_begins_like_a_stop_string_is_given_out_in_the_end(tokenizer: Any) -> None:
    given, stream = pieces(tokenizer, tokenizer("the river")["input_ids"], ("riverbank", "the rivers"))
    assert "".join(given) == "the river"
    assert not stream.stopped
    assert given[-1], "the possible beginning is held until the end"


class ByteFallback:
    """Decodes as SentencePiece tokenizers do: one bad byte makes every byte of its run a replacement character."""

    def decode(self, ids: list[int], **_: Any) -> str:
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "�" * len(ids)


def test_text_that_a_decoder_takes_back_is_not_given_out_twice() -> None:
    given, _ = pieces(ByteFallback(), list("é🎉日a".encode()))
    assert "".join(given) == "é🎉日a"
