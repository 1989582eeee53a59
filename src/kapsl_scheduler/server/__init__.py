"""Protocols: from bytes to requests and from answers to bytes. Nothing here decides what runs when."""
