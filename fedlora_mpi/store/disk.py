"""The file object that h5py writes through. It hides write errors from HDF5.

HDF5 2.0 crashes when a write fails.
"""

import os
from functools import partial


class FallbackFile:
    """A file object for h5py over the open file ``handle``; ``close`` closes the handle.

    ``write_error`` is the OSError of the first write that failed. After it, all content is in
    memory only, and the file must not be used.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._position = 0
        self.write_error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position (byte) and return it."""
        self._position = (
            offset if whence == os.SEEK_SET else os.fstat(self._handle).st_size + offset
        )
        return self._position

    def tell(self) -> int:
        """Return the current position (byte)."""
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fill ``buffer`` and return the number of bytes read."""
        return os.preadv(self._handle, [buffer], self._position)

    read = None  # h5py requires the name but calls readinto

    def write(self, data: memoryview) -> int:
        """Write all of ``data`` and return its length in bytes."""
        data, written = memoryview(data).cast("B"), 0
        while written < len(data):
            written += self._retry_in_memory(
                partial(os.pwrite, self._handle, data[written:], self._position + written)
            )
        return written

    def truncate(self, size: int) -> int:
        """Cut or extend the file to ``size`` bytes."""
        self._retry_in_memory(lambda: os.ftruncate(self._handle, size))
        return size

    def flush(self) -> None:
        """Do nothing: this class has no buffer."""

    def sync(self) -> None:
        """Force the content onto the disk. Raises OSError, also the one of an earlier write."""
        if self.write_error:
            raise self.write_error
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def _retry_in_memory(self, call):
        """Return ``call()``. If the disk refuses it, copy the file into memory and call again."""
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
