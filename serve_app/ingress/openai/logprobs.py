"""Log-probabilities of tokens, as chat has them and as completions has them."""

from collections.abc import Sequence

from serve_app.ingress.openai.answers import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from serve_app.ingress.output import Finish, Output, Piece
from serve_app.model.token_text import TokenTexts

_LEAST = -9999.0  # JSON has no infinity; OpenAI says this of what is as good as impossible
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def told_pieces(output: Output, first: int) -> list[Piece]:
    """The output's tokens from `first` on, without an end token: that is no part of the text."""
    pieces = output.pieces[first:]
    match output.finish:
        case Finish("stop", int(token)) if pieces and pieces[-1].token == token:
            return pieces[:-1]
    return pieces


def chat_logprobs(texts: TokenTexts, pieces: Sequence[Piece]) -> ChatLogprobs:
    return ChatLogprobs([_token(texts, piece) for piece in pieces])


def _token(texts: TokenTexts, piece: Piece) -> TokenLogprob:
    text, raw = texts.of(piece.token)
    return TokenLogprob(text, _finite(piece.logprob), list(raw), [_top(texts, *top) for top in piece.top])


def _top(texts: TokenTexts, token: int, logprob: float) -> TopLogprob:
    text, raw = texts.of(token)
    return TopLogprob(text, _finite(logprob), list(raw))


def completion_logprobs(texts: TokenTexts, pieces: Sequence[Piece], offset: int, num_top: int) -> CompletionLogprobs:
    """`offset`: of the first token in the choice's text. The chosen token is always among the top ones."""
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece.text)
    tops = [[*piece.top[:num_top], (piece.token, piece.logprob)] for piece in pieces]
    return CompletionLogprobs(
        [_legacy(texts, piece.token) for piece in pieces],
        [_finite(piece.logprob) for piece in pieces],
        [{_legacy(texts, token): _finite(logprob) for token, logprob in top} for top in tops],
        offsets,
    )


def _legacy(texts: TokenTexts, token: int) -> str:
    """A token that is only part of a character is written by its bytes, so that tokens do not look the same."""
    text, raw = texts.of(token)
    return text if _REPLACEMENT not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
