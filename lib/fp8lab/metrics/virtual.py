"""vLLM's scheduling of a load in virtual time: who is admitted when, what each step computes, when each token comes.

No server, no waiting. Steps in which nothing changes but the contexts are taken together, so that thousands of requests
take a fraction of a second. What is followed is vLLM's first-come scheduler with chunked prefill and without prefix caching
(`vllm/v1/core/sched`): running requests first, then waiting ones while tokens, seats and KV blocks are left; when blocks run
out, the one admitted last is preempted, and begins anew with the tokens that it had. With asynchronous scheduling, vLLM's
default on a GPU, a step is put together while the one before it runs (`depth` 2): a request waits for that one too, and
what has ended holds its seat for a step longer.
"""

import bisect
import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import BadInput


@dataclass(frozen=True)
class Limits:
    """What a server takes on at once: running requests, tokens a step, blocks of KV cache and tokens a block; how many steps
    it has in hand (`depth`); and for how long a token keeps its API server busy (s; 0: that is never full)."""

    requests: int
    step_tokens: int
    blocks: int
    block: int = 16
    depth: int = 2
    api_s: float = 0.0


class Step(NamedTuple):
    """What a step computes: requests that decode, tokens of prompts, requests given a token, tokens of context, and pairs of a
    prompt's token with one that it attends to."""

    decoding: int
    prompt: int
    emitted: int
    context: int
    pairs: float = 0.0


def attended(before: int, tokens: int) -> float:
    """The pairs that so many tokens make, after those that came `before` them: each attends to all up to itself."""
    return tokens * (before + (tokens + 1) / 2)


@dataclass
class Course:
    """How a load went: for each request when its first and its last token came (s; nan: never); how many steps, in how
    many seconds, the tokens that they computed and those of context that they read, how many requests ran and blocks
    were held at most; preemptions. Until when the API server has something to do, and how far behind it was (s)."""

    first_s: np.ndarray
    last_s: np.ndarray
    steps: int = 0
    busy_s: float = 0.0
    tokens: int = 0
    context: int = 0
    running_max: int = 0
    blocks_max: int = 0
    preemptions: int = 0
    given_s: float = 0.0
    behind_s: float = 0.0

    def hand_out(self, work_s: float, steps: int, first_end: float, last_end: float) -> float:
        """When the API server has handed out the tokens of so many steps, which ended from `first_end` to `last_end`:
        those of each keep it busy for `work_s`. Steps grow longer: the first or the last one, if any, finds it idle."""
        self.given_s = max(self.given_s + steps * work_s, first_end + steps * work_s, last_end + work_s)
        self.behind_s = max(self.behind_s, self.given_s - last_end)
        return self.given_s


class _Request:
    """`length` tokens are to be read before the next one comes: the prompt and, after a preemption, the `had` tokens of its
    answer. `read` is the step that reads the last of them, `last` the one that gives the answer's last token; -1: not yet."""

    __slots__ = ("answer", "computed", "had", "index", "last", "length", "prompt", "read")

    def __init__(self, index: int, prompt: int, answer: int):
        self.index, self.prompt, self.answer = index, prompt, answer
        self.length, self.had, self.computed, self.read, self.last = prompt, 0, 0, -1, -1

    def tokens(self, step: int) -> int:
        """How many tokens have their place in the cache once `step` has run."""
        return self.computed if self.read < 0 else self.length + min(step, self.last) - self.read

    def given(self, step: int) -> int:
        """How many tokens of the answer are known once `step` has run."""
        return self.had + (max(0, min(step, self.last) - self.read + 1) if self.read >= 0 else 0)


class _Decoding:
    """The requests that decode, as sums: what they hold at a step follows without looking at each."""

    def __init__(self, block: int):
        self.block, self.count, self.offsets, self.whole = block, 0, 0, 0
        self.rests = [0] * block

    def change(self, one: _Request, by: int) -> None:
        offset = one.length - one.read
        self.count += by
        self.offsets += by * offset
        self.whole += by * (offset // self.block)
        self.rests[offset % self.block] += by

    def context(self, step: int) -> int:
        return self.offsets + self.count * step

    def blocks(self, step: int) -> int:
        each, left = divmod(step + self.block - 1, self.block)
        return self.whole + self.count * each + sum(self.rests[self.block - left :])


def play(
    prompts: Sequence[int], answers: Sequence[int], due_s: Sequence[float], limits: Limits,
    seconds: Callable[[Step], float], watch: Callable[[int, Sequence[int], int], None] | None = None,
) -> Course:  # fmt: skip
    """The course of requests with so many tokens of prompt and answer, each shape (requests,), that come at `due_s`, ascending.

    Raises BadInput for a request that the cache cannot hold. `seconds` says how long a step takes; it grows by as much with
    each token of context. `watch`, for tests, is told the
    number of each step, who is running, and how many blocks are held, and has every step taken by itself."""
    return _Play(prompts, answers, due_s, limits, seconds, watch).run()


class _Play:
    def __init__(self, prompts, answers, due_s, limits: Limits, seconds, watch):
        self.all = [_Request(i, int(p), int(a)) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
        self.due = [float(at) for at in due_s]
        self.limits, self.seconds, self.watch = limits, seconds, watch
        self.course = Course(np.full(len(self.due), np.nan), np.full(len(self.due), np.nan))
        self.seats: list[_Request] = []  # as they were admitted
        self.waiting: deque[_Request] = deque()
        self.reading: list[_Request] = []
        self.decoding = _Decoding(limits.block)
        self.idle_blocks = 0  # held by those that have ended and are not known to have
        self.ends: list[tuple[int, int]] = []  # (last step, request) of those that decode
        self.ended: deque[tuple[int, int]] = deque()
        # The step that is put together now, when that is, when it begins, and the last one whose tokens are known.
        self.step, self.made, self.begins, self.known = 1, 0.0, 0.0, 0
        self.preempted = False  # while the coming step was put together
        for one in self.all:
            if self._blocks(one.prompt + one.answer - 1) > limits.blocks:
                raise BadInput(
                    f"request {one.index} of {one.prompt:,} + {one.answer:,} tokens does not fit in a KV cache of "
                    f"{limits.blocks * limits.block:,}"
                )
        if limits.requests < 1 or limits.step_tokens < 1:
            raise BadInput(
                f"a server of {limits.requests} requests and {limits.step_tokens} tokens a step runs nothing"
            )

    def run(self) -> Course:
        arrived = 0
        while True:
            while arrived < len(self.due) and self.due[arrived] <= self.made:
                self.waiting.append(self.all[arrived])
                arrived += 1
            self._release()
            if not self.seats and not self.waiting:
                if arrived == len(self.due):
                    return self.course
                self.made = self.begins = max(self.begins, self.due[arrived])
                continue
            now = self._put_together()
            if not now.decoding and not now.prompt:
                # vLLM waits for what is in hand before it looks again.
                self.made, self.known = self.begins, self.step - 1
                continue
            self._take(now, self.due[arrived] if arrived < len(self.due) else math.inf)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block)

    def _held(self, step: int) -> int:
        held = self.decoding.blocks(step) + self.idle_blocks
        for one in self.reading:
            held += self._blocks(one.computed)
        return held

    def _release(self) -> None:
        """Frees what has ended and is known to have."""
        while self.ended and self.ended[0][0] <= self.known:
            last, index = self.ended.popleft()
            one = self.all[index]
            self.seats.remove(one)
            self.idle_blocks -= self._blocks(one.tokens(last))

    def _put_together(self) -> Step:
        """Gives the coming step its tokens; preempts and admits."""
        limits, step, self.preempted = self.limits, self.step, False
        while self._held(step) > limits.blocks and self.seats:
            self._preempt()
        decoding = emitted = self.decoding.count
        left, prompt, pairs = limits.step_tokens - decoding, 0, 0.0
        context = self.decoding.context(step)
        began = len(self.reading)
        while left > 0:
            if began:
                one = self.reading[-began]
                began -= 1
            elif self.waiting and not self.preempted and len(self.seats) < limits.requests:
                one = self.waiting[0]
                # The whole of it has to fit, though a step may read a part (scheduler_reserve_full_isl).
                if self._held(step) + self._blocks(one.length) > limits.blocks:
                    break
                self.seats.append(self.waiting.popleft())
                self.reading.append(one)
            else:
                break
            take = min(left, one.length - one.computed)
            more = self._blocks(one.computed + take) - self._blocks(one.computed)
            if self._held(step) + more > limits.blocks:
                self._preempt()
                break
            pairs += attended(one.computed, take)
            one.computed += take
            left, prompt, context = left - take, prompt + take, context + one.computed
            if one.computed == one.length:
                self.reading.remove(one)
                one.read, one.last = step, step + one.answer - one.had - 1
                self.decoding.change(one, +1)
                heapq.heappush(self.ends, (one.last, one.index))
                emitted += 1
        return Step(decoding, prompt, emitted, context, pairs)

    def _preempt(self) -> None:
        """Takes the seat of the one admitted last; it waits first, with the tokens that it has or will have of what runs."""
        one, self.preempted = self.seats.pop(), True
        self.course.preemptions += 1
        if one.read >= 0 and one.last < self.step:  # it has ended, which is not known yet
            self.ended.remove((one.last, one.index))
            self.idle_blocks -= self._blocks(one.tokens(one.last))
            return
        if one.read < 0:
            self.reading.remove(one)
        else:
            self.decoding.change(one, -1)
            self.ends.remove((one.last, one.index))
            heapq.heapify(self.ends)
        one.had = one.given(self.step - 1)
        one.length, one.computed, one.read, one.last = one.prompt + one.had, 0, -1, -1
        self.waiting.appendleft(one)

    def _take(self, now: Step, next_due: float) -> None:
        """Lets the step run, and with it those after it that are like it."""
        course, step = self.course, self.step
        took, more, taken = self.seconds(now), 0.0, 1
        course.running_max = max(course.running_max, len(self.seats))
        if self.watch:
            self.watch(step, [one.index for one in self.seats], self._held(step))
        elif not now.prompt and not self.reading:
            more = self.seconds(now._replace(context=now.context + now.decoding)) - took
            taken = self._alike(now, took, more, next_due)
        spent = took * taken + more * taken * (taken - 1) / 2
        before = took * (taken - 1) + more * (taken - 1) * (taken - 2) / 2
        end, self.step = self.begins + spent, step + taken
        course.blocks_max = max(course.blocks_max, self._held(self.step - 1))
        course.steps += taken
        course.busy_s += spent
        course.tokens += taken * (now.decoding + now.prompt)
        course.context += taken * now.context + now.decoding * taken * (taken - 1) // 2
        self.made = end if self.limits.depth == 1 else self.begins + before
        given = course.hand_out(now.emitted * self.limits.api_s, taken, self.begins + took, end)
        self.begins, self.known = end, max(self.known, self.step - self.limits.depth)
        self._tokens_come(step, given)

    def _alike(self, now: Step, took: float, more: float, next_due: float) -> int:
        """How many steps from this one on decode the same requests, with nobody to admit in between."""
        step, depth = self.step, self.limits.depth
        if self.preempted and self.waiting:
            return 1  # it may have made room for the next step to admit
        most = self.ends[0][0] - step + 1
        if self.ended:
            most = min(most, max(1, self.ended[0][0] + depth - step))
        if len(self.seats) < self.limits.requests and not self.waiting:
            most = min(most, max(1, self._until(next_due - self.begins, took, more) + depth - 1))
        if self._held(step + most - 1) > self.limits.blocks:
            fit = bisect.bisect_right(range(step, step + most), self.limits.blocks, key=self._held)
            most = max(1, fit)
        return most

    @staticmethod
    def _until(wait: float, took: float, more: float) -> int:
        """The steps that pass until `wait` seconds have: the least m with took m + more m (m - 1) / 2 >= wait."""
        if wait <= 0:
            return 0
        if wait == math.inf:
            return 1 << 40
        half = took - more / 2
        m = max(1, math.ceil((math.sqrt(half * half + 2 * more * wait) - half) / more if more > 0 else wait / took))
        while took * m + more * m * (m - 1) / 2 < wait:  # rounding
            m += 1
        return m

    def _tokens_come(self, step: int, given: float) -> None:
        """Notes first and last tokens of the steps from `step` on, those of the last of which are handed out at `given`."""
        for one in reversed(self.seats):
            if 0 <= one.read < step:
                break
            if one.read == step and not one.had:
                self.course.first_s[one.index] = given
        while self.ends and self.ends[0][0] < self.step:
            one = self.all[heapq.heappop(self.ends)[1]]
            self.decoding.change(one, -1)
            self.course.last_s[one.index] = given
            self.idle_blocks += self._blocks(one.tokens(one.last))
            self.ended.append((one.last, one.index))
