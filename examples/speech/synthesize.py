"""Speech for training and testing, synthesized by espeak-ng into a cache of WAV files.

    python examples/speech/synthesize.py --cache build/speech

Which clips there are is a pure function of the split and the seed. The cache may be deleted at any
time; a clip that is already in it is not made again. Needs `apt-get install espeak-ng`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.speech.words import KEYWORDS, LABELS, OTHER_WORDS, UNHEARD_WORDS, UNKNOWN

ACCENTS = (
    "en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-us-nyc",
)  # fmt: skip
TEST_ACCENTS = (*ACCENTS, "en-029")  # the Caribbean accent is never trained on

# A voice is an accent spoken by one of espeak-ng's speakers. Speakers who are near-copies of each
# other stand in the same split; the ones that copy a test speaker (steph2, steph3) or another
# training speaker (klatt, klatt6) are in none.
TEST_SPEAKERS = (
    "Alicia", "Andrea", "Andy", "Lee", "Mr serious", "announcer", "aunty", "boris", "f4", "grandma",
    "linda", "norbert", "pablo", "pedro", "quincy", "sandro", "steph", "travis", "victor", "zac",
)  # fmt: skip
DEVELOPMENT_SPEAKERS = ("Annie", "Denis", "Jacky", "f3", "gustave", "iven", "m2", "m4", "paul", "robosoft4")
TRAINING_SPEAKERS = (
    "Alex", "AnxiousAndy", "Demonic", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Marco", "Mario",
    "Michael", "Mike", "Nguyen", "RicishayMax", "RicishayMax2", "RicishayMax3", "Storm", "Tweaky", "UniRobot",
    "adam", "anika", "anikaRobot", "antonio", "belinda", "benjamin", "caleb", "croak", "david", "ed", "edward",
    "edward2", "f1", "f2", "f5", "fast", "grandpa", "iven2", "iven3", "iven4", "john", "kaukovalta", "klatt2",
    "klatt3", "klatt4", "klatt5", "m1", "m3", "m5", "m6", "m7", "m8", "marcelo", "max", "michel", "miguel",
    "rob", "robert", "robosoft", "robosoft2", "robosoft3", "robosoft5", "robosoft6", "robosoft7", "robosoft8",
    "shelby", "whisper", "whisperf",
)  # fmt: skip


class SynthesisError(RuntimeError):
    """espeak-ng is missing or refused; the message says what to do."""


@dataclass(frozen=True)
class Clip:
    """One utterance: what is said, by whom, and how."""

    word: str
    accent: str
    speaker: str
    words_per_minute: int
    pitch: int  # 0 to 99, the speaker's own being 50
    ending: str  # punctuation, which bends the melody

    @property
    def label(self) -> int:
        """The class index in LABELS."""
        return LABELS.index(self.word if self.word in KEYWORDS else UNKNOWN)

    @property
    def file_name(self) -> str:
        """Unique to the clip, and safe on any file system."""
        return f"{self.word}-{hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:16]}.wav"


@dataclass(frozen=True)
class Split:
    """Who speaks, what else they say than keywords, and how many clips of each."""

    speakers: Sequence[str]
    accents: Sequence[str]
    others: Sequence[str]
    per_keyword: int
    unknown: int


SPLITS = {
    "training": Split(TRAINING_SPEAKERS, ACCENTS, OTHER_WORDS, per_keyword=480, unknown=2800),
    "development": Split(DEVELOPMENT_SPEAKERS, ACCENTS, OTHER_WORDS, per_keyword=30, unknown=80),
    "test": Split(
        TEST_SPEAKERS, TEST_ACCENTS, (*OTHER_WORDS[::3], *UNHEARD_WORDS), per_keyword=40, unknown=80
    ),
}


def plan(split: str, seed: int = 0) -> list[Clip]:
    """The clips of a split, distinct and always the same for the same seed."""
    want = SPLITS[split]
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    words = [word for word in KEYWORDS for _ in range(want.per_keyword)]
    words += [want.others[i % len(want.others)] for i in range(want.unknown)]
    clips: dict[Clip, None] = {}
    for word in words:
        wanted = len(clips) + 1
        while len(clips) < wanted:
            clips[_draw(word, want, rng)] = None
    return list(clips)


def _draw(word: str, split: Split, rng: np.random.Generator) -> Clip:
    return Clip(
        word=word,
        accent=split.accents[rng.integers(len(split.accents))],
        speaker=split.speakers[rng.integers(len(split.speakers))],
        words_per_minute=int(rng.integers(115, 216)),
        pitch=int(rng.integers(20, 81)),
        ending=("", "", "!", "?")[rng.integers(4)],
    )


def synthesize(clips: Sequence[Clip], cache: Path, title: str) -> list[Path]:
    """Say every clip, two at a time; returns the WAV files in the order of the clips."""
    _check_espeak({clip.speaker for clip in clips})
    cache.mkdir(parents=True, exist_ok=True)
    paths = [cache / clip.file_name for clip in clips]
    missing = [(clip, path) for clip, path in zip(clips, paths, strict=True) if not path.exists()]
    with ThreadPoolExecutor(max_workers=2) as pool:  # the work is done by espeak-ng's processes
        for _ in track(pool.map(lambda job: _say(*job), missing), description=title, total=len(missing)):
            pass
    return paths


def _say(clip: Clip, path: Path) -> None:
    part = path.with_suffix(".part")
    command = ["espeak-ng", "-v", f"{clip.accent}+{clip.speaker}", "-s", str(clip.words_per_minute)]
    command += ["-p", str(clip.pitch), "-w", str(part), clip.word + clip.ending]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0 or not part.exists():
        raise SynthesisError(f"espeak-ng could not say {clip}: {done.stderr.strip()}")
    part.replace(path)


def _check_espeak(speakers: set[str]) -> None:
    """An unknown speaker is not an error to espeak-ng, which then uses its default voice."""
    if shutil.which("espeak-ng") is None:
        raise SynthesisError("espeak-ng is not installed; run `apt-get install espeak-ng`.")
    listing = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True)
    known = listing.stdout.replace("\n", " \n")
    absent = sorted(name for name in speakers if f"!v/{name} " not in known)
    if absent:
        raise SynthesisError(
            f"this espeak-ng has no speaker {', '.join(absent)}; install espeak-ng 1.51 or newer."
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("build/speech"), help="folder of the WAV files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        for split in SPLITS:
            synthesize(plan(split, options.seed), options.cache, f"Speaking: {split}")
    except SynthesisError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
