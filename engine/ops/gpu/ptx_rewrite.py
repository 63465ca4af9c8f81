"""Inline assembly as calls of the PTX interpreter: a host compiler can build a .cu file, and its asm strings still run.

`rewrite` finds every `asm volatile("…" : outputs : inputs : clobbers)` and puts a call of `emu::ptx::Instruction` with
the same string in its place (cuda/emulate/ptx.h shows the result); everything else, and every line number, stays.

It reads C++ as tokens, not as a syntax tree: comments, string and character literals and raw strings are recognised, so
an `asm` inside them is left alone. What nvcc would accept but the house does not use is refused with the place: `asm`
without `volatile`, named operands, constraints other than h, r, l, f, d and n.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import EngineError

TOKEN = re.compile(
    r"""(?P<comment>//(?:\\\n|[^\n])*|/\*.*?\*/)
      | (?P<raw>(?:u8|[uUL])?R"(?P<tag>[^()\\\s]{0,16})\(.*?\)(?P=tag)")
      | (?P<string>"(?:\\.|[^"\\\n])*")
      | (?P<char>'(?:\\.|[^'\\\n])+')
      | (?P<number>\.?\d(?:[eEpP][+-]|'?[\w.])*)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<space>(?:\s|\\\n)+)
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
ASM_WORDS = ("asm", "__asm__", "__asm")
VOLATILE_WORDS = ("volatile", "__volatile__", "__volatile")
OPENING, CLOSING = "([{", ")]}"
CONSTRAINT = re.compile(r"(?P<mode>[=+]?)(?P<letter>[hrlfdn])")


class PtxRewriteError(EngineError):
    """An asm statement that cannot be turned into a call of the emulator; the message begins with file:line."""


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    line: int


def rewrite(source: str, file: str) -> str:
    """`source` with every asm statement replaced, on as many lines; `file` is what messages and call sites name."""
    tokens = _tokens(source)
    pieces: list[str] = []
    at = 0
    while at < len(tokens):
        if tokens[at].kind == "name" and tokens[at].text in ASM_WORDS:
            statement = _Statement(tokens, at, file)
            pieces.append(statement.call())
            at = statement.end
        else:
            pieces.append(tokens[at].text)
            at += 1
    return "".join(pieces)


def _tokens(source: str) -> list[Token]:
    tokens: list[Token] = []
    line = 1
    for match in TOKEN.finditer(source):
        tokens.append(Token(match.lastgroup or "", match.group(), line))
        line += match.group().count("\n")
    return tokens


class _Statement:
    """One asm statement: tokens[start:end], up to and including its closing parenthesis."""

    def __init__(self, tokens: list[Token], start: int, file: str) -> None:
        self.line, self.file = tokens[start].line, file
        words = iter(i for i in range(start + 1, len(tokens)) if tokens[i].kind not in ("space", "comment"))
        if tokens[next(words, -1)].text not in VOLATILE_WORDS:
            raise self._error("asm without volatile; every instruction here is volatile")
        opening = next(words, -1)
        if tokens[opening].text != "(":
            raise self._error("asm volatile without its parenthesis")
        self.end = self._closing(tokens, opening) + 1
        self._skipped = "".join(token.text for token in tokens[start : self.end])
        self._sections = self._split(tokens[opening + 1 : self.end - 1], ":")
        if not 1 <= len(self._sections) <= 4:
            raise self._error(f"asm with {len(self._sections)} sections; template, outputs, inputs, clobbers are four")

    def call(self) -> str:
        sections = self._sections + [[]] * (4 - len(self._sections))
        template = self._literal(sections[0], "the template")
        outputs = [self._operand(tokens) for tokens in self._list(sections[1])]
        inputs = [self._operand(tokens) for tokens in self._list(sections[2])]
        clobbers = [self._literal(tokens, "a clobber")[1:-1] for tokens in self._list(sections[3])]
        for mode, letter, _ in outputs:
            if not mode or letter == "n":
                raise self._error(f'output constraint "{mode}{letter}"')
        for mode, letter, _ in inputs:
            if mode:
                raise self._error(f'input constraint "{mode}{letter}"')
        groups = (",".join(mode + letter for mode, letter, _ in side) for side in (outputs, inputs))
        constraints = "|".join([*groups, ",".join(clobbers)])
        values = ", ".join(
            f"::emu::ptx::{ {'=': 'out', '+': 'inout', '': 'in'}[mode] }<'{letter}'>({expression})"
            for mode, letter, expression in outputs + inputs
        )
        file = self.file.replace("\\", "\\\\").replace('"', '\\"')
        return (
            f'do {{ static ::emu::ptx::Instruction emu_asm{{{template}, "{constraints}", "{file}", {self.line}, '
            f"__CUDA_ARCH__}}; emu_asm({{{values}}}); }} while (0)" + "".join(re.findall(r"\\?\n", self._skipped))
        )

    def _error(self, what: str) -> PtxRewriteError:
        return PtxRewriteError(f"{self.file}:{self.line}: cannot emulate this statement: {what}")

    def _closing(self, tokens: list[Token], opening: int) -> int:
        depth = 0
        for i in range(opening, len(tokens)):
            if tokens[i].kind == "other":
                depth += (tokens[i].text in OPENING) - (tokens[i].text in CLOSING)
            if depth == 0:
                return i
        raise self._error("its parentheses do not close")

    def _split(self, tokens: list[Token], separator: str) -> list[list[Token]]:
        """`tokens` without space and comments, cut at separators outside all brackets."""
        parts: list[list[Token]] = [[]]
        depth = 0
        for token in tokens:
            if token.kind == "other":
                depth += (token.text in OPENING) - (token.text in CLOSING)
                if token.text == separator and depth == 0:
                    parts.append([])
                    continue
            if token.kind == "space" and depth:
                parts[-1].append(Token("space", " ", token.line))
            elif token.kind not in ("space", "comment"):
                parts[-1].append(token)
        return parts

    def _list(self, tokens: list[Token]) -> list[list[Token]]:
        return self._split(tokens, ",") if tokens else []

    def _literal(self, tokens: list[Token], what: str) -> str:
        """Adjacent string literals as one."""
        if not tokens or any(token.kind != "string" for token in tokens):
            raise self._error(f"{what} is not a string literal: {''.join(token.text for token in tokens)}")
        return '"' + "".join(token.text[1:-1] for token in tokens) + '"'

    def _operand(self, tokens: list[Token]) -> tuple[str, str, str]:
        """(mode, letter, expression) of `"mode letter"(expression)`."""
        text = "".join(token.text for token in tokens)
        if len(tokens) < 4 or tokens[0].kind != "string" or tokens[1].text != "(" or tokens[-1].text != ")":
            raise self._error(f'an operand is "constraint"(expression), and not {text or "nothing"}')
        constraint = CONSTRAINT.fullmatch(tokens[0].text[1:-1])
        if constraint is None:
            raise self._error(f"constraint {tokens[0].text} is not one of h, r, l, f, d, n with = or +")
        if self._closing(tokens, 1) != len(tokens) - 1:
            raise self._error(f"text after the operand's parenthesis: {text}")
        return constraint["mode"], constraint["letter"], "".join(token.text for token in tokens[2:-1])
