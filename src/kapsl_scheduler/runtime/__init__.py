"""The async shell around core: event loop, engine threads, timers."""
