"""Pure decisions: no asyncio, threads, I/O, logging, clock or randomness. `now` is always an argument."""
