"""What is asked for over a bulk stream. Each request says by which right."""

from dataclasses import dataclass

from meshgpu.model.ids import Digest, JobId
from meshgpu.model.logs import WHOLE_LOG, LogSelection
from meshgpu.model.trust import Signed


@dataclass(frozen=True, slots=True)
class ChunksWanted:
    """Chunks of a job's tree, or its manifest: allowed to who holds or runs the job.

    Answered, in the order asked, with messages of one flag byte (1: last part of its chunk) and up to 1 MiB.
    """

    job: JobId
    chunks: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class LogsWanted:
    """What an attempt printed, from `position` on. request: the user's signed JobRequest for LOGS. epoch: 0 for the
    newest that is here. Where the selection begins counts only at position 0: who resumes has begun.

    Answered with messages of whole records: stream (u8), Unix time (f64), next position (u64), length (u32), bytes; for
    a gap, stream 0, and in place of the bytes only how many are missing (u64). With `follow` the stream ends when the
    job has ended, else when all there is has been sent.
    """

    request: Signed
    position: int
    follow: bool
    epoch: int = 0
    selection: LogSelection = WHOLE_LOG


@dataclass(frozen=True, slots=True)
class AttemptsWanted:
    """Which attempts of a job have a log here. request: signed, for LOGS. Answered with one JSON list of epochs."""

    request: Signed


@dataclass(frozen=True, slots=True)
class TailWanted:
    """What a steward has of the newest output of a job. request: signed, for LOGS. Answered as LogsWanted, at once."""

    request: Signed


@dataclass(frozen=True, slots=True)
class FilesWanted:
    """What a job left. request: signed, for FILES. Answered with one JSON list of [path, bytes]."""

    request: Signed


@dataclass(frozen=True, slots=True)
class FileWanted:
    """One file of a job's working directory. Answered with its size as decimal text, then its bytes."""

    request: Signed
    path: str


BulkRequest = ChunksWanted | LogsWanted | AttemptsWanted | TailWanted | FilesWanted | FileWanted
