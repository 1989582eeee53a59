"""The dashboard: pages for a browser at `/`, and the stream that keeps them current."""
