"""Read the text of a PTX module that holds one kernel: its parameters, and its code as blocks of instructions.

A block is entered at its first instruction alone and left at its end alone. Blocks are cut where threads wait for each
other, so that these are first in theirs: the machine lets nobody begin such a block before all are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# where threads of a warp, or all of a program, wait for each other
WAITS = {
    "bar.sync": "program",
    "bar.warp": "warp",
    "shfl": "warp",
    "redux": "warp",
    "stmatrix": "warp",
    "ldmatrix": "warp",
}
JUMPS = ("bra", "ret", "exit", "trap")
KINDS = re.compile(r"([bus](8|16|32|64)|f(16|32|64)|bf16|b?f16x2|pred)")


class UnsupportedError(NotImplementedError):
    """Report what the emulator does not know: it guesses nothing."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """Hold one instruction: opcode, what follows it after dots (its types apart), operands, and who executes it.

    predicate: the register of those who do, or with `negated` of those who do not; None where all do. source: the line
    of the kernel it comes from, as far as the compiler says.
    """

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    kinds: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False
    source: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.source})" if self.source else self.text

    @property
    def kind(self) -> str:
        """Return the type it computes in, which is the last that it names."""
        if not self.kinds:
            raise UnsupportedError("an instruction without a type")
        return self.kinds[-1]

    @property
    def waits(self) -> str | None:
        """Return who waits before it: the threads of its "warp", of its "program", or nobody."""
        name = ".".join((self.opcode, *self.modifiers[:1]))
        return WAITS.get(name, WAITS.get(self.opcode))


@dataclass(frozen=True, slots=True)
class Block:
    """Hold instructions in a row, and the jump after them: who takes it goes to `target`, the others to the next block.

    jump: None where there is none. target: a number, that of no block for a return.
    """

    instructions: tuple[Instruction, ...]
    jump: Instruction | None
    target: int

    @property
    def waits(self) -> str | None:
        """Return who waits before the block: the threads of its "warp", of its "program", or nobody."""
        return self.instructions[0].waits if self.instructions else None


@dataclass(frozen=True, slots=True)
class Program:
    """Hold a kernel: name, (name, type) of its parameters, threads of one program of a launch, blocks."""

    name: str
    params: tuple[tuple[str, str], ...]
    threads: int
    blocks: tuple[Block, ...]


def parse(text: str) -> Program:
    """Return the kernel of a module.

    Raises:
        UnsupportedError: there is not one kernel, or a parameter is no number or pointer.
    """
    heads = re.findall(r"\.entry\s+(\w+)\s*\((.*?)\)([^{;]*)\{", text, re.DOTALL)
    if len(heads) != 1:
        raise UnsupportedError(f"a module of {len(heads)} kernels, expected one")
    ((name, params, directives),) = heads
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if threads is None:
        raise UnsupportedError(f"{name} does not say how many threads it has (.reqntid)")
    body = text[text.index("{", text.index(".entry")) + 1 : text.rindex("}")]
    return Program(name, tuple(map(_param, filter(None, params.split(",")))), int(threads[1]), _blocks(body))


def _param(text: str) -> tuple[str, str]:
    words = text.split()
    if "[" in text or not KINDS.fullmatch(words[1][1:]):
        raise UnsupportedError(f"the parameter {text.strip()}")
    return words[-1], words[1][1:]


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """Yield labels, which end in a colon, and instructions, each with the line of the source that it comes from."""
    source = pending = ""
    for line in body.splitlines():
        code, _, comment = line.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            source = comment.strip().rpartition(":")[0]  # file:line:column
        if code.startswith(".") and ";" not in code:  # .loc and its like end with their line
            continue
        if code.endswith(":") and not pending:
            yield code, source
            continue
        *ended, pending = f"{pending} {code}".strip().split(";")
        for statement in ended:
            statement = statement.strip().lstrip("{} \t")  # scopes open and close before instructions
            if statement and not statement.startswith("."):
                yield statement, source


def _blocks(body: str) -> tuple[Block, ...]:
    groups: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for statement, source in _statements(body):
        if statement.endswith(":"):
            if groups[-1]:
                groups.append([])
            labels[statement[:-1]] = len(groups) - 1
            continue
        instruction = _instruction(statement, source)
        if instruction.waits and groups[-1]:
            groups.append([])
        groups[-1].append(instruction)
        if instruction.opcode in JUMPS:
            groups.append([])
    return tuple(_block(group, labels, len(groups)) for group in groups)


def _block(group: list[Instruction], labels: dict[str, int], count: int) -> Block:
    if not group or group[-1].opcode not in JUMPS:
        return Block(tuple(group), None, count)
    *instructions, jump = group
    if jump.opcode == "bra" and jump.operands[0] not in labels:
        raise UnsupportedError(f"{jump}: no such label")
    return Block(tuple(instructions), jump, labels[jump.operands[0]] if jump.opcode == "bra" else count)


def _instruction(text: str, source: str = "") -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
    if found is None:
        raise UnsupportedError(f"{text}: no instruction")
    negated, predicate, name, operands = found.groups()
    # Triton 3.8 writes shared::cta, which shared alone means too
    opcode, *words = [word.removesuffix("::cta") for word in name.split(".") if word]
    kinds = tuple(word for word in words if KINDS.fullmatch(word))
    modifiers = tuple(word for word in words if word not in kinds)
    return Instruction(
        " ".join(text.split()), opcode, modifiers, kinds, _operands(operands), predicate, bool(negated), source
    )


def _operands(text: str) -> tuple[str, ...]:
    """Return the operands of an instruction's text: split at commas, but for those in braces and brackets."""
    return tuple(word.strip() for word in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if word.strip())
