"""`python -m tests.support.without_uvloop`: the service on asyncio's own event loop."""

import sys

sys.modules["uvloop"] = None  # type: ignore[assignment]

from vernier.__main__ import main  # noqa: E402

if __name__ == "__main__":
    main()
