"""The service, and a signal that kills one of its threads: `python -m tests.support.dying_service`.

On SIGUSR1 the interpreter raises SystemExit in the first living thread whose name begins with what the file named by
DYING_THREAD holds. That is how a thread dies of something nobody caught, wherever it happens to be.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path
from types import FrameType

from vernier.__main__ import main


def kill_thread(number: int, frame: FrameType | None) -> None:
    wanted = Path(os.environ["DYING_THREAD"]).read_text()
    for thread in threading.enumerate():
        if thread.name.startswith(wanted) and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
            )
            return


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, kill_thread)
    main()
