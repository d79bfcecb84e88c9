"""What the engine does, as it does it: a feed of events for those who watch, and the page that draws them."""

from __future__ import annotations

from tinyllm.server.live.facts import ModelFacts
from tinyllm.server.live.feed import LiveFeed
from tinyllm.server.live.router import live_router

__all__ = ["LiveFeed", "ModelFacts", "live_router"]
