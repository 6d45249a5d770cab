"""Has the repository look at the engines folder again and again, so that new packages are served by themselves."""

from __future__ import annotations

import asyncio
import logging
import time

from vernier.serving.models.folder import Pending
from vernier.serving.models.repository import Repository

logger = logging.getLogger(__name__)


async def watch(repository: Repository, every_s: float) -> None:
    """Until it is cancelled; at once when `every_s` is 0. A look that fails is named once, and the next one follows."""
    pending = Pending()
    failure = ""
    while every_s:
        await asyncio.sleep(every_s)
        try:
            pending = await repository.look(pending, time.monotonic())
            failure = ""
        except Exception as error:  # what is loaded is served; a file system may come back
            if repr(error) != failure:
                failure = repr(error)
                logger.exception("the engines folder cannot be watched; the service goes on with what it has")
