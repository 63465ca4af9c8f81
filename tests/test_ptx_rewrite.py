"""Asm statements become calls of the interpreter: same string, same lines, everything else untouched; else refused."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops.gpu.ptx_rewrite import PtxRewriteError, rewrite

MMA = Path(__file__).resolve().parent.parent / "cuda" / "mma.cuh"
STRING = r'"(?:\\.|[^"\\])*"'


def _calls(text: str) -> list[tuple[str, str, str, int, list[str]]]:
    """(asm string, constraints, file, line, operands) of every call in rewritten source."""
    pattern = (
        rf"do \{{ static ::emu::ptx::Instruction emu_asm\{{({STRING}), ({STRING}), ({STRING}), (\d+), "
        r"__CUDA_ARCH__\}; emu_asm\(\{(.*?)\}\); \} while \(0\)"
    )
    calls = []
    for string, constraints, file, line, operands in re.findall(pattern, text, re.DOTALL):
        parts = re.findall(r"::emu::ptx::\w+<'\w'>\(.*?\)(?=, ::emu|$)", operands)
        calls.append((ast.literal_eval(string), constraints[1:-1], file[1:-1], int(line), parts))
    return calls


def _one(source: str) -> tuple[str, str, str, int, list[str]]:
    (call,) = _calls(rewrite(source, "f.cuh"))
    return call


def test_operands_keep_order_mode_type_and_expression() -> None:
    string, constraints, file, line, operands = _one(
        'void f() {\n  asm volatile("op %0, %1, %2, %3;" : "=r"(d[i ? 1 : 0]), "+f"(x) '
        ': "l"(g(a, ns::b)), "n"(3) : "memory");\n}'
    )
    assert (string, constraints, file, line) == ("op %0, %1, %2, %3;", "=r,+f|l,n|memory", "f.cuh", 2)
    assert operands == [
        "::emu::ptx::out<'r'>(d[i ? 1 : 0])",
        "::emu::ptx::inout<'f'>(x)",
        "::emu::ptx::in<'l'>(g(a, ns::b))",
        "::emu::ptx::in<'n'>(3)",
    ]


@pytest.mark.parametrize(
    ("source", "string", "constraints"),
    [
        ('asm volatile("a;");', "a;", "||"),
        ('asm volatile("a;" : : : "memory");', "a;", "||memory"),
        ('asm volatile("a;" ::: "memory");', "a;", "||memory"),
        ('asm volatile("a %0;" :: "r"(x));', "a %0;", "|r|"),
        ('asm volatile("a %0;" : "=r"(x));', "a %0;", "=r||"),
        ('__asm__ __volatile__ ( "a" /* ") */ " b"\n // c "\n "\\n;" );', "a b\n;", "||"),
        ('asm volatile("a %0;" : : "r"((uint32_t)(x)) : "memory", "cc");', "a %0;", "|r|memory,cc"),
        ('asm volatile("a %0;" : : "r"(x == \')\' ? 1\'000 : f(")")));', "a %0;", "|r|"),
    ],
)
def test_forms(source: str, string: str, constraints: str) -> None:
    assert _one(source)[:2] == (string, constraints)


def test_lines_stay_where_they_are() -> None:
    source = 'int a;\nasm volatile(\n  "x"\n  "y %0;"\n  : "=r"(\n    b)\n);\nint c; // 8\n'
    lines = rewrite(source, "f").split("\n")
    assert len(lines) == len(source.split("\n"))
    assert lines[7] == "int c; // 8"


def test_in_a_macro_the_lines_stay_continued() -> None:
    source = '#define OP(x) \\\n  asm volatile("a %0;" \\\n   : : "r"(x))\nint after;'
    lines = rewrite(source, "f").split("\n")
    assert lines[3] == "int after;"
    assert all(line.endswith("\\") for line in lines[:2])
    assert not lines[2].endswith("\\")


@pytest.mark.parametrize(
    "source",
    [
        '// asm volatile("x");\n',
        '/* asm volatile("x");\n*/ int a;',
        'const char* s = "asm volatile(\\"x\\")";',
        'auto s = R"(asm volatile("x"))";',
        'auto s = R"d(asm volatile(")"))d";',
        "int asm_count = 1'000; char c = '\"'; char d = '\\'';",
        "#error don't use asm_here\nint a;",
    ],
)
def test_everything_else_is_untouched(source: str) -> None:
    assert rewrite(source, "f") == source


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ('asm("nop;");', "without volatile"),
        ("asm volatile;", "without its parenthesis"),
        ('asm volatile("a;"', "do not close"),
        ("asm volatile(TEMPLATE : : );", "the template is not a string literal"),
        ('asm volatile("a %0;" : : "r" x);', "an operand is"),
        ('asm volatile("a %0;" : : "r"(x) + 1);', "an operand is"),
        ('asm volatile("a %0;" : : [name] "r"(x));', "an operand is"),
        ('asm volatile("a %0;" : : "q"(x));', "constraint"),
        ('asm volatile("a %0;" : "r"(x));', "output constraint"),
        ('asm volatile("a %0;" : "=n"(x));', "output constraint"),
        ('asm volatile("a %0;" : : "=r"(x));', "input constraint"),
        ('asm volatile("a;" : : : memory);', "a clobber is not a string literal"),
        ('asm volatile("a;" : : : : label);', "5 sections"),
        ('asm volatile("a %0;" : : "r"(x), );', "an operand is"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(source: str, what: str) -> None:
    with pytest.raises(PtxRewriteError, match=rf"^probe\.cuh:2: .*{re.escape(what)}"):
        rewrite("\n" + source, "probe.cuh")


def test_every_statement_of_mma_cuh() -> None:
    """By a scan of its own: as many calls as statements, the strings in order, the lines those of the keyword."""
    source = MMA.read_text()
    starts = [m.start() for m in re.finditer(r"^(?!\s*//).*?\basm volatile\(", source, re.MULTILINE)]
    calls = _calls(rewrite(source, "mma.cuh"))
    assert len(calls) == len(starts) > 50
    for start, (string, constraints, _, line, operands) in zip(starts, calls, strict=True):
        at = source.index("asm volatile", start)
        statement = source[at : at + re.search(r"\);\s", source[at:]).start()]
        literals = [ast.literal_eval(s) for s in re.findall(STRING, statement)]
        template = "".join(literals[: len(literals) - len([c for c in re.split(r"[,|]", constraints) if c])])
        assert template == string
        assert line == source[:at].count("\n") + 1
        assert len(operands) == len([c for c in re.split(r"[,|]", constraints.rsplit("|", 1)[0]) if c])


SAFE = st.text(st.sampled_from("abc(){}[];:,'\"/*\\\n 0%"), max_size=40)


@settings(max_examples=200, deadline=None)
@given(SAFE)
def test_any_text_without_asm_is_untouched(text: str) -> None:
    assert rewrite(text, "f") == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12), min_size=1, max_size=4))
def test_any_template_survives(parts: list[str]) -> None:
    def literal(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    assert _one(f"asm volatile({' '.join(map(literal, parts))});")[0] == "".join(parts)
