"""Answers of an engine for code that runs in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.serving.engine import Cue, Engine, Piece


async def pieces(
    engine: Engine, cue: Cue, params: SamplingParams, seed: int, scored: bool = False
) -> AsyncIterator[Piece]:
    """The pieces of all answers as they come; a piece with an error is the last. To leave gives the answers up.

    scored: they tell of their tokens too.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Piece]()

    def hear(piece: Piece) -> None:
        loop.call_soon_threadsafe(arrived.put_nowait, piece)

    ticket, left = engine.ask(cue, params, seed, hear, scored), params.samples
    try:
        while left:
            piece = await arrived.get()
            left = 0 if piece.error else left - (piece.done is not None)
            yield piece
    finally:
        ticket.cancel()
