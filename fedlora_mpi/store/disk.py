"""The file under an HDF5 file that is being written: HDF5 2.0 crashes when a write fails, so it
sees none fail.
"""

import os
from functools import partial


class FallbackFile:
    """A file object for h5py over the file with this ``handle``, which it closes.

    ``write_error`` is the OSError of the first write that failed. From then on all content is in
    memory only, and the file is not to be used.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._position = 0
        self.write_error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte."""
        self._position = (
            offset if whence == os.SEEK_SET else os.fstat(self._handle).st_size + offset
        )
        return self._position

    def tell(self) -> int:
        """The present byte."""
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fill ``buffer``; how many bytes there were."""
        return os.preadv(self._handle, [buffer], self._position)

    read = None  # h5py asks for the name, and uses readinto

    def write(self, data: memoryview) -> int:
        """Write all of ``data``."""
        data, written = memoryview(data).cast("B"), 0
        while written < len(data):
            written += self._retry_in_memory(
                partial(os.pwrite, self._handle, data[written:], self._position + written)
            )
        return written

    def truncate(self, size: int) -> int:
        """Cut or extend the file to so many bytes."""
        self._retry_in_memory(lambda: os.ftruncate(self._handle, size))
        return size

    def flush(self) -> None:
        """Nothing is held back here."""

    def sync(self) -> None:
        """Force all onto the disk. Raises OSError, of an earlier write too."""
        if self.write_error:
            raise self.write_error
        os.fsync(self._handle)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._handle)

    def _retry_in_memory(self, call):
        """``call()``, a second time in memory where the disk refuses it."""
        try:
            return call()
        except OSError as why:
            if self.write_error:
                raise
            self.write_error, memory = why, os.memfd_create("unwritten")
            with open(memory, "wb", closefd=False) as copy:
                position, size = 0, os.fstat(self._handle).st_size
                while position < size:
                    position += copy.write(
                        os.pread(self._handle, 1 << 20, position) or bytes(size - position)
                    )
            os.dup2(memory, self._handle)
            os.close(memory)
            return call()
