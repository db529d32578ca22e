"""What strategies put on the wire and how long it takes: plain loops, written from the papers, not from the code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helpers import Row, rows_of

from distsim.dependencies import dependencies
from distsim.schedule import Exchange, Op, Schedule, Source


@dataclass(frozen=True)
class Expected:
    """What a strategy puts on the wire and how it waits, in closed form."""

    sizes: dict[int, int]
    """Elements of a message -> how many."""
    links: dict[tuple[int, int], tuple[int, int]]
    """(src, dst) -> (messages, elements)."""
    steps: tuple[int, ...]
    """Per schedule of the exchange."""
    waits: tuple[tuple[int, int, int, int], ...]
    """Per schedule: applies, applies that follow another one, reads after an apply, reads that gate an apply."""
    turns: dict[tuple[int, int], list[tuple[int, int, int]]]
    """(src, dst) -> what is sent in turn: (schedule, step, chunk)."""


def expected(strategy: str, n: int, p: int) -> Expected:
    """What an all-reduce of p parameters among n workers should be; `waits` holds where no chunk is empty.

    Of three strategies in closed form, of the others counted from the rows that plain loops make.
    """
    if strategy == "all-to-all":
        pairs = [(a, b) for a in range(n) for b in range(n) if a != b and p]
        busy = n > 1 and p > 0
        return Expected(
            {p: n * (n - 1)} if busy else {},
            dict.fromkeys(pairs, (1, p)),
            (int(busy),),
            ((n if busy else 0, 0, 0, 0),),
            {pair: [(0, 0, 0)] for pair in pairs},
        )
    if strategy == "parameter-server":
        pairs = [pair for worker in range(n) for pair in ((worker, n), (n, worker)) if p]
        one = int(p > 0)
        return Expected(
            {p: 2 * n} if p else {},
            dict.fromkeys(pairs, (1, p)),
            (one, one),
            ((one, 0, 0, 0), (one * n, 0, 0, 0)),
            {(src, dst): [(int(src == n), 0, 0)] for src, dst in pairs},
        )
    if strategy != "ring":
        parts = split_by_hand(p, PARTS[strategy](n) if strategy in PARTS else n)
        return counted(PLAIN[strategy](n), parts, strategy in COALESCED)
    if n == 1:
        return Expected({}, {}, (0,), ((0, 0, 0, 0),), {})
    whole, rest = divmod(p, n)
    size = [whole + (chunk < rest) for chunk in range(n)]
    sizes = {elements: 2 * (n - 1) * many for elements, many in ((whole + 1, rest), (whole, n - rest))}
    links, turns = {}, {}
    for rank in range(n):  # 2(n - 1) steps pass every chunk twice, but the last two of the second lap
        left_out = size[(rank + 1) % n], size[(rank + 2) % n]
        count = 2 * min(p, n) - sum(elements > 0 for elements in left_out)
        links[rank, (rank + 1) % n] = (count, 2 * p - sum(left_out))
        passed = [(0, step, (rank - step) % n) for step in range(2 * (n - 1))]
        turns[rank, (rank + 1) % n] = [turn for turn in passed if size[turn[2]]]
    return Expected(
        sizes={elements: many for elements, many in sizes.items() if elements and many},
        links={pair: amount for pair, amount in links.items() if amount[0]},
        steps=(2 * (n - 1) if p else 0,),
        waits=((n * 2 * (n - 1), n * (n - 2), n * (2 * n - 3), n * (n - 1)),),
        turns={pair: turn for pair, turn in turns.items() if turn},
    )


def split_by_hand(p: int, parts: int) -> list[int]:
    """Nearly equal parts, dealt out one by one."""
    sizes = [0] * parts
    for element in range(p if p < 10 * parts else p % parts):
        sizes[element % parts] += 1
    return sizes if p < 10 * parts else [size + p // parts for size in sizes]


def counted(rows: Sequence[Row], size: Sequence[int], coalesced: bool) -> Expected:
    """Count the rows of one schedule whose chunks are not empty; a pair's chunks of one step go in ascending order."""
    sent = [row for row in sorted(rows) if size[row.chunk]]
    links: dict[tuple[int, int], tuple[int, int]] = {}
    turns: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    applied: dict[tuple[int, int], set[int]] = {}
    messages = pieces(sent, coalesced)
    sizes = [sum(size[sent[i].chunk] for i in piece) for piece in messages]
    for piece, elements in zip(messages, sizes, strict=True):
        pair = sent[piece[0]].src, sent[piece[0]].dst
        count, total = links.get(pair, (0, 0))
        links[pair] = (count + 1, total + elements)
    for row in sent:
        applied.setdefault((row.dst, row.chunk), set()).add(row.step)
        turns.setdefault((row.src, row.dst), []).append((0, row.step, row.chunk))
    work = [(row.step, applied.get((row.src, row.chunk), {-1})) for row in sent if row.source == Source.WORK]
    return Expected(
        sizes=dict(Counter(sizes)),
        links=links,
        steps=(max((row.step for row in sent), default=-1) + 1,),
        waits=(
            (
                sum(map(len, applied.values())),
                sum(len(steps) - 1 for steps in applied.values()),
                sum(any(0 <= other < step for other in steps) for step, steps in work),
                sum(any(other >= step for other in steps) for step, steps in work),
            ),
        ),
        turns=turns,
    )


def pieces(rows: Sequence[Row], coalesced: bool) -> list[list[int]]:
    """Which neighbouring rows are one message: same step, sender, receiver and way, and the next chunk."""
    found: list[list[int]] = []
    for i, row in enumerate(rows):
        if coalesced and i and rows[i - 1]._replace(chunk=rows[i - 1].chunk + 1) == row:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def hop(step: int, src: int, dst: int, chunk: int, op: Op, source: Source = Source.WORK) -> Row:
    return Row(step, src, dst, chunk, op, source)


def direct(n: int) -> list[Row]:
    """Everybody to everybody, twice."""
    pairs = [(a, b) for a in range(n) for b in range(n) if a != b]
    return [hop(0, a, b, b, Op.REDUCE) for a, b in pairs] + [hop(1, a, b, a, Op.COPY) for a, b in pairs]


def pairs_and_actors(n: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Pairs (silent, acting) at the front, as many as are too many; then whoever acts, in order."""
    power = 1
    while 2 * power <= n:
        power *= 2
    pairs = [(2 * i, 2 * i + 1) for i in range(n - power)]
    return pairs, [acting for _, acting in pairs] + list(range(2 * len(pairs), n))


def recursive_doubling(n: int) -> list[Row]:
    pairs, actors = pairs_and_actors(n)
    rows = [hop(0, silent, acting, 0, Op.REDUCE) for silent, acting in pairs]
    step = int(bool(pairs))
    distance = 1
    while distance < len(actors):
        rows += [hop(step, rank, actors[i ^ distance], 0, Op.REDUCE) for i, rank in enumerate(actors)]
        step, distance = step + 1, 2 * distance
    return rows + [hop(step, acting, silent, 0, Op.COPY) for silent, acting in pairs]


def halving_doubling(n: int) -> list[Row]:
    """Actors hand over one half of what they still sum, the upper one to the upper of two; the way back is the same."""
    pairs, actors = pairs_and_actors(n)
    sums = [list(range(len(actors))) for _ in actors]
    rows = [hop(0, silent, acting, chunk, Op.REDUCE) for silent, acting in pairs for chunk in sums[0]]
    first = int(bool(pairs))
    rounds = len(actors).bit_length() - 1
    for k in range(rounds):
        for i, rank in enumerate(actors):
            j = i ^ (1 << k)
            half = len(sums[i]) // 2
            given, sums[i] = (sums[i][half:], sums[i][:half]) if i < j else (sums[i][:half], sums[i][half:])
            for chunk in given:
                rows.append(hop(first + k, rank, actors[j], chunk, Op.REDUCE))
                # What i gives to j, j gives back as late as i gave early.
                rows.append(hop(first + 2 * rounds - 1 - k, actors[j], rank, chunk, Op.COPY))
    return rows + [hop(first + 2 * rounds, b, a, chunk, Op.COPY) for a, b in pairs for chunk in range(len(actors))]


def tree(n: int, radix: int = 2) -> list[Row]:
    """Whoever is left stands in groups of `radix`: the first of each hears the others and stays."""
    left, level, up = list(range(n)), 0, []
    while len(left) > 1:
        groups = [left[i : i + radix] for i in range(0, len(left), radix)]
        up += [(level, child, group[0]) for group in groups for child in group[1:]]
        left, level = [group[0] for group in groups], level + 1
    rows = [hop(step, child, parent, 0, Op.REDUCE) for step, child, parent in up]
    return rows + [hop(2 * level - 1 - step, parent, child, 0, Op.COPY) for step, child, parent in up]


def double_tree(n: int) -> list[Row]:
    """Each tree is built from its root: the largest power of two splits the places."""

    def edges(before: int, last: int) -> tuple[int | None, list[tuple[int, int]]]:
        """Root of the places before + 1..last, and all (child, parent)."""
        if before == last:
            return None, []
        root = before + 2 ** ((last - before).bit_length() - 1)
        (left, below), (right, above) = edges(before, root - 1), edges(root, last)
        return root, [(child, root) for child in (left, right) if child is not None] + below + above

    def level(place: int) -> int:
        return 0 if place % 2 else 1 + level(place // 2)

    top, rows = n.bit_length() - 1, []
    for chunk, ranks in enumerate((list(range(n)), [n - 1, *range(n - 1)])):
        for child, parent in edges(0, n)[1]:
            a, b = ranks[child - 1], ranks[parent - 1]
            rows += [hop(level(child), a, b, chunk, Op.REDUCE), hop(2 * top - level(parent), b, a, chunk, Op.COPY)]
    return rows


def two_levels(n: int, g: int, inside: str) -> list[Row]:
    """Inside nodes of g, across them around rings, inside them; place i of node b sums chunk i * nodes + b."""
    nodes = n // g
    rows: list[Row] = []

    def ring(ranks: Sequence[int], chunks: Sequence[int], first: int, op: Op) -> int:
        """Every part goes all around: to be summed it starts behind its owner, to be copied it starts there."""
        size = len(ranks)
        for part in range(size):
            start = part + 1 if op == Op.REDUCE else part
            for step in range(size - 1):
                a, b = ranks[(start + step) % size], ranks[(start + step + 1) % size]
                rows.append(hop(first + step, a, b, chunks[part], op))
        return first + size - 1

    def straight(ranks: Sequence[int], chunks: Sequence[int], first: int, op: Op) -> int:
        for part, owner in enumerate(ranks):
            for other in ranks:
                if other != owner:
                    a, b = (other, owner) if op == Op.REDUCE else (owner, other)
                    rows.append(hop(first, a, b, chunks[part], op))
        return first + (len(ranks) > 1)

    def all_inside(first: int, op: Op) -> int:
        end = first
        walk = ring if inside == "ring" else straight
        for node in range(nodes):
            for block in range(nodes):
                end = walk([node * g + i for i in range(g)], [i * nodes + block for i in range(g)], first, op)
        return end

    def all_across(first: int, op: Op) -> int:
        end = first
        for i in range(g):
            ranks = [node * g + i for node in range(nodes)]
            end = ring(ranks, [i * nodes + node for node in range(nodes)], first, op)
        return end

    step = all_across(all_inside(0, Op.REDUCE), Op.REDUCE)
    all_inside(all_across(step, Op.COPY), Op.COPY)
    return rows


def hierarchical(n: int) -> list[Row]:
    return two_levels(n, next(g for g in (8, 7, 6, 5, 4, 3, 2, 1) if n % g == 0), "direct")


def torus(n: int) -> list[Row]:
    rows = min((r for r in range(1, n + 1) if n % r == 0), key=lambda r: (abs(r - n / r), r))
    return two_levels(n, n // rows, "ring")


PLAIN: dict[str, Callable[[int], list[Row]]] = {
    "direct": direct,
    "double-tree": double_tree,
    "halving-doubling": halving_doubling,
    "hierarchical": hierarchical,
    "recursive-doubling": recursive_doubling,
    "torus": torus,
    "tree": tree,
}
PARTS: dict[str, Callable[[int], int]] = {
    "double-tree": lambda n: 2,
    "halving-doubling": lambda n: 2 ** (n.bit_length() - 1),
    "recursive-doubling": lambda n: 1,
    "tree": lambda n: 1,
}
"""Into how many chunks the array is cut; n where nothing is said."""
COALESCED = {"halving-doubling", "hierarchical", "torus"}
"""Where chunks that lie side by side are one message."""


def observed(exchange: Exchange) -> Expected:
    """The same of an exchange's own rows, counted one by one."""
    schedules = exchange.schedules()
    sizes: Counter[int] = Counter()
    links: dict[tuple[int, int], tuple[int, int]] = {}
    turns: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for which, schedule in enumerate(schedules):
        rows, elements = rows_of(schedule), schedule.elements().tolist()
        for piece in pieces(rows, schedule.coalesced):
            pair = rows[piece[0]].src, rows[piece[0]].dst
            number = sum(elements[i] for i in piece)
            sizes[number] += 1
            count, total = links.get(pair, (0, 0))
            links[pair] = (count + 1, total + number)
            turns.setdefault(pair, []).extend((which, rows[i].step, rows[i].chunk) for i in piece)
    steps = tuple(schedule.steps for schedule in schedules)
    return Expected(dict(sizes), links, steps, tuple(map(wait_counts, schedules)), turns)


def wait_counts(schedule: Schedule) -> tuple[int, int, int, int]:
    """Applies, applies that follow another one, reads after an apply, reads that gate an apply."""
    waits = dependencies(schedule)
    columns = (waits.previous, waits.after_group, waits.gates_group)
    previous, after, gates = (int((column >= 0).sum()) for column in columns)
    return waits.groups, previous, after, gates


def fair_time_s(
    schedule: Schedule, itemsize: int, latency_s: float, bandwidth_Bps: float, posting: str = "eager"
) -> float:
    """Time of a schedule on an ideal switch with fair sharing: a fluid simulation, one event after another.

    A message's bytes flow, and arrive the latency after the last of them; rates are max-min fair on the sender's
    link out and the receiver's link in. A message begins when the one before it, from the same rank to the same, has
    flowed; with `rounds` also not before all has arrived that its sender and receiver send and receive in earlier
    steps. Additions are free. What waits for what is told by the design's rules, row by row.
    """
    rows = rows_of(schedule)
    message = pieces(rows, schedule.coalesced)
    head = [rows[piece[0]] for piece in message]
    left = [float(sum(schedule.elements()[piece])) * itemsize for piece in message]
    in_line = [[k for k in range(m) if head[k][1:3] == own[1:3]][-1:] for m, own in enumerate(head)]
    rounds = [
        [k for k, other in enumerate(head) if other.step < own.step and {own.src, own.dst} & {other.src, other.dst}]
        for own in (head if posting == "rounds" else [])
    ] or [[] for _ in head]
    waiting, flowing = set(range(len(message))), set[int]()
    lands: dict[int, float] = {}  # of all that have flowed
    arrived: set[int] = set()
    landed: set[int] = set()  # rows of what has arrived
    applied: set[tuple[int, int, int]] = set()
    at: dict[tuple[int, int], list[int]] = {}
    readers: dict[tuple[int, int], list[int]] = {}
    landing: dict[tuple[int, int, int], list[int]] = {}
    for i, row in enumerate(rows):
        landing.setdefault((row.step, row.dst, row.chunk), []).append(i)
        at.setdefault((row.dst, row.chunk), []).append(row.step)
        if row.source == Source.WORK:
            readers.setdefault((row.src, row.chunk), []).append(i)
    now = 0.0
    while len(applied) < len(landing):
        changed = True
        while changed:  # all that can happen at this moment
            changed = False
            for group in landing.keys() - applied:
                step, *place = group
                dst, chunk = place
                earlier = all((other, dst, chunk) in applied for other in at[dst, chunk] if other < step)
                reads = all(i in landed for i in readers.get((dst, chunk), ()) if rows[i].step <= step)
                if earlier and reads and landed.issuperset(landing[group]):
                    applied.add(group)
                    changed = True
            for m in sorted(waiting):
                read = [rows[i] for i in message[m] if rows[i].source == Source.WORK]
                into = [(step, row) for row in read for step in at.get((row.src, row.chunk), ()) if step < row.step]
                ready = applied.issuperset((step, row.src, row.chunk) for step, row in into)
                if ready and lands.keys() >= set(in_line[m]) and arrived.issuperset(rounds[m]):
                    waiting.remove(m)
                    flowing.add(m)
                    changed = True
        rate = max_min({m: (("out", head[m].src), ("in", head[m].dst)) for m in flowing}, bandwidth_Bps)
        events = [now + left[m] / rate[m] for m in flowing] + [lands[m] for m in lands.keys() - arrived]
        if not events:
            break
        step_s = min(events) - now
        now = min(events)
        for m in sorted(flowing):
            left[m] -= rate[m] * step_s
            if left[m] <= 1e-9 * bandwidth_Bps * now:
                flowing.remove(m)
                lands[m] = now + latency_s
        arrived.update(m for m in lands if lands[m] <= now * (1 + 1e-12))
        landed.update(i for m in arrived for i in message[m])
    return now


def max_min(links: dict[int, tuple[tuple[str, int], tuple[str, int]]], capacity: float) -> dict[int, float]:
    """Fill the links of equal capacity until no flow can get more: the fullest link first."""
    rate: dict[int, float] = {}
    while len(rate) < len(links):
        room: dict[tuple[str, int], float] = {}
        users: Counter[tuple[str, int]] = Counter()
        for flow, path in links.items():
            for link in path:
                room[link] = room.get(link, capacity) - rate.get(flow, 0.0)
                users[link] += flow not in rate
        tight = min((link for link in users if users[link]), key=lambda link: room[link] / users[link])
        share = room[tight] / users[tight]
        rate |= {flow: share for flow, path in links.items() if tight in path and flow not in rate}
    return rate
