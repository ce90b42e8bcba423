"""Machine code as it runs where chunks take no detour: without the loops over Gaussians of those that clamp.

skip_detours(instructions(compiled.code))
"""

from __future__ import annotations

from bench.machine_code import Instruction, find_labels


def skip_detours(code: list[Instruction]) -> list[Instruction]:
    """Return the instructions without what only loops that load inside the main loop need; all where there is none."""
    edges = _find_edges(code)
    loops = [loop for loop in _find_loops(edges, set(range(len(code)))) if any(code[i].loads for i in loop)]
    small = [loop for loop in loops if _loads_scalars(code, loop)]
    large = [loop for loop in loops if loop not in small]
    inner = [loop for loop in large if not any(other < loop for other in large)]
    loop = max(inner, key=len, default=set())
    detours = set().union(*(one for one in small if one < loop))
    if not detours:
        return code
    turn = _find_turn(edges, loop, detours)
    before = _reach(edges, 0, loop)
    after = set().union(*(_reach(edges, j, loop) for i in turn for j in edges[i] if j not in loop))
    return [step for i, step in enumerate(code) if i in before or i in turn or i in after]


def _find_edges(code: list[Instruction]) -> list[list[int]]:
    """Return where each instruction may lead."""
    places, edges = find_labels(code), []
    for i, step in enumerate(code):
        ends = step.operation in ("EXIT", "RET", "s_endpgm") or step.target
        following = [i + 1] if i + 1 < len(code) and (step.predicated or not ends) else []
        # BRA.DIV goes where lanes have parted, which they have not here
        jumps = step.target in places and not step.name.startswith("BRA.DIV")
        edges.append(following + ([places[step.target]] if jumps else []))
    return edges


def _find_loops(edges: list[list[int]], nodes: set[int]) -> list[set[int]]:
    """Return every loop among some instructions, also those inside others."""
    found = []
    for loop in _find_cycles(edges, nodes):
        # nothing is repeated without what comes first
        found += [loop, *_find_loops(edges, loop - {min(loop)})]
    return found


def _loads_scalars(code: list[Instruction], loop: set[int]) -> bool:
    """Tell whether a loop loads no more than both parameters of up to four Gaussians, and stores nothing."""
    moved = [code[i] for i in loop if code[i].bits]
    return len(moved) <= 8 and all(step.loads and step.bits <= 32 for step in moved)


def _find_cycles(edges: list[list[int]], nodes: set[int]) -> list[set[int]]:
    """Return the strongly connected components of more than one instruction."""
    sources: dict[int, list[int]] = {i: [] for i in nodes}
    for i in nodes:
        for j in edges[i]:
            if j in nodes:
                sources[j].append(i)
    order, seen = [], set()
    for root in sorted(nodes):
        stack = [(root, iter(edges[root]))] if root not in seen else []
        seen.add(root)
        while stack:
            i, following = stack[-1]
            step = next((j for j in following if j in nodes and j not in seen), None)
            if step is None:
                order.append(i)
                stack.pop()
            else:
                seen.add(step)
                stack.append((step, iter(edges[step])))
    cycles, left = [], set(nodes)
    for root in reversed(order):
        if root in left:
            component, todo = set(), [root]
            while todo:
                i = todo.pop()
                if i in left:
                    left.discard(i)
                    component.add(i)
                    todo += sources[i]
            if len(component) > 1:
                cycles.append(component)
    return cycles


def _find_turn(edges: list[list[int]], loop: set[int], detours: set[int]) -> set[int]:
    """Return the shortest way around a loop without detours."""
    head = min(loop)
    origin, todo = {head: head}, [head]
    for i in todo:
        for j in edges[i]:
            if j == head:
                turn = {i}
                while i != head:
                    i = origin[i]
                    turn.add(i)
                return turn
            if j in loop and j not in detours and j not in origin:
                origin[j] = i
                todo.append(j)
    return loop


def _reach(edges: list[list[int]], start: int, barred: set[int]) -> set[int]:
    """Return what an instruction leads to before any that is barred."""
    found, todo = set(), [start]
    while todo:
        i = todo.pop()
        if i not in found and i not in barred:
            found.add(i)
            todo += edges[i]
    return found
