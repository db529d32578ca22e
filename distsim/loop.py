"""The event loop of the engine, in plain Python that Numba compiles as it stands.

Two kinds of events: a task is ready (its number), or flows end (a negative number). A flow is a task that shares
its resources; all flows of one component of the network that end at the same time are one event. All events of
one time come first; then only the components whose flows have changed are shared anew.

Everything is in one function and in columns of numbers: calls and objects would cost more than the work itself.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

SAME = 1e-12
"""Flows of a component whose ends differ by less than this fraction end together: rounding, not order."""

WIDE = 0
"""Added to a 32-bit number, it makes the compiler take 64 bits, which is what heaps and lists here hold."""


def run_tasks(
    amount: Any,
    route: Any,
    waits: Any,
    next_ptr: Any,
    following: Any,
    next_in_line: Any,
    route_ptr: Any,
    route_resources: Any,
    route_latency_s: Any,
    route_fair: Any,
    capacity: Any,
    overhead_s: Any,
    ready_s: Any,
    finish_s: Any,
    links: Any,
    flows: Any,
    agenda: Any,
    lists: Any,
    hops: int,
) -> Any:
    """Run all tasks; return when each was started and finished, and for how many others each still waits.

    What a task with a route finishes is its part of the route; the route's latency is for the caller to add.
    `ready_s` and `finish_s` come as zeros, shape (tasks,), the rest as `engine.py` makes it. No route has more
    than `hops` resources.
    """
    timed = len(amount)
    free_s, first_place, flows_on, seen_link, left, weight, rising_on = links
    task_in, rate, to_move, since_s, due_s, leads, follows, seen, next_place, before_place, spare_slots = flows
    entry_number, entry_next, bucket_s, bucket_serial, bucket_entry = agenda
    finished, changed, members = lists
    spare_count, spare_entry = len(spare_slots), 0
    finished_count, changed_count = 0, 0
    # The agenda: a heap of buckets (time, serial, first entry); entries of a bucket are chained. What is entered
    # for the same time in a row goes into the same bucket, one of tasks and one of ends being open at a time.
    buckets = 0
    serial = 0
    open_ready_s, last_ready, open_end_s, last_end = -1.0, -1, -1.0, -1
    shares = [(0.0, 0) for _ in range(0)]
    turn = 0

    for task in range(len(waits)):  # what waits for nothing is ready at once
        if waits[task] == 0:
            if spare_entry == len(entry_next):
                return ready_s, finish_s, waits, False
            new = spare_entry
            spare_entry = entry_next[new]
            entry_number[new], entry_next[new] = task, -1
            if last_ready < 0:
                _push(bucket_s, bucket_serial, bucket_entry, buckets, 0.0, 0, new)
                buckets += 1
            else:
                entry_next[last_ready] = new
            last_ready = new

    while buckets > 0:
        now = bucket_s[0]
        while buckets > 0 and bucket_s[0] == now:
            entry = bucket_entry[0]
            buckets -= 1
            _drop_first(bucket_s, bucket_serial, bucket_entry, buckets)
            open_ready_s, open_end_s = -1.0, -1.0
            while entry >= 0:
                number = entry_number[entry]
                after = entry_next[entry]
                entry_next[entry] = spare_entry
                spare_entry = entry
                entry = after
                if number < 0:
                    # Flows end, unless what was expected then has changed since.
                    slot = -1 - number
                    if not leads[slot] or due_s[slot] != now:
                        continue
                    leads[slot] = False
                    while slot >= 0:
                        task = task_in[slot]
                        path = route[task]
                        base = slot * hops - route_ptr[path]
                        for i in range(route_ptr[path], route_ptr[path + 1]):
                            link = route_resources[i]
                            flows_on[link] -= 1
                            later, earlier = next_place[base + i], before_place[base + i]
                            if earlier >= 0:
                                next_place[earlier] = later
                            else:
                                first_place[link] = later
                            if later >= 0:
                                before_place[later] = earlier
                            if flows_on[link] > 0:
                                if changed_count == len(changed):
                                    return ready_s, finish_s, waits, False
                                changed[changed_count] = -1 - link
                                changed_count += 1
                        finish_s[task] = now
                        if finished_count == len(finished):
                            return ready_s, finish_s, waits, False
                        finished[finished_count] = task
                        finished_count += 1
                        spare_slots[spare_count] = slot
                        spare_count += 1
                        slot = follows[slot]
                elif number >= timed:
                    finished[0], finished_count = number, 1  # a join that waits for nothing
                elif route_fair[route[number]]:
                    # A flow begins; its rate comes once all events of this time are over.
                    task = number
                    path = route[task]
                    if spare_count == 0:
                        return ready_s, finish_s, waits, False
                    spare_count -= 1
                    slot = spare_slots[spare_count]
                    task_in[slot] = task
                    to_move[slot] = amount[task]
                    since_s[slot] = now
                    rate[slot] = 0.0
                    leads[slot] = False
                    base = slot * hops - route_ptr[path]
                    for i in range(route_ptr[path], route_ptr[path + 1]):
                        link = route_resources[i]
                        flows_on[link] += 1
                        later = first_place[link]
                        next_place[base + i] = later
                        before_place[base + i] = -1
                        if later >= 0:
                            before_place[later] = base + i
                        first_place[link] = base + i
                    if changed_count == len(changed):
                        return ready_s, finish_s, waits, False
                    changed[changed_count] = slot
                    changed_count += 1
                    continue
                else:
                    # A task takes resources in order, once all of them are free.
                    task = number
                    path = route[task]
                    start, held = now, 0.0
                    for i in range(route_ptr[path], route_ptr[path + 1]):
                        start = max(start, free_s[route_resources[i]])
                    for i in range(route_ptr[path], route_ptr[path + 1]):
                        link = route_resources[i]
                        busy = amount[task] / capacity[link] + overhead_s[link]
                        free_s[link] = start + busy
                        held = max(held, busy)
                    ready_s[task] = start  # from here on the column means: when it started
                    finish_s[task] = start + held
                    finished[0], finished_count = task, 1

                # Let go what waited for nothing else; joins take no time and let go in turn.
                position = 0
                while position < finished_count:
                    task = finished[position]
                    position += 1
                    begin = next_ptr[task]
                    for i in range(begin - 1, next_ptr[task + 1]):
                        when = finish_s[task]
                        if i < begin:  # the next in line goes when the route is let go, all others once it has arrived
                            waiter = WIDE + next_in_line[task] if task < timed else -1
                            if waiter < 0:
                                continue
                        else:
                            waiter = WIDE + following[i]
                            if task < timed:
                                when += route_latency_s[route[task]]
                        if when > ready_s[waiter]:
                            ready_s[waiter] = when
                        waits[waiter] -= 1
                        if waits[waiter] > 0:
                            continue
                        if waiter >= timed:
                            finish_s[waiter] = ready_s[waiter]
                            if finished_count == len(finished):
                                return ready_s, finish_s, waits, False
                            finished[finished_count] = waiter
                            finished_count += 1
                            continue
                        if spare_entry == len(entry_next):
                            return ready_s, finish_s, waits, False
                        new = spare_entry
                        spare_entry = entry_next[new]
                        entry_number[new], entry_next[new] = waiter, -1
                        if ready_s[waiter] == open_ready_s:
                            entry_next[last_ready] = new
                        else:
                            open_ready_s = ready_s[waiter]
                            serial += 1
                            _push(bucket_s, bucket_serial, bucket_entry, buckets, open_ready_s, serial, new)
                            buckets += 1
                        last_ready = new
                finished_count = 0

        # Share anew: each component of the network with a flow that has come or gone.
        if changed_count == 0:
            continue
        turn += 1
        for index in range(changed_count):
            slot = number = changed[index]
            if number < 0:
                if seen_link[-1 - number] == turn or flows_on[-1 - number] == 0:
                    continue
                slot = first_place[-1 - number] // hops
            if seen[slot] == turn:
                continue
            seen[slot] = turn
            path = route[task_in[slot]]
            size = amount[task_in[slot]]
            alone, best = True, np.inf
            for i in range(route_ptr[path], route_ptr[path + 1]):
                link = route_resources[i]
                full_rate = capacity[link]
                if overhead_s[link] > 0.0:
                    full_rate /= 1.0 + overhead_s[link] * full_rate / size
                best = min(best, full_rate)
                alone = alone and flows_on[link] == 1
            to_move[slot] -= rate[slot] * (now - since_s[slot])
            since_s[slot] = now
            if alone:
                rate[slot] = best
                soonest = now + to_move[slot] / best
                due_s[slot] = soonest
                follows[slot] = -1
                leader = slot
            else:
                # All flows of the component, and its links with their demand.
                rate[slot] = -1.0  # still rising
                leads[slot] = False
                members[0], count, reached = slot, 1, 0
                while reached < count:
                    path = route[task_in[members[reached]]]
                    reached += 1
                    for i in range(route_ptr[path], route_ptr[path + 1]):
                        link = route_resources[i]
                        if seen_link[link] == turn:
                            continue
                        seen_link[link] = turn
                        demand = 0.0
                        place = first_place[link]
                        while place >= 0:
                            other = place // hops
                            demand += 1.0 + overhead_s[link] * capacity[link] / amount[task_in[other]]
                            if seen[other] != turn:
                                seen[other] = turn
                                to_move[other] -= rate[other] * (now - since_s[other])
                                since_s[other] = now
                                rate[other] = -1.0
                                leads[other] = False
                                if count == len(members):
                                    return ready_s, finish_s, waits, False
                                members[count] = other
                                count += 1
                            place = next_place[place]
                        left[link] = capacity[link]
                        weight[link] = demand
                        rising_on[link] = flows_on[link]
                        shares.append((capacity[link] / demand, WIDE + link))
                # All rates rise together; the link that is full first sets those of its flows.
                heapify(shares)
                rising = count
                while rising > 0:
                    share, full = heappop(shares)
                    if rising_on[full] == 0:
                        continue
                    present = left[full] / weight[full]
                    if present > share * (1.0 + SAME):  # flows that stopped elsewhere leave more: not yet full
                        heappush(shares, (present, full))
                        continue
                    place = first_place[full]
                    while place >= 0:
                        other = place // hops
                        place = next_place[place]
                        if rate[other] >= 0.0:
                            continue
                        rate[other] = share
                        rising -= 1
                        task = task_in[other]
                        path = route[task]
                        for i in range(route_ptr[path], route_ptr[path + 1]):
                            link = route_resources[i]
                            demand = 1.0 + overhead_s[link] * capacity[link] / amount[task]
                            left[link] -= share * demand
                            weight[link] -= demand
                            rising_on[link] -= 1
                soonest = np.inf
                for index_of in range(count):
                    other = members[index_of]
                    due_s[other] = now + to_move[other] / rate[other]
                    soonest = min(soonest, due_s[other])
                leader = -1
                for index_of in range(count):
                    other = members[index_of]
                    if due_s[other] - soonest <= SAME * soonest:
                        due_s[other] = soonest
                        follows[other] = leader
                        leader = other
                shares.clear()
            leads[leader] = True
            if spare_entry == len(entry_next):
                return ready_s, finish_s, waits, False
            new = spare_entry
            spare_entry = entry_next[new]
            entry_number[new], entry_next[new] = -1 - leader, -1
            if soonest == open_end_s:
                entry_next[last_end] = new
            else:
                open_end_s = soonest
                serial += 1
                _push(bucket_s, bucket_serial, bucket_entry, buckets, soonest, serial, new)
                buckets += 1
            last_end = new
        changed_count = 0
    return ready_s, finish_s, waits, True


def _push(times: Any, serials: Any, entries: Any, count: int, time: float, serial: int, entry: int) -> None:
    """Add a bucket to a heap of `count` others, in which each has up to four below it; the first is the earliest.

    heapq does the same on tuples, and takes two to four times as long.
    """
    place = count
    while place > 0:
        above = (place - 1) >> 2
        if times[above] < time or (times[above] == time and serials[above] < serial):
            break
        times[place], serials[place], entries[place] = times[above], serials[above], entries[above]
        place = above
    times[place], serials[place], entries[place] = time, serial, entry


def _drop_first(times: Any, serials: Any, entries: Any, count: int) -> None:
    """Take the first bucket out of a heap in which `count` others remain."""
    time, serial, entry = times[count], serials[count], entries[count]
    place = 0
    while 4 * place + 1 < count:
        below = 4 * place + 1
        for other in range(below + 1, min(below + 4, count)):
            if times[other] < times[below] or (times[other] == times[below] and serials[other] < serials[below]):
                below = other
        if time < times[below] or (time == times[below] and serial < serials[below]):
            break
        times[place], serials[place], entries[place] = times[below], serials[below], entries[below]
        place = below
    times[place], serials[place], entries[place] = time, serial, entry
