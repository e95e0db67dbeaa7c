"""The engine behind a server: one step after another in a thread of its own, while requests come
and go in the loop that serves them."""
import asyncio
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from core.net.engine import Engine
from core.web.protocol import Refused


class Job:
    """One answer that is wanted: the ids before it, and how it is drawn. The pieces of all answers
    to a request come through the same queue."""

    def __init__(self, index: int, ids: list[int], wanted, pieces: asyncio.Queue, echo: str):
        self.index, self.ids, self.wanted, self.pieces = index, ids, wanted, pieces
        self.echo, self.ended = echo, ''
        self.request: Any = None        # of the engine, once it has it


class Piece(NamedTuple):
    """What a step has added to an answer."""
    index: int          # of the answer
    ids: list[int]
    text: str
    logs: list          # log-probabilities of the ids, if they are wanted
    ended: str          # why the answer has: stop, length


async def pieces_of(jobs: list[Job]):
    """The pieces of some answers as they come. Where the prompt is echoed it comes before the
    first, and its ids, too, if their log-probabilities are wanted (None for the first id)."""
    left, begun = len(jobs), set()
    while left:
        job, piece = await jobs[0].pieces.get()
        if isinstance(piece, Refused):
            raise piece
        if job.echo and job.index not in begun:
            begun.add(job.index)
            piece = piece._replace(text=job.echo + piece.text)
            if job.wanted.prompt_logprobs:
                piece = piece._replace(ids=job.ids + piece.ids, logs=[
                    None, *job.request.prompt_logprobs, *piece.logs])
        left -= bool(piece.ended)
        yield piece


class Worker:
    """Lets the engine step while there is work. Whatever changes the engine happens between two
    steps, in this loop.

    queue   answers that may wait for a slot
    thread  in which the engine steps
    """

    def __init__(self, engine: Engine, dev, queue: int, thread: ThreadPoolExecutor):
        self.engine, self.dev, self.queue, self.counts = engine, dev, queue, Counter()
        self.coming: list[Job] = []
        self.leaving: list[Job] = []
        self.job_of, self.work, self.thread = {}, asyncio.Event(), thread

    def submit(self, jobs: list[Job]) -> None:
        """Take jobs. Raises Refused if too many wait."""
        waiting = len(self.coming) + len(self.engine.waiting)
        if waiting + len(jobs) > self.queue + self.engine.slots - len(self.engine.rows):
            raise Refused(f'{waiting} requests wait already; try again later', status=429,
                          code='rate_limit_exceeded', headers={'retry-after': '5'})
        self.coming += jobs
        self.work.set()

    def cancel(self, jobs: list[Job]) -> None:
        """Let the engine forget the answers that are not wanted any more."""
        self.leaving += [job for job in jobs if not job.ended]
        self.work.set()

    async def run(self) -> None:
        """The loop, until it is cancelled."""
        while True:
            try:
                await self.turn()
            except Exception as e:      # NaN in the weights, no memory: others are to be served
                print(f'error: {type(e).__name__}: {e}', file=sys.stderr)
                self.fail(Refused('the model failed on this request', status=500))

    async def turn(self) -> None:
        """What came and left since the last step, and the next step; waits if there is no work."""
        loop = asyncio.get_running_loop()
        while self.coming:
            job = self.coming[0]
            job.request = self.engine.submit(job.ids, job.wanted)
            self.job_of[job.request] = self.coming.pop(0)
        leaving, self.leaving = self.leaving, []
        for job in leaving:
            self.job_of.pop(job.request, None)
            if not job.ended:
                await loop.run_in_executor(self.thread, self.engine.cancel, job.request)
                self.counts['cancelled'] += 1
        if not self.engine.rows and not self.engine.waiting:
            self.work.clear()
            await self.work.wait()
            return
        for request, ids, text, logs in await loop.run_in_executor(self.thread, self.one_step):
            if job := self.job_of.get(request):
                self.counts['tokens'] += len(ids)
                job.ended = request.ended
                job.pieces.put_nowait((job, Piece(job.index, ids, text, logs, job.ended)))
                if job.ended:
                    del self.job_of[request]

    def one_step(self) -> list:
        """What a step of the engine gives, log-probabilities as well; a token that ends the answer
        is no part of it."""
        found = []
        with self.dev.autocast():
            for request, ids, text in self.engine.step():
                logs = request.logprobs[len(request.logprobs) - len(ids):] if ids else []
                n = len(ids) - (bool(ids) and ids[-1] in request.sampling.stop_tokens)
                found.append((request, ids[:n], text, logs[:n]))
        return found

    def fail(self, why: Refused) -> None:
        """End all requests."""
        for job in (*self.coming, *self.job_of.values()):
            job.ended = 'failed'
            job.pieces.put_nowait((job, why))
        self.coming.clear()
        self.job_of.clear()
        self.engine.rows.clear()
        self.engine.waiting.clear()
        self.engine.cache = None
