"""The file under an HDF5 file that is being written: HDF5 2.0 crashes when a write fails, so it
sees none fail.
"""

import os


class Disk:
    """A file object for h5py over the file with this ``handle``, which it closes.

    After the first write that fails, ``failed`` is its OSError, and what there is and comes is in
    memory only; the file is not to be used then.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._at = 0
        self.failed: OSError | None = None

    def seek(self, at: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte."""
        self._at = at if whence == os.SEEK_SET else os.fstat(self._handle).st_size + at
        return self._at

    def tell(self) -> int:
        """The present byte."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        """Fill ``buffer``; how many bytes there were."""
        return os.preadv(self._handle, [buffer], self._at)

    read = None  # h5py asks for the name, and uses readinto

    def write(self, data: memoryview) -> int:
        """Write all of ``data``."""
        data, done = memoryview(data).cast("B"), 0
        while done < len(data):
            done += self._tried(lambda: os.pwrite(self._handle, data[done:], self._at + done))  # noqa: B023
        return done

    def truncate(self, size: int) -> int:
        """Cut or extend the file to so many bytes."""
        self._tried(lambda: os.ftruncate(self._handle, size))
        return size

    def flush(self) -> None:
        """Nothing is held back here."""

    def sync(self) -> None:
        """Force all onto the disk. Raises OSError, of an earlier write too."""
        if self.failed:
            raise self.failed
        os.fsync(self._handle)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._handle)

    def _tried(self, call):
        """``call()``, a second time in memory where the disk refuses it."""
        try:
            return call()
        except OSError as why:
            if self.failed:
                raise
            self.failed, memory = why, os.memfd_create("unwritten")
            with open(memory, "wb", closefd=False) as copy:
                at, size = 0, os.fstat(self._handle).st_size
                while at < size:
                    at += copy.write(os.pread(self._handle, 1 << 20, at) or bytes(size - at))
            os.dup2(memory, self._handle)
            os.close(memory)
            return call()
